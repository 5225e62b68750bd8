"""Wins, losses and ties of a tuned model against its base, from people's votes or a judge's verdicts.

    win rate = (wins + ties / 2) / rows

with Wilson's interval, a tie being half a success: a half varies less than a whole, so the interval is a little wide,
never too narrow. Beside it stands the share of wins among the rows that are decided, and the verdict rests on the sign
test, which is exact and asks the decided rows alone: p = min(1, 2 sum_{i <= min(w, l)} C(w + l, i) / 2^(w + l)), the
formula of `comparison.mcnemar`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minitune.errors import DataError
from minitune.evaluation.answers import Duel
from minitune.evaluation.comparison import SURE, Verdict, mcnemar
from minitune.evaluation.metrics import wilson_interval

Outcome = Literal["tuned", "tie", "base"]
OUTCOMES: tuple[Outcome, ...] = ("tuned", "tie", "base")  # from one end to the other, as a weighted kappa needs them


@dataclass(frozen=True)
class Share:
    """`count` of `rows`, which may be none."""

    count: float
    rows: int

    def numbers(self) -> dict[str, Any]:
        """Return {"value", "interval", "count", "rows"}; the interval is Wilson's of 95%, both are None of no rows."""
        share, edges = (
            (self.count / self.rows, list(wilson_interval(self.count, self.rows))) if self.rows else (None, None)
        )
        return {"value": share, "interval": edges, "count": self.count, "rows": self.rows}


def share_text(found: dict[str, Any]) -> str:
    """Return the numbers of a share for a reader."""
    if found["value"] is None:
        return "not known (of no rows)"
    low, high = found["interval"]
    return f"{found['value']:.1%} (95% interval {low:.1%} to {high:.1%}; {found['count']:g} of {found['rows']})"


@dataclass(frozen=True)
class Wins:
    """The tuned model's wins, ties and losses, with the sign test's `p` and what it says."""

    wins: int
    ties: int
    losses: int
    p: float
    verdict: Verdict

    def numbers(self) -> dict[str, Any]:
        """Return the fields with "win_rate" (ties as half) and "decided" (without ties)."""
        return asdict(self) | {
            "win_rate": Share(self.wins + self.ties / 2, self.wins + self.ties + self.losses).numbers(),
            "decided": Share(self.wins, self.wins + self.losses).numbers(),
            "interval_by": "Wilson, a tie as half a win", "test": "sign test, exact",
        }  # fmt: skip


def win_lines(found: dict[str, Any]) -> list[str]:
    """Return the numbers of wins for a reader, and say plainly who wins."""
    words = {"wins": "the tuned model wins", "loses": "the tuned model is WORSE than the base",
             "undecided": "the tuned model does not win: the rows show no difference"}  # fmt: skip
    return [
        f"win rate    {share_text(found['win_rate'])}, a tie as half a win",
        f"decided     {share_text(found['decided'])}; {found['wins']} wins, {found['ties']} ties, "
        f"{found['losses']} losses",
        f"{words[found['verdict']]}  ({found['test']}, p = {found['p']:.2g})",
    ]


def count_wins(outcomes: Sequence[Outcome]) -> Wins:
    """Return wins, ties and losses of the tuned model; raises DataError for no outcome."""
    if not outcomes:
        raise DataError("nothing was judged, so there is no win rate; give at least one vote or verdict")
    wins, ties, losses = (sum(one == kind for one in outcomes) for kind in OUTCOMES)
    p = mcnemar(wins, losses)
    verdict = "undecided" if p >= SURE else "wins" if wins > losses else "loses"
    return Wins(wins, ties, losses, p, verdict)


def longer_wins(judged: Iterable[tuple[Outcome, Duel]]) -> Share:
    """Return how often the longer answer (in characters) wins, of decided duels whose answers differ in length.

    Far from one half it may be a bias for words, or the longer answers may be better: where a person's votes are
    there, compare with theirs.
    """
    leads = [(one, len(duel.tuned.text.strip()) - len(duel.base.text.strip())) for one, duel in judged if one != "tie"]
    decided = [(one == "tuned") == (lead > 0) for one, lead in leads if lead]
    return Share(sum(decided), len(decided))
