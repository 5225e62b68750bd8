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
    Record,
    check_chat,
    file_kind,
    filled,
    read_records,
    read_turns,
    text_field,
)
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.reading import data_path, read_rows
from minitune.errors import DataError


def read_prompts(path: str | Path) -> list[Record]:
    """Return the prompts of a file: records with `messages` (ending with the user's), `prompt` (text) or both.

    Where both are there, the messages are for a tokenizer with a chat template and the text for one without.
    Raises DataError with file:line for a row that cannot be asked.
    """
    path = data_path(path)
    if path.suffix.lower() == ".txt":
        ((_, fields),) = read_rows(path)
        lines = enumerate(fields["text"].split("\n"), 1)
        records = [_parse_prompt({"prompt": line}, f"{path}:{number}") for number, line in lines if line.strip()]
    else:
        kind = file_kind(path)
        records = read_records(path, formats=_FORMATS if kind == "examples" else FORMATS_OF[kind])
    return [_without_answer(record.sides[0]) for record in records]


def parse_prompt(fields: dict[str, Any], origin: str) -> Record:
    """Return the prompt of a row {"prompt"} or {"messages"}, either with "system"; raises RowError for another."""
    return _without_answer((_parse_prompt if "prompt" in fields else _parse_chat)(fields, origin))


def _without_answer(record: Record) -> Record:
    if record.text is not None:
        raise DataError(f"{record.origin}: a text without a question; give rows with a prompt")
    messages = record.messages and record.messages[: record.context or -1]
    return replace(record, messages=messages, completion=None)


def _parse_prompt(fields: dict[str, Any], origin: str) -> Record:
    if "completion" in fields:
        return FORMATS["prompt_completion"].parse(fields, origin)
    if isinstance(fields.get("prompt"), list):
        return _parse_chat(fields, origin, "prompt")
    text = filled(text_field(fields, "prompt", origin), "a question", "prompt", origin)
    record = _parse_chat(fields | {"prompt": [{"role": "user", "content": text}]}, origin, "prompt")
    return record if fields.get("system") else replace(record, prompt=text)


def _parse_chat(fields: dict[str, Any], origin: str, field: str = "messages") -> Record:
    """Return a chat that may end with the user's turn; one that does gets an answer, to be left out again."""
    turns, system = read_turns(fields.get(field), field, origin), text_field(fields, "system", origin, optional=True)
    if turns[-1]["role"] != "assistant":
        turns = [*turns, {"role": "assistant", "content": "?"}]
    return Record(origin, "", messages=check_chat(turns, system, origin))


def _parse_sharegpt(fields: dict[str, Any], origin: str) -> Record:
    return _parse_chat(fields, origin, "conversations")


_FORMATS = {
    "alpaca": FORMATS["alpaca"],
    "messages": Format(("messages",), ("system",), _parse_chat),
    "sharegpt": Format(("conversations",), ("system",), _parse_sharegpt),
    "prompt": Format(("prompt",), ("completion", "system"), _parse_prompt),
    "text": FORMATS["text"],
}
