"""Blind comparison: people choose between two models' answers without knowing which is whose.

Pairs come in an order drawn by a seed, and so do their sides. The page, or the terminal, shows nothing else; which side
is the tuned model's stands in a key of its own, with all the answers, so that votes can be counted, and answers judged
again (`judging`), without any model. Answers that are equal are no question: they count as ties without being asked.
Votes are bound to their texts by the ballot's ID (`reporting.ballot`), and half of them can be counted: pairs without a
vote are named by number and left out.

That people see the answers in one order only was preferred to asking each pair in both, as a judge is: they remember.
How often they take answer A is reported instead.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitune.endpoint import Reply, derived_seed
from minitune.errors import CheckpointError, DataError, counted
from minitune.evaluation.answers import Duel, shown_answer
from minitune.evaluation.wins import Outcome, Share, count_wins, longer_wins
from minitune.files import atomic_file, read_json, write_json
from minitune.reporting.ballot import Item, Vote, ballot_id, ballot_page, read_votes
from minitune.reporting.page import visible

CHOICES = {"a": "A is better", "b": "B is better", "tie": "Both are alike"}
INSTRUCTIONS = (
    "Each request below has two answers, in an order drawn by lot. Choose the one that you would rather have got, or "
    "say that they are alike. What you choose stays in this browser; save the votes when you are done, or have had "
    "enough, and send the file back."
)


@dataclass(frozen=True)
class Key:
    """Two models' answers and how they are shown: `order` holds (place of the duel, tuned is A) for each pair.

    Duels that are not in it are identical.
    """

    tuned: str
    base: str
    seed: int
    duels: tuple[Duel, ...]
    order: tuple[tuple[int, bool], ...]

    @property
    def items(self) -> list[Item]:
        """The pairs as they are shown."""
        found = []
        for number, (place, tuned_first) in enumerate(self.order, 1):
            duel = self.duels[place]
            texts = [shown_answer(duel.tuned), shown_answer(duel.base)]
            first, second = texts if tuned_first else texts[::-1]
            found.append(Item(f"pair-{number}", (("Request", duel.prompt),), (("A", first), ("B", second))))
        return found

    @property
    def identical(self) -> int:
        """The number of duels that nobody is asked about."""
        return len(self.duels) - len(self.order)

    def outcomes(self, votes: Sequence[Vote]) -> dict[int, Outcome]:
        """Return who won each duel that has a vote, by its place."""
        sides = {f"pair-{number}": one for number, one in enumerate(self.order, 1)}
        found: dict[int, Outcome] = {}
        for vote in votes:
            place, tuned_first = sides[vote.item]
            found[place] = "tie" if vote.choice == "tie" else "tuned" if (vote.choice == "a") == tuned_first else "base"
        return found


def make_key(duels: Sequence[Duel], tuned: str, base: str, seed: int = 0) -> Key:
    """Draw the order of the pairs and their sides; raises DataError where no two answers differ.

    The lots are a function of the seed and of who said what: knowing the seed and the page does not tell the sides.
    """
    lots = random.Random(derived_seed(seed, [asdict(duel) for duel in duels]))
    places = [place for place, duel in enumerate(duels) if not duel.identical]
    if not places:
        raise DataError(f"all {counted(len(duels), 'pair')} of answers are equal, so there is nothing to choose")
    lots.shuffle(places)
    return Key(tuned, base, seed, tuple(duels), tuple((place, lots.random() < 0.5) for place in places))


def write_key(path: str | Path, key: Key) -> None:
    """Write a key as JSON."""
    content = {"ballot": ballot_id(key.items, CHOICES), **asdict(key)}
    with atomic_file(path) as temporary:
        write_json(temporary, content)


def read_key(path: str | Path) -> Key:
    """Return the key of a file; raises DataError where it is none, or was changed after the page was made."""
    try:
        content = read_json(Path(path))
        ballot = content.pop("ballot")
        pairs = [
            Duel(one["prompt"], *(Reply(**one[side]) for side in ("tuned", "base"))) for one in content.pop("duels")
        ]
        order = tuple((place, first) for place, first in content.pop("order"))
        key = Key(**content, duels=tuple(pairs), order=order)
        same = ballot_id(key.items, CHOICES) == ballot and len(dict(order)) == len(order) and min(dict(order)) >= 0
    except (CheckpointError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise DataError(f"{path}: not the key of a blind comparison; give the file that --blind.key made") from None
    if not same:
        raise DataError(f"{path}: the answers in it are not those of its ballot {ballot}; make the comparison again")
    return key


def blind_page(key: Key) -> str:
    """Return the page to vote on; nothing in it tells which answer is whose."""
    return ballot_page("Which answer is better?", INSTRUCTIONS, key.items, CHOICES)


def votes_of(path: str | Path, key: Key) -> list[Vote]:
    """Return the votes of a file; errors as in `ballot.read_votes`."""
    return read_votes(path, key.items, CHOICES)


def result(key: Key, votes: Sequence[Vote]) -> dict[str, Any]:
    """Return what the votes come to: wins with intervals, the pull of place A and of length, and what has no vote."""
    found = key.outcomes(votes)
    same = {place for place in range(len(key.duels))} - {place for place, _ in key.order}
    outcomes = found | dict.fromkeys(same, "tie")
    longer = longer_wins([(outcome, key.duels[place]) for place, outcome in found.items()])
    voted, decided = {vote.item for vote in votes}, [vote.choice for vote in votes if vote.choice != "tie"]
    wins = count_wins(list(outcomes.values()))
    return {
        "tuned": key.tuned, "base": key.base, "pairs": len(key.order), "identical": key.identical,
        "votes": len(votes), "without_vote": [item.name for item in key.items if item.name not in voted],
        **wins.numbers(),
        "place_a": Share(decided.count("a"), len(decided)).numbers(), "longer": longer.numbers(),
    }  # fmt: skip


def vote_in_terminal(
    key: Key, path: str | Path, *, ask: Callable[[str], str] = input, show: Callable[[str], None] = print
) -> list[Vote]:
    """Ask for a vote on each pair that has none, and keep the votes in a file after each one; return them all.

    The file is the one that the page saves; one that is there is gone on with. The end of the input and Ctrl-C leave,
    as "quit" does.
    """
    votes = votes_of(path, key) if Path(path).exists() else []
    given, items = {vote.item for vote in votes}, key.items
    words = {"a": "a", "b": "b", "t": "tie", "tie": "tie"}
    for number, item in enumerate(items, 1):
        if item.name in given:
            continue
        show(f"\n--- {number} of {len(items)} ---")
        for name, text in (*item.context, *item.texts):
            show(f"\n[{name}]\n{visible(text)}")
        answer = ""
        while answer not in (*words, "s", "skip"):
            try:
                answer = ask("\nwhich is better? a / b / tie / skip / quit > ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                answer = "quit"
            if answer in ("q", "quit"):
                return votes
        if answer in words:
            votes.append(Vote(item.name, words[answer]))
            _keep(path, key, votes)
    return votes


def _keep(path: str | Path, key: Key, votes: Sequence[Vote]) -> None:
    with atomic_file(path) as temporary:
        write_json(temporary, {"ballot": ballot_id(key.items, CHOICES), "votes": [asdict(vote) for vote in votes]})
