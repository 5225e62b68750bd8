"""Rows -> prompts: what a model is to answer, from rows without an answer and from all that train.

| rows                                            | become                                                       |
|-------------------------------------------------|--------------------------------------------------------------|
| {"prompt": text}, a line of a .txt file         | a user's message; without a chat template, text to continue  |
| {"prompt": turns}, {"messages": turns}          | these turns; a last turn of the assistant is left out        |
| any format of supervised or preference training | what precedes the answer, asked as training asks it          |

So `{"prompt", "completion"}` as texts is continued as text, though `{"prompt"}` alone is asked: training reads the
first as text after text. A prompt is a Record without completion; one kind of object serves both ways.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitune.data.formats import (
    FORMATS,
    Format,
    Kind,
    Record,
    check_chat,
    filled,
    kind_of,
    read_records,
    read_turns,
    text_field,
)
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.reading import RowError, read_rows
from minitune.errors import DataError


def read_prompts(path: str | Path) -> list[Record]:
    """Return the prompts of a file: records with `messages` (ending with the user's), `prompt` (text) or both.

    Where both are there, the messages are for a tokenizer with a chat template and the text for one without.
    Raises DataError with file:line for a row that cannot be asked.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        ((_, fields),) = read_rows(path)
        lines = enumerate(fields["text"].split("\n"), 1)
        return [_parse_prompt({"prompt": line}, f"{path}:{number}") for number, line in lines if line.strip()]
    kind = kind_of_file(path)
    formats = FORMATS | _OPEN if kind in (None, "examples") else FORMATS_OF[kind]
    if kind is None:
        formats = formats | {"prompt": Format(("prompt",), ("system",), _parse_prompt)}
    return [_without_answer(row.sides[0]) for row in read_records(path, formats=formats)]


def kind_of_file(path: str | Path) -> Kind | None:
    """Return what the first sound row of a file is for (see `kind_of`); raises as `read_rows` does."""
    return kind_of(next((fields for _, fields in read_rows(path) if not isinstance(fields, RowError)), {}))


def _without_answer(record: Record) -> Record:
    if record.text is not None:
        raise DataError(f"{record.origin}: a text without a question; give rows with a prompt")
    if record.format == "prompt":
        return record
    messages = record.messages and record.messages[: record.context or -1]
    return replace(record, messages=messages, completion=None)


def _parse_prompt(fields: dict[str, Any], origin: str) -> Record:
    if isinstance(fields["prompt"], list):
        record = _parse_open(fields, origin, "prompt")
        return replace(record, messages=record.messages[:-1])
    text = filled(text_field(fields, "prompt", origin), "a question", "prompt", origin)
    system = text_field(fields, "system", origin, optional=True)
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    return Record(origin, "prompt", tuple(messages), None if system else text)


def _parse_open(fields: dict[str, Any], origin: str, field: str = "messages") -> Record:
    """Return a chat that may end with the user's turn; one that does gets an answer, to be left out again."""
    turns, system = read_turns(fields.get(field), field, origin), text_field(fields, "system", origin, optional=True)
    if turns[-1]["role"] != "assistant":
        turns = [*turns, {"role": "assistant", "content": "?"}]
    return Record(origin, "", messages=check_chat(turns, system, origin))


_OPEN = {
    "messages": Format(("messages",), ("system",), _parse_open),
    "sharegpt": Format(
        ("conversations",), ("system",), lambda fields, origin: _parse_open(fields, origin, "conversations")
    ),
}
