"""Rows -> records: the formats that data for supervised training comes in, each checked and made one shape.

| format            | required fields         | optional               | becomes                                  |
|-------------------|-------------------------|------------------------|------------------------------------------|
| alpaca            | instruction, output     | input, system, history | a chat, or Alpaca's prompt text          |
| messages          | messages                | system                 | a chat                                   |
| sharegpt          | conversations           | system                 | a chat                                   |
| prompt_completion | prompt, completion      |                        | text after text, or (lists) a chat       |
| text              | text                    |                        | a document; every token is a target      |

A chat is an optional system turn, then user and assistant in turn, ending with an answer. Turns are written
role/content or from/value; ShareGPT's names (human, gpt, ...) are understood. The format is that whose required
fields the file's first row has; none or two is an error, never a guess. Fields that change what a row means
(preference pairs, tools, images, per-turn weights) are refused; the others that are not read are listed by
`prepare`. Refusing every extra field was rejected: public data sets carry ids, URLs and scores.

Which formats are looked for is the objective's choice: those above are `FORMATS`; preference pairs and judged
answers have theirs in `preference_formats`, read by the functions here. `kind_of` tells the three kinds apart.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minitune.data.reading import RowError, data_path, first_of, read_rows
from minitune.errors import ConfigError, DataError, nearest, type_name

FormatName = Literal[
    "auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "pairs", "scored", "judged"
]  # fmt: skip
Kind = Literal["examples", "pairs", "judged"]
READERS = {  # what rows of each kind are, and the objective that reads them
    "examples": ("answers to learn", "sft"),
    "pairs": ("preference pairs", "dpo (or another of pairs)"),
    "judged": ("judged answers", "kto"),
}

# Taori et al. 2023, tatsu-lab/stanford_alpaca, train.py PROMPT_DICT.
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
ALPACA_PAIRED = ", paired with an input that provides further context"

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
}  # fmt: skip
_PAIRS = "learn preference pairs with --objective dpo, or keep the chosen answer as the assistant's"
_TOOLS = "tool calls are not supported; remove these rows"
_MEDIA = "only text is trained; remove these rows"
_REFUSED = {"chosen": _PAIRS, "rejected": _PAIRS, "tools": _TOOLS, "tool_calls": _TOOLS, "functions": _TOOLS,
            "function_call": _TOOLS, "images": _MEDIA, "videos": _MEDIA, "audios": _MEDIA}  # fmt: skip
_MARKS = ("weight", "loss_weight", "train")


@dataclass(frozen=True)
class RowSource:
    """Where a row that `prepare` wrote came from, in the row's field "source": an object of these four, never trained.

    `origin` is the file:line at which it was read, as a row of `format`; `document` marks a stretch of a text file.
    `role` is training, rehearsal or safety. A row that has one is read in that format, so that one file may hold rows
    of several.
    """

    origin: str
    role: str
    format: str
    document: bool = False

    @property
    def file(self) -> str:
        """Return the file of the origin."""
        return self.origin.rpartition(":")[0]


@dataclass(frozen=True)
class Record:
    """One row: a chat (`messages`), `prompt` and `completion`, or `text`; an alpaca row has the first two.

    `origin` is file:line, with "(row N)" where rows share a line. The first `context` messages are never targets.
    `document` marks a whole file of text, which is cut into windows of the maximal length. `unread` names the row's
    fields that are not used. `source` is where a row came from that `prepare` wrote.
    """

    origin: str
    format: str
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    context: int = 0
    document: bool = False
    unread: tuple[str, ...] = ()
    source: RowSource | None = None

    @property
    def sides(self) -> tuple["Record", ...]:
        """Return the records of the row: itself alone (a preference pair has two)."""
        return (self,)


def read_records(
    path: str | Path,
    format: FormatName = "auto",
    columns: dict[str, str] | None = None,
    formats: "dict[str, Format] | None" = None,
) -> list[Any]:
    """Return the records of a file; `columns` maps a field's name here to its name in the file.

    `formats` are those to look for (default: `FORMATS`, whose records are of class Record).
    Raises DataError with file:line for the first row that cannot be used, and how many more there are.
    """
    rows = list(scan_records(path, format, columns, formats))
    errors = [row for row in rows if isinstance(row, RowError)]
    if errors:
        raise DataError(first_of(errors, f": python -m minitune.prepare {path}"))
    return rows


def scan_records(
    path: str | Path,
    format: FormatName = "auto",
    columns: dict[str, str] | None = None,
    formats: "dict[str, Format] | None" = None,
) -> Iterator[Any]:
    """Yield a record, or the RowError that says why not, for each row of a file; raises as `read_rows` does."""
    return (record for _, record in scan_rows(path, format, columns, formats))


def scan_rows(
    path: str | Path,
    format: FormatName = "auto",
    columns: dict[str, str] | None = None,
    formats: "dict[str, Format] | None" = None,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield each row's fields under the names used here, {} where they cannot be read, and what `scan_records` does."""
    formats = formats or FORMATS
    if format != "auto" and format not in formats:
        raise ConfigError(f"unknown format '{format}'{nearest(format, formats)}; known: {', '.join(formats)}")
    is_document = data_path(path).suffix.lower() == ".txt"
    rows, detected = 0, None
    for rows, (origin, fields) in enumerate(read_rows(path), 1):  # noqa: B007
        try:
            if isinstance(fields, RowError):
                raise fields
            fields = _renamed(fields, columns or {}, origin, formats)
            source = row_source(fields)
            if format != "auto":
                chosen = format
            elif source and source.format in formats:
                chosen = source.format
            else:
                chosen = detected = detected or detect_format(fields, origin, formats)
            unread = tuple(
                name for name in _unread(fields, formats[chosen], origin) if not (source and name == "source")
            )
            record = formats[chosen].parse(fields, origin)
            document = is_document or bool(source and source.document)
            yield fields, replace(record, format=chosen, document=document, unread=unread, source=source)
        except RowError as error:
            yield {} if isinstance(fields, RowError) else fields, error
    if not rows:
        raise DataError(f"{path}: no rows; give a file with at least one row")


