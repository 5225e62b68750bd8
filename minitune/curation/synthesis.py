"""Synthetic rows: what a teacher is asked to make more rows like some seeds, and which of its rows are kept.

A request shows one seed and some others, drawn by a hash of (seed, round), and asks for so many rows (Wang et al. 2023,
Self-Instruct, section 2.2). What comes back is read in the one form that was asked for, never guessed at:

| reply         | a row is                                                         | its answer                    |
|---------------|------------------------------------------------------------------|-------------------------------|
| json_lines    | a line that is one JSON object {"instruction", "output"}          | the output                    |
| numbered_list | an item "3. text" on a line of its own, numbered 1, 2, 3, ...     | the teacher's, asked for apart|

A whole line of a reply that was cut off is a whole row of JSON, while the last item of such a list may be half of one.
Everything else in a reply is counted with its reason: a preamble, an item of several lines (the first of which would be
half a question), a broken object, more rows than asked for. Mending what is nearly JSON was rejected: what comes out
of it is nobody's row. JSON lines cost one request for several rows; small models rarely manage them, but can list.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minitune.curation.near_duplicates import near_duplicates
from minitune.data.formats import Record, parse_alpaca, read_records
from minitune.data.reading import RowError
from minitune.data.splits import normalise
from minitune.endpoint import Conversation, Reply, derived_seed
from minitune.errors import ConfigError, DataError, check_counts, counted
from minitune.strict_json import loads

ReplyForm = Literal["json_lines", "numbered_list"]
FIELDS = ("instruction", "output")
_ITEM = re.compile(r"(\d{1,4})[.)]\s+(\S.*)")
_FORMS = {
    "json_lines": (
        "Reply with {lines} and nothing else. Each line is one JSON object with two fields, "
        '"instruction" and "output", both text.'
    ),
    "numbered_list": "Reply with a numbered list of {lines} and nothing else. Each item is whole and on one line.",
}


@dataclass(frozen=True)
class Recipe:
    """What a teacher is asked: `rounds` requests for each seed, each for `per_seed` rows, showing `examples` seeds."""

    instruction: str
    reply: ReplyForm = "json_lines"
    per_seed: int = 3
    examples: int = 3
    rounds: int = 1
    seed: int = 0

    def __post_init__(self):
        """Refuse an empty instruction and counts without meaning."""
        if not self.instruction.strip():
            raise ConfigError("the recipe's instruction is empty; say what rows the teacher is to write")
        check_counts(per_seed=self.per_seed, examples=self.examples, rounds=self.rounds)


@dataclass(frozen=True)
class Row:
    """A question and its answer, of a seed or made from the one at `origin` (file:line); no answer: not asked yet.

    `score` is a judge's, where there was one.
    """

    question: str
    answer: str
    origin: str
    system: str = ""
    score: float | None = None

    def fields(self) -> dict[str, str]:
        """Return the row as training reads it, in the format alpaca."""
        return dict(zip(FIELDS, (self.question, self.answer), strict=True)) | (
            {"system": self.system} if self.system else {}
        )


@dataclass(frozen=True)
class Rejected:
    """What is not kept: the kind of reason, which is counted, the details, and the row or the text of the reply."""

    reason: str
    details: str
    origin: str
    row: Row | None = None
    text: str | None = None

    def fields(self) -> dict[str, str]:
        """Return it as a line of the file of rejected rows."""
        found = {"text": self.text} if self.row is None else self.row.fields()
        return {"reason": self.reason, "details": self.details, "seed": self.origin} | found


def read_seeds(path: str | Path) -> list[Row]:
    """Return the seeds of a file in any format of answers to learn, each a question and its answer.

    Raises DataError for a row that cannot be used (as `read_records`), has several questions, or is plain text.
    """
    return [_seed(record) for record in read_records(path)]


def _seed(record: Record) -> Row:
    turns = list(record.messages or ())
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
    if record.messages is None and record.prompt is not None:
        return Row(record.prompt, record.completion or "", record.origin)
    if len(turns) != 2:
        found = "plain text" if record.messages is None else counted(len(turns), "turn")
        raise DataError(f"{record.origin}: a seed is one question and its answer, this is {found}; leave the row out")
    return Row(turns[0]["content"], turns[1]["content"], record.origin, system)


def requests(seeds: Sequence[Row], recipe: Recipe) -> list[tuple[Row, Conversation]]:
    """Return (seed, what the teacher is asked) for each round of each seed, all different.

    Raises ConfigError where there are too few seeds for that many rounds or examples.
    """
    if recipe.examples > len(seeds):
        few = f"examples is {recipe.examples}, but there are only {counted(len(seeds), 'seed')}"
        raise ConfigError(f"{few}; lower it, or give more seeds")
    draws = math.comb(len(seeds) - 1, recipe.examples - 1)
    if recipe.rounds > draws:
        raise ConfigError(
            f"rounds is {recipe.rounds}, but {recipe.examples} of {counted(len(seeds), 'seed')} can be shown with each "
            f"in only {draws} way{'s' * (draws > 1)}, and the same request brings the same rows; lower rounds"
        )
    asked = []
    for number, seed in enumerate(seeds):
        seen: set[frozenset[int]] = set()
        for shown in _draws(number, len(seeds), recipe):
            if frozenset(shown) not in seen:
                seen.add(frozenset(shown))
                asked.append((seed, [{"role": "user", "content": _question([seeds[i] for i in shown], recipe)}]))
            if len(seen) == recipe.rounds:
                break
    return asked


def _draws(number: int, count: int, recipe: Recipe) -> Iterator[list[int]]:
    """Yield seed `number` and others beside it, drawn anew each time, without end."""
    for attempt in itertools.count():
        draw = random.Random(derived_seed(recipe.seed, number, attempt))
        others = draw.sample(range(count - 1), recipe.examples - 1)
        yield [number, *(other + (other >= number) for other in others)]


def _question(shown: Sequence[Row], recipe: Recipe) -> str:
    if recipe.reply == "json_lines":
        lines = [json.dumps(dict(zip(FIELDS, (one.question, one.answer), strict=True)), ensure_ascii=False)
                 for one in shown]  # fmt: skip
    else:
        lines = [f"{i}. {' '.join(one.question.split())}" for i, one in enumerate(shown, 1)]
    asked = counted(recipe.per_seed, "line" if recipe.reply == "json_lines" else "item")
    form = _FORMS[recipe.reply].format(lines=asked)
    return "\n\n".join((recipe.instruction.strip(), "Examples:\n" + "\n".join(lines), f"Write new ones. {form}"))


def read_rows_of(reply: Reply, seed: Row, recipe: Recipe) -> tuple[list[Row], list[Rejected]]:
    """Return the rows of a teacher's reply, and what in it is none; rows of a list have no answer yet."""
    lines = [line.strip() for line in reply.text.split("\n")]
    read = _json_lines if recipe.reply == "json_lines" else _numbered_list
    found = [Rejected("an empty reply", "", seed.origin, text="")] if not any(lines) else read(lines, seed, reply)
    rows, rejected = apart(found)
    surplus = f"{counted(recipe.per_seed, 'row')} asked for"
    rejected += [Rejected("more rows than asked for", surplus, seed.origin, row) for row in rows[recipe.per_seed :]]
    return rows[: recipe.per_seed], rejected


