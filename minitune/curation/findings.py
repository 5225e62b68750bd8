"""What a check says about rows: how many, which, and what to do.

Every check of this room returns findings, so that the table, the JSON and the page show all of them alike. A finding
is an opinion on data that training would accept; what it would refuse is a `data.reading.RowError`. That is why
"error" stands here for what makes a result untrue (contradictions, answers in the prompt, a test row that was
trained on), "warning" for what is usually a fault, and "note" for what somebody should know.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from minitune.data.formats import Record

Level = Literal["error", "warning", "note"]
Row = TypeVar("Row", bound=Any)  # a Record or a PreferenceRecord
SHOWN = 10  # rows that a finding names
QUOTED = 60  # characters of a quotation


@dataclass(frozen=True)
class Finding:
    """One kind of thing found in `count` rows; `rows` are the origins (file:line) of the first ten.

    `message` says in one line what was found, with an example; `remedy` what to do. `numbers` are what the finding
    rests on, such as {"majority_share": 0.93}.
    """

    kind: str
    level: Level
    count: int
    rows: tuple[str, ...]
    message: str
    remedy: str
    numbers: tuple[tuple[str, float], ...] = ()


def finding(kind: str, level: Level, rows: Iterable[Any], message: str, remedy: str, **numbers: float) -> Finding:
    """Return the finding on these records, whose origins it names."""
    origins = [row.origin for row in rows]
    return Finding(kind, level, len(origins), tuple(origins[:SHOWN]), message, remedy, tuple(numbers.items()))


def quoted(text: str) -> str:
    """Return a short quotation on one line, with control characters escaped."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")


def texts_of(row: Any) -> list[str]:
    """Return every text of a row that is read: of a pair both sides; an alpaca row's prompt text is its messages'."""
    texts = []
    for side in row.sides:
        if side.messages is not None:
            texts += [message["content"] for message in side.messages]
        else:
            texts += [text for text in (side.prompt, side.completion, side.text) if text is not None]
    return texts


def answers_of(row: Any) -> list[str]:
    """Return the texts of a row that are learned: the assistant's turns, a completion, a document; of a pair both."""
    texts = []
    for side in row.sides:
        if side.messages is not None:
            turns = side.messages[side.context :]
            texts += [turn["content"] for turn in turns if turn["role"] == "assistant"]
        else:
            texts.append(side.text if side.completion is None else side.completion)
    return texts


def with_texts(row: Row, change: Callable[[str], str]) -> Row:
    """Return the row with `change` applied to each of its texts."""
    if not isinstance(row, Record):
        return replace(row, sides=tuple(with_texts(side, change) for side in row.sides))
    plain = {name: getattr(row, name) for name in ("prompt", "completion", "text")}
    changed = {name: change(text) for name, text in plain.items() if text is not None}
    if row.messages is not None:
        changed["messages"] = tuple(turn | {"content": change(turn["content"])} for turn in row.messages)
    return replace(row, **changed)
