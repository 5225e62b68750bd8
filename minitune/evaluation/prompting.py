"""How a model is asked, and the way that serves it best: a base is compared as well as a user could have asked it.

A fine-tuned model is asked as in its training. The base is asked in several ways, with answered examples too, on
validation rows, and the test rows are asked in the best of them,

    way* = argmax_w (first metric, second metric, ...) on the validation rows;  of equals, the first

so that what is called a gain of the training is not one of the wording. The rows that examples are taken from are not
asked, and no row of either kind may be a test row. Choosing on the test rows was rejected: it would flatter the base,
the more the more ways there are.

A model that continues text after examples goes on with more of them, so its answer ends where the next one would begin.
Without that, no answer of a base would be whole, and each would count as wrong.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitune.data.formats import Format, Record, filled, read_records, text_field
from minitune.data.reading import RowError
from minitune.data.splits import normalise
from minitune.decoding import Prompt
from minitune.errors import ConfigError, DataError, counted
from minitune.evaluation.choices import Question
from minitune.evaluation.classification import LabelledPrompt
from minitune.evaluation.scores import Measured
from minitune.sources import resolve

MARK = "{}"
GAP = "\n\n"  # between the examples of a text to continue
Row = LabelledPrompt | Record | Question


@dataclass(frozen=True)
class Way:
    """A way of asking: `user` has the row's question in place of {}; before it come `shots` answered examples.

    `system` None keeps a row's own system message, "" leaves it out. The other fields are as in Record.
    """

    name: str
    user: str = MARK
    system: str | None = None
    shots: int = 0
    format: str = ""
    document: bool = False
    unread: tuple[str, ...] = ()
    source: Any = None

    @property
    def title(self) -> str:
        """The name with the number of examples."""
        return f"{self.name}, {counted(self.shots, 'example')}"


@dataclass(frozen=True)
class Search:
    """Ways to ask a base, and the validation rows that they are tried on; without rows, there is one way, as given."""

    ways: tuple[Way, ...]
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The way that was chosen, its examples, and what each way that was tried scored on how many validation rows.

    `next_best` are the others, best first, for test rows that are too long for the first.
    """

    way: Way
    shots: tuple[Row, ...] = ()
    tried: tuple[tuple[str, dict[str, float]], ...] = ()
    rows: int = 0
    next_best: tuple[Way, ...] = ()

    def ask(self, row: Row, *, chat: bool) -> Row:
        """Return a row asked in this way; `chat`: the tokenizer has a chat template."""
        return reworded(row, self.way, self.shots[: self.way.shots], chat=chat)

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer, beside the model's own end of it."""
        return stops(self.shots[: self.way.shots])

    def described(self) -> dict[str, Any]:
        """Return it as an object for JSON."""
        found = {"name": self.way.title, "user": self.way.user, "system": self.way.system, "shots": self.way.shots}
        return found | {"tried": dict(self.tried), "validation_rows": self.rows}


def default_ways(labels: Sequence[str] = ()) -> tuple[Way, ...]:
    """Return the ways to try where none are given: as the rows ask and, of labels, naming them; with examples too."""
    wordings = [Way("as the rows ask")]
    if labels:
        named = f"{MARK}\n\nAnswer with exactly one of these, and nothing else: {', '.join(labels)}."
        wordings += [Way("labels named", named), Way("labels named, no system message", named, "")]
    return tuple(replace(way, shots=shots) for shots in (0, 4, 8) for way in wordings)


def read_ways(path: str | Path) -> tuple[Way, ...]:
    """Return the ways in a file: rows {"user"} with {} for the question, and, as one likes, "name", "system", "shots".

    Raises DataError with file:line for a bad row, or for two of one name.
    """
    ways = read_records(resolve(path), formats={"way": Format(("user",), ("name", "system", "shots"), _parse)})
    twice = next((way.title for i, way in enumerate(ways) if way.title in [other.title for other in ways[:i]]), None)
    if twice:
        raise DataError(f"{path}: two ways of asking are called '{twice}'; give each a name of its own")
    return tuple(ways)


