"""A row as its reader sees it: who is asked, what, and what the answer is; and rows that carry out one instruction."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitune.data.splits import normalise

GROUP = 5  # rows that share an instruction; fewer show no pattern
_EDGE = 5  # words by which a template is told


@dataclass(frozen=True, eq=False)
class View:
    """A row's last question and answer: `before` are the turns that came earlier, `chat` whether a template is applied.

    Of a preference pair the chosen answer. `source` is the file that the row was first read from.
    """

    row: Any
    source: str
    chat: bool
    system: str
    before: tuple[str, ...]
    question: str
    answer: str

    @property
    def origin(self) -> str:
        """Return the row's file:line."""
        return self.row.origin

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """Return all that comes before the answer, normalised: rows alike in it ask the same."""
        return tuple(map(normalise, (self.system, *self.before, self.question)))

    @cached_property
    def label(self) -> str:
        """Return the answer as a label: without case, and without punctuation or white space around it."""
        return re.sub(r"^[\W_]+|[\W_]+$", "", normalise(self.answer)) or normalise(self.answer)


def views(rows: Iterable[Any]) -> list[View]:
    """Return the views of rows that ask and answer: not of documents, nor of answers judged bad."""
    return [view for row in rows if getattr(row, "desirable", None) is not False and (view := _view(row))]


def _view(row: Any) -> View | None:
    side = row.sides[0]
    if side.text is not None:
        return None
    source = row.source.file if getattr(row, "source", None) else row.origin.rpartition(":")[0]
    if side.messages is None:
        return View(row, source, False, "", (), side.prompt, side.completion)
    turns = [turn["content"] for turn in side.messages]
    system = turns.pop(0) if side.messages[0]["role"] == "system" else ""
    return View(row, source, True, system, tuple(turns[:-2]), turns[-2], turns[-1])


def by_source(found: Sequence[View]) -> list[list[View]]:
    """Return the views of each source, in order."""
    parts = defaultdict(list)
    for view in found:
        parts[view.source].append(view)
    return list(parts.values())


def by_instruction(found: Sequence[View]) -> list[list[View]]:
    """Return groups of at least GROUP views that carry out one instruction, each view in its largest group.

    An instruction is told by what stays while the rest changes: what stands before the first colon or line end, the
    first words, or the last.
    """
    keys = [_instructions(view.question) for view in found]
    sizes = Counter(key for own in keys for key in own)
    groups = defaultdict(list)
    for view, own in zip(found, keys, strict=True):
        if own:
            groups[max(own, key=sizes.__getitem__)].append(view)
    return [group for group in groups.values() if len(group) >= GROUP]


def _instructions(question: str) -> set[tuple[str, str]]:
    first, *rest = re.split(r"\n|: ", question.strip(), maxsplit=1)
    line = {("line", normalise(first))} if rest and len(first.split()) >= 2 else set()
    words = normalise(question).split()
    if len(words) <= _EDGE:
        return line
    return line | {("head", " ".join(words[:_EDGE])), ("tail", " ".join(words[-_EDGE:]))}


def most_common(values: Iterable[Any]) -> tuple[Any, float]:
    """Return the most frequent of some values, and its share."""
    counts = Counter(values)
    value, count = counts.most_common(1)[0]
    return value, count / counts.total()