def row_source(fields: dict[str, Any]) -> RowSource | None:
    """Return where a row came from; None where its field "source" is not one that `prepare` writes, or not there."""
    found = fields.get("source")
    if not isinstance(found, dict) or not {"origin", "role", "format"} <= set(found) <= set(RowSource.__annotations__):
        return None
    texts = all(isinstance(found[name], str) for name in ("origin", "role", "format"))
    return RowSource(**found) if texts and isinstance(found.get("document", False), bool) else None


def detect_format(fields: dict[str, Any], origin: str, formats: "dict[str, Format]") -> str:
    """Return the one format whose required fields are there; raises DataError when none or several fit."""
    fitting = [name for name, known in formats.items() if set(known.required) <= set(fields)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(map(repr, fields)) or "none"
    if fitting:
        raise DataError(f"{origin}: the fields {found} fit {' and '.join(fitting)}; choose one with format")
    required = [field for known in formats.values() for field in known.required]
    telling = {field for known in FORMATS.values() for field in known.required} | _TELLING
    strange = [name for name in fields if name not in telling and nearest(name, required)]
    hints = [f"{nearest(name, required)[:-1]} for '{name}'?" for name in strange]
    known = "; ".join(f"{name}: {', '.join(f.required)}" for name, f in formats.items())
    if (kind := kind_of(fields)) and not hints:
        what, objective = READERS[kind]
        remedy = f"train with --objective {objective}, or give other rows ({known})"
        raise DataError(f"{origin}: the fields {found} are those of {what}; {remedy}")
    raise DataError(
        f"{origin}: the fields {found} fit no format{''.join(hints[:1])}; rename or map them by columns ({known})"
    )


_TELLING = {"chosen", "rejected", "completions", "label"}  # the fields by which the other kinds are told


def kind_of(fields: dict[str, Any]) -> Kind | None:
    """Return what a row is for by its fields alone, or None where no format of any kind fits."""
    if {"chosen", "rejected"} <= set(fields) or "completions" in fields:
        return "pairs"
    fitting = [name for name, known in FORMATS.items() if set(known.required) <= set(fields)]
    if not fitting:
        return None
    marked = str(fields.get("label")).lower() in ("true", "false")
    return "judged" if marked and fitting != ["text"] else "examples"


def file_kind(path: str | Path, columns: dict[str, str] | None = None) -> Kind:
    """Return what a file's first sound row is for; "examples" where that cannot be told."""
    try:
        first = next((fields for _, fields in read_rows(path) if not isinstance(fields, RowError)), {})
    except DataError:
        return "examples"
    renamed = {ours: first[theirs] for ours, theirs in (columns or {}).items() if theirs in first}
    return kind_of(first | renamed) or "examples"


def _renamed(
    fields: dict[str, Any], columns: dict[str, str], origin: str, formats: "dict[str, Format]"
) -> dict[str, Any]:
    """Give the row's fields our names; `columns` is {ours: theirs}."""
    if not columns:
        return fields
    known = {name for one in formats.values() for name in one.fields}
    for ours, theirs in columns.items():
        if ours not in known:
            raise ConfigError(f"columns: unknown field '{ours}'{nearest(ours, known)}")
        if theirs not in fields:
            raise RowError(origin, f"no column '{theirs}'{nearest(theirs, fields)}", "correct columns")
    rest = {name: value for name, value in fields.items() if name not in {*columns, *columns.values()}}
    return rest | {ours: fields[theirs] for ours, theirs in columns.items()}


def _unread(fields: dict[str, Any], format: "Format", origin: str) -> tuple[str, ...]:
    """Return the fields that `format` does not read; refuse those misspelt or that change what a row means."""
    absent = tuple(name for name in format.fields if name not in fields)
    unread = tuple(name for name in fields if name not in format.fields)
    for name in unread:
        if fields[name] and name in _REFUSED:
            raise RowError(origin, f"the field '{name}' is not supported", _REFUSED[name])
        if name == "label" and format is not FORMATS["text"] and str(fields[name]).lower() in ("true", "false"):
            remedy = "train with --objective kto, or keep the good ones without it"
            raise RowError(origin, "the field 'label' marks answers as good or bad", remedy)
        if hint := _misspelt(name, absent):
            raise RowError(origin, f"unknown field '{name}'{hint}", "rename or remove it")
    return unread


# Rows repeat the same few names, and difflib takes longer than all the rest of a row.
_misspelt = functools.lru_cache(maxsize=256)(nearest)


def filled(text: str, what: str, where: str, origin: str) -> str:
    """Return a text that must not be blank."""
    if not text.strip():
        raise RowError(origin, f"a row without {what}", f"fill in {where} or remove the row")
    return text


def text_field(fields: dict[str, Any], name: str, origin: str, *, optional: bool = False) -> str:
    """Return a text field; it must be a string that UTF-8 can hold, without NUL."""
    value = fields.get(name)
    if value is None and optional:
        return ""
    if name not in fields:
        raise RowError(origin, f"the field '{name}' is missing{nearest(name, fields)}", "add it or remove the row")
    if not isinstance(value, str):
        raise RowError(origin, f"the field '{name}' is {type_name(value)}, not text", "write it as a string")
    if "\0" in value:
        raise RowError(origin, f"the field '{name}' holds a NUL character", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        problem = f"the field '{name}' holds half of a surrogate pair"
        raise RowError(origin, problem, "write the whole character") from None
    return value


def read_turns(value: Any, field: str, origin: str) -> list[dict[str, str]]:
    """Return the turns of a chat as role/content messages; `value` is None where the field is missing."""
    if not isinstance(value, list) or not value:
        state = "missing" if value is None else "not a list of turns"
        raise RowError(origin, f"the field '{field}' is {state}", 'write [{"role": ..., "content": ...}]')
    return [_turn(turn, f"{origin} (turn {number})") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, origin: str) -> dict[str, str]:
    """Return one turn as {"role", "content"}; its own marks must agree with what is trained anyway."""
    if not isinstance(turn, dict):
        raise RowError(origin, "a turn that is not an object", 'write {"role": "user", "content": "..."}')
    name = text_field(turn, "from" if "from" in turn else "role", origin)
    if name not in _ROLES:
        raise RowError(origin, f"unknown role '{name}'{nearest(name, _ROLES)}", "use system, user or assistant")
    role, content = _ROLES[name], text_field(turn, "value" if "value" in turn else "content", origin)
    for extra, mark in turn.items():
        if mark and extra in _REFUSED:
            raise RowError(origin, f"the field '{extra}' is not supported", _REFUSED[extra])
        if extra in _MARKS and mark is not None and bool(mark) != (role == "assistant"):
            raise RowError(origin, f"'{extra}' {mark} on a turn of the {role}", "answers are trained, nothing else is")
    if role != "system":
        filled(content, {"user": "a question", "assistant": "an answer"}[role], "the turn", origin)
    return {"role": role, "content": content}


def check_chat(turns: list[dict[str, str]], system: str, origin: str) -> tuple[dict[str, str], ...]:
    """Check the order of a chat: [system], user, assistant, ..., assistant."""
    if system and turns[0]["role"] == "system":
        raise RowError(origin, "a system field beside a system turn", "keep one of them")
    turns = ([{"role": "system", "content": system}] if system else []) + turns
    start = int(turns[0]["role"] == "system")
    for index, turn in enumerate(turns[start:]):
        due = ("user", "assistant")[index % 2]
        if turn["role"] != due:
            place = f"{origin} (turn {index + start + 1 - bool(system)})"
            remedy = "order the turns as [system], user, assistant, user, assistant, ..."
            raise RowError(place, f"roles in the wrong order: {turn['role']} where {due} is due", remedy)
    if turns[-1]["role"] != "assistant":
        raise RowError(origin, "a row without an answer", "end it with an assistant's turn or remove it")
    return tuple(turns)


def _parse_messages(fields: dict[str, Any], origin: str, field: str = "messages") -> Record:
    system = text_field(fields, "system", origin, optional=True)
    return Record(origin, "", messages=check_chat(read_turns(fields.get(field), field, origin), system, origin))


def _parse_sharegpt(fields: dict[str, Any], origin: str) -> Record:
    return _parse_messages(fields, origin, "conversations")


def parse_alpaca(fields: dict[str, Any], origin: str) -> Record:
    """Return the chat and Alpaca's prompt text of an instruction and its output."""
    instruction, output = text_field(fields, "instruction", origin), text_field(fields, "output", origin)
    given, system = (text_field(fields, name, origin, optional=True) for name in ("input", "system"))
    question = filled("\n".join(filter(None, (instruction, given))), "a question", "instruction", origin)
    filled(output, "an answer", "output", origin)
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(origin, "the field 'history' is not a list of pairs", "write [[question, answer], ...]")
    said = [text for pair in history for text in pair] + [question, output]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    messages = check_chat(read_turns(turns, "history", origin), system, origin)
    opening = system or ALPACA_SYSTEM.format(ALPACA_PAIRED if given else "")
    paired = f"\n\n### Input:\n{given}" if given else ""
    prompt = f"{opening}\n\n### Instruction:\n{instruction}{paired}\n\n### Response:"
    return Record(origin, "", messages, None if history else prompt, None if history else output)


def _parse_prompt_completion(fields: dict[str, Any], origin: str) -> Record:
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        asked, answered = (read_turns(fields[name], name, origin) for name in ("prompt", "completion"))
        if answered[0]["role"] != "assistant":
            raise RowError(origin, "a completion that begins with a question", "move that turn to the prompt")
        return Record(origin, "", messages=check_chat(asked + answered, "", origin), context=len(asked))
    prompt, completion = text_field(fields, "prompt", origin), text_field(fields, "completion", origin)
    filled(prompt, "a question", "prompt", origin)
    filled(completion, "an answer", "completion", origin)
    return Record(origin, "", prompt=prompt, completion=completion)


def _parse_text(fields: dict[str, Any], origin: str) -> Record:
    return Record(origin, "", text=filled(text_field(fields, "text", origin), "text", "text", origin))


@dataclass(frozen=True)
class Format:
    """The fields of one format and the function that makes a record of a row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[dict[str, Any], str], Any]

    @property
    def fields(self) -> tuple[str, ...]:
        """Return every field the format reads."""
        return self.required + self.optional


FORMATS = {
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), parse_alpaca),
    "messages": Format(("messages",), ("system",), _parse_messages),
    "sharegpt": Format(("conversations",), ("system",), _parse_sharegpt),
    "prompt_completion": Format(("prompt", "completion"), (), _parse_prompt_completion),
    "text": Format(("text",), (), _parse_text),
}