def _parse(fields: dict[str, Any], origin: str) -> Way:
    user = filled(text_field(fields, "user", origin), "a way of asking", "user", origin)
    if user.count(MARK) != 1:
        raise RowError(origin, f"{user.count(MARK)} times {MARK} in 'user'", f"write {MARK} once, for the question")
    try:
        shots = int(fields.get("shots") or 0)
    except (TypeError, ValueError):
        shots = -1
    if shots < 0 or isinstance(fields.get("shots"), bool | float):
        raise RowError(origin, "the field 'shots' is no number of examples", "write 0 or more")
    system = None if fields.get("system") is None else text_field(fields, "system", origin)
    return Way(text_field(fields, "name", origin, optional=True) or user, user, system, shots)


def search_of(
    prompts: str | None, validation: Sequence[Row], test: Sequence[Row], labels: Sequence[str] = ()
) -> Search | None:
    """Return how to ask the base: by the file `prompts`, by `default_ways`, or None as the rows ask.

    Raises ConfigError where several ways, or examples, have no validation rows; DataError where these are too few or
    some are test rows.
    """
    ways = read_ways(prompts) if prompts else default_ways(labels)
    if not validation:
        if prompts and (len(ways) > 1 or ways[0].shots):
            raise ConfigError(f"{prompts} has several ways to ask, or examples; give --validation rows for them")
        return Search(ways) if prompts else None
    check_apart(validation, test)
    most = max(way.shots for way in ways)
    if len(validation) <= most:
        found = f"there are {counted(len(validation), 'validation row')} and up to {most} are shown as examples"
        raise DataError(f"{found}; give more, so that some are left to choose by")
    plain = any((way.user, way.system, way.shots) == (MARK, None, 0) for way in ways)
    return Search(ways if plain else (Way("as the rows ask"), *ways), tuple(validation))


def check_apart(validation: Sequence[Row], test: Sequence[Row]) -> None:
    """Raise DataError, naming the first, where rows to choose by ask what test rows ask."""
    asked = {_key(row): row.origin for row in reversed(test)}
    both = [row for row in validation if _key(row) in asked]
    if both:
        found = f"{both[0].origin} asks what the test row {asked[_key(both[0])]} asks"
        more = f", and {len(both) - 1:,} more rows do such a thing" if both[1:] else ""
        raise DataError(f"{found}{more}; take the validation rows from others than the test rows")


def choose(
    search: Search, measure: Callable[[Sequence[Row], tuple[str, ...]], dict[str, Measured]], *, chat: bool,
    shots: Sequence[Row] | None = None, say: Callable[[str], None] = lambda line: None,
) -> Chosen:  # fmt: skip
    """Try each way on the validation rows and return the best.

    Args:
        search: the ways and the rows.
        measure: asks rows, whose answers end before some strings too, and returns metrics by name, the one that counts
            first in front; those of which more is neither good nor bad do not count.
        chat: the tokenizer has a chat template.
        shots: rows to show with their answers; None takes them from the search's, which are not asked then.
        say: receives a line for each way. One whose examples are too long for the model is left out.

    Raises ConfigError where no metric counts, DataError where no row is left to ask, and what `measure` raises.
    """
    if not search.rows:
        return Chosen(search.ways[0])
    if shots is None:
        shots = examples(search.rows, max(way.shots for way in search.ways))
    shown = {_key(row) for row in shots}
    rows = [row for row in search.rows if _key(row) not in shown]
    if not rows:
        raise DataError("every validation row asks what one of the examples asks; give more that differ")
    tried: dict[str, dict[str, float]] = {}
    scores: list[tuple[list[float], Way]] = []
    for way in search.ways:
        examples_of = shots[: way.shots]
        try:
            found = measure([reworded(row, way, examples_of, chat=chat) for row in rows], stops(examples_of))
        except DataError as error:
            if not way.shots:
                raise
            tried[way.title] = {}
            say(f"  {way.title}: left out ({error})")
            continue
        counting = {name: metric for name, metric in found.items() if metric.better}
        if not counting:
            raise ConfigError(f"{', '.join(found)}: more is neither good nor bad; add a metric to choose a prompt by")
        values = {name: metric.statistics.value for name, metric in counting.items()}
        signed = [value * (1 if counting[name].better == "higher" else -1) for name, value in values.items()]
        scores.append((signed, way))
        tried[way.title] = values
        name, value = next(iter(values.items()))
        say(f"  {way.title}: {name} {value:.4g}")
    if not scores:
        raise DataError("the examples of every way are too long for the model; give a way with fewer")
    best, *others = (way for _, way in sorted(scores, key=lambda one: one[0], reverse=True))  # of equals the first
    return Chosen(best, tuple(shots), tuple(tried.items()), len(rows), tuple(others))