def apart(found: Sequence[Row | Rejected]) -> tuple[list[Row], list[Rejected]]:
    """Return the rows, and what is rejected."""
    return [one for one in found if isinstance(one, Row)], [one for one in found if isinstance(one, Rejected)]


def _json_lines(lines: list[str], seed: Row, reply: Reply) -> list[Row | Rejected]:
    """Read each line but blank ones and the marks of a fence."""
    whole = [line for line in lines if line and not line.startswith("```")]
    found = [_json_row(line, seed) for line in whole]
    if found and isinstance(found[-1], Rejected) and not reply.finished:
        found[-1] = replace(found[-1], reason="cut off", details="the reply's length")
    return found


def _json_row(line: str, seed: Row) -> Row | Rejected:
    try:
        fields = loads(line)
    except ValueError as error:
        return Rejected("not JSON", str(error), seed.origin, text=line)
    if not isinstance(fields, dict) or set(fields) != set(FIELDS):
        names = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
        return Rejected("other fields", names, seed.origin, text=line)
    try:
        parse_alpaca(fields, seed.origin)  # what training would refuse
    except RowError as error:
        return Rejected("no row that trains", error.problem, seed.origin, text=line)
    return Row(fields["instruction"].strip(), fields["output"].strip(), seed.origin, seed.system)