def stops(shots: Sequence[Row]) -> tuple[str, ...]:
    """Return what ends an answer after these examples: of texts the gap, unless an answer has one within."""
    texts = [answer for prompt, answer in map(question_of, shots) if isinstance(prompt, str)]
    return (GAP,) if texts and not any(GAP in answer.strip() for answer in texts) else ()


def examples(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` rows to show with their answers: of each answer in turn, so that labels are balanced."""
    by_answer: dict[str, list[Row]] = {}
    for row in rows:
        by_answer.setdefault(question_of(row)[1], []).append(row)
    turns = max(map(len, by_answer.values()), default=0)
    return [group[turn] for turn in range(turns) for group in by_answer.values() if turn < len(group)][:count]


def question_of(row: Row) -> tuple[Prompt, str]:
    """Return what a row asks, messages or text, and the right answer to it."""
    if isinstance(row, LabelledPrompt):
        return row.prompt, row.label
    if isinstance(row, Question):
        return row.prompt, row.choices[row.answer]
    if row.messages is not None:
        return row.messages[:-1], row.messages[-1]["content"]
    return row.prompt, row.completion


def reworded(row: Row, way: Way, shots: Sequence[Row] = (), *, chat: bool) -> Row:
    """Return a row that asks its question in another way, after answered examples; its answer stays.

    `chat`: the tokenizer has a chat template, so that a text question of a multiple choice is a user's message.
    """
    prompt = question_of(row)[0]
    if isinstance(prompt, str) and isinstance(row, Question) and chat:
        prompt = ({"role": "user", "content": prompt},)
    asked = _text(prompt, way, shots) if isinstance(prompt, str) else _turns(prompt, way, shots)
    if isinstance(row, Record):
        if row.messages is None:
            return replace(row, prompt=asked)
        return replace(row, messages=(*asked, row.messages[-1]), prompt=None, completion=None)
    return replace(row, prompt=asked)


def as_text(row: Row) -> Row:
    """Return a row that is both a chat and a text as the text alone, for a tokenizer without chat template."""
    both = isinstance(row, Record) and row.messages is not None and row.prompt is not None
    return replace(row, messages=None) if both else row


def _turns(prompt: Sequence[dict[str, str]], way: Way, shots: Sequence[Row]) -> tuple[dict[str, str], ...]:
    own = [turn["content"] for turn in prompt[:1] if turn["role"] == "system"]
    system = own if way.system is None else [way.system] * bool(way.system)
    turns = [{"role": "system", "content": text} for text in system]
    for shot in shots:
        turns.append({"role": "user", "content": way.user.replace(MARK, _last(shot))})
        turns.append({"role": "assistant", "content": question_of(shot)[1]})
    turns += prompt[len(own) : -1]
    return (*turns, {"role": "user", "content": way.user.replace(MARK, prompt[-1]["content"])})


def _text(prompt: str, way: Way, shots: Sequence[Row]) -> str:
    parts = [f"{way.user.replace(MARK, _last(shot).rstrip())} {question_of(shot)[1].strip()}" for shot in shots]
    return GAP.join([*[way.system] * bool(way.system), *parts, way.user.replace(MARK, prompt)])


def _last(row: Row) -> str:
    prompt = question_of(row)[0]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _key(row: Row) -> str:
    """Return what a row asks, and offers, by which two are told to be the same, whatever the system message."""
    prompt = question_of(row)[0]
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt if turn["role"] != "system"]
    offered = row.choices if isinstance(row, Question) else ()
    return json.dumps([[normalise(turn) for turn in turns], sorted(offered)])