def _numbered_list(lines: list[str], seed: Row, reply: Reply) -> list[Row | Rejected]:
    """Read items 1, 2, 3, ...; text between two belongs to the first, which is then no item of one line."""
    found: list[Row | Rejected] = []
    number = 0
    for line in filter(None, lines):
        item = _ITEM.fullmatch(line)
        if item and int(item[1]) == number + 1:
            number += 1
            problem = "a NUL" if "\0" in line else "a second number" if _ITEM.fullmatch(item[2]) else None
            row = Row(item[2], "", seed.origin, seed.system)
            found.append(row if problem is None else Rejected("an unusable item", problem, seed.origin, text=line))
        elif not number:
            found.append(Rejected("text before the list", "", seed.origin, text=line))
        elif isinstance(found[-1], Row):
            text = f"{found[-1].question}\n{line}"
            found[-1] = Rejected("an item of several lines", "", seed.origin, text=text)
        else:
            found[-1] = replace(found[-1], text=f"{found[-1].text}\n{line}")
    if not reply.finished and isinstance(found[-1], Row):
        found[-1] = Rejected("cut off", "the reply's length", seed.origin, text=found[-1].question)
    return found


def answer_request(row: Row) -> Conversation:
    """Return what asks the teacher to answer a question of its own."""
    system = [{"role": "system", "content": row.system}] if row.system else []
    return [*system, {"role": "user", "content": row.question}]


def with_answer(row: Row, reply: Reply) -> Row | Rejected:
    """Return a row with the teacher's answer, unless that was cut off or is none."""
    row = replace(row, answer=reply.text.strip())
    if not row.answer or "\0" in row.answer:
        return Rejected("an empty answer" if not row.answer else "no row that trains", "", row.origin, row)
    return row if reply.finished else Rejected("cut off", "the answer's length", row.origin, row)


def filtered(
    rows: Sequence[Row], reason: str, bad: Callable[[str], bool], details: str
) -> tuple[list[Row], list[Rejected]]:
    """Return the rows whose answers are not `bad`, and the others."""
    marks = [bad(row.answer) for row in rows]
    kept = [row for row, mark in zip(rows, marks, strict=True) if not mark]
    return kept, [Rejected(reason, details, row.origin, row) for row, mark in zip(rows, marks, strict=True) if mark]


def without_duplicates(
    rows: Sequence[Row], seeds: Sequence[Row], threshold: float | None
) -> tuple[list[Row], list[Rejected]]:
    """Return the rows whose questions no seed and no earlier row asks, and the others.

    Equal is what `normalise` makes equal; with a `threshold` also questions whose word shingles are that alike.
    """
    every = [*seeds, *rows]
    first: dict[str, int] = {}
    like: dict[int, tuple[int, float | None]] = {}  # place of a duplicate -> that of an earlier text, similarity
    for place, row in enumerate(every):
        earlier = first.setdefault(normalise(row.question), place)
        if earlier != place:
            like[place] = (earlier, None)
    if threshold is not None:
        for place, earlier, similarity in near_duplicates([row.question for row in every], threshold=threshold):
            like.setdefault(place, (earlier, similarity))
    kept, rejected = [], []
    for place, row in enumerate(rows, len(seeds)):
        if place not in like:
            kept.append(row)
            continue
        earlier, similarity = like[place]
        kind = "a seed" if earlier < len(seeds) else "another row"
        nearness = "equal to" if similarity is None else f"{similarity:.2f} like"
        details = f"{nearness} {every[earlier].question[:80]!r}"
        reason = f"the question of {kind}" if similarity is None else f"nearly the question of {kind}"
        rejected.append(Rejected(reason, details, row.origin, row))
    return kept, rejected


def review_sample(count: int, share: float, seed: int) -> list[int]:
    """Return the places, in order, of `share` of `count` rows, rounded up, drawn by a hash of (seed, place)."""
    drawn = sorted(range(count), key=lambda place: derived_seed(seed, "review", place))
    return sorted(drawn[: math.ceil(count * share)])


def counts_of(rejected: Sequence[Rejected]) -> dict[str, int]:
    """Return how many were rejected for each reason, in order of appearance."""
    counts: dict[str, Any] = {}
    for one in rejected:
        counts[one.reason] = counts.get(one.reason, 0) + 1
    return counts
