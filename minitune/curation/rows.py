"""Rows on their way through `prepare`: what was read, its fields as they will be written, and where it came from.

What is written has the fields that were read, under the names used here, and beside them the field "source"
(`data.formats.RowSource`), so that reading it again gives the same records and with them the same tokens. Rebuilding
rows from records was rejected: an Alpaca row is both a chat and a text, and only its own fields say so.

A text file is a row of its paragraphs: what empty lines part or, in a file without any, its lines. Neighbours that end
up in one split are joined again as they stood; each such stretch is cut into windows as the whole file would have been.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from minitune.data.formats import FormatName, Kind, RowSource, scan_rows
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.reading import RowError

_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")
_PARAGRAPH = re.compile(r"\s*\S.*?(?:\n[^\S\n]*\n\s*|\Z)", re.DOTALL)
_LINE = re.compile(r"\s*\S[^\n]*(?:\n\s*|\Z)")
TRAINING, REHEARSAL, SAFETY = "training", "rehearsal", "safety"


@dataclass(frozen=True)
class Row:
    """One row; `place` is the number of a paragraph in its text file, None for other rows."""

    record: Any
    fields: dict[str, Any]
    source: RowSource
    place: int | None = None

    @property
    def origin(self) -> str:
        """Return file:line of where the row was read now, which for a prepared file is not its source."""
        return self.record.origin


def read_source(
    path: str, role: str, *, format: FormatName = "auto", columns: dict[str, str] | None = None, kind: Kind = "examples"
) -> tuple[list[Row], list[tuple[RowError, dict[str, Any]]]]:
    """Return a file's rows, and for each that cannot be used why not and its fields; raises as `read_records` does.

    A row that an earlier `prepare` wrote keeps the source that it has, and its role where the new one is training.
    """
    rows, broken = [], []
    for fields, record in scan_rows(path, format, columns, FORMATS_OF[kind]):
        if isinstance(record, RowError):
            broken.append((record, fields))
        elif record.document and record.source is None:
            rows += _paragraphs(record, role)
        else:
            source = record.source or RowSource(record.origin, role, record.format)
            rows.append(Row(record, fields, source if role == TRAINING else replace(source, role=role)))
    return rows, broken


def _paragraphs(record: Any, role: str) -> Iterator[Row]:
    """Yield the paragraphs of a text file, each with the white space after it: together they are the whole text."""
    path, text, line = record.origin.rpartition(":")[0], record.text, 1
    parted = _EMPTY_LINE.search(text.strip())
    for place, match in enumerate((_PARAGRAPH if parted else _LINE).finditer(text)):
        origin = f"{path}:{line}"
        line += match[0].count("\n")
        part = replace(record, origin=origin, text=match[0])
        yield Row(part, {"text": match[0]}, RowSource(origin, role, record.format, document=True), place)


def joined(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with neighbouring paragraphs of one text file as one row."""
    result: list[Row] = []
    for row in rows:
        last = result[-1] if result else None
        near = last is not None and row.place is not None and last.place is not None and row.place == last.place + 1
        if near and row.source.file == last.source.file:
            text = last.record.text + row.record.text
            result[-1] = replace(last, record=replace(last.record, text=text), fields={"text": text}, place=row.place)
        else:
            result.append(row)
    return result


def changed(row: Row, change: Callable[[str], str], kind: Kind) -> Row:
    """Return the row with `change` applied to each text that is read of it; RowError where it cannot be read then."""
    format = FORMATS_OF[kind][row.record.format]
    fields = {name: _mapped(value, change) if name in format.fields else value for name, value in row.fields.items()}
    parsed = format.parse(fields, row.origin)
    kept = {name: getattr(row.record, name) for name in ("format", "document", "unread", "source")}
    return replace(row, record=replace(parsed, **kept), fields=fields)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with its texts changed, but for the names of roles."""
    if isinstance(value, dict):
        return {name: inner if name in ("role", "from") else _mapped(inner, change) for name, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def line_of(row: Row) -> str:
    """Return the row as a line of JSON; a field "source" of its own is kept as "own_source"."""
    fields = dict(row.fields)
    if "source" in fields and row.record.source is None:
        fields["own_source"] = fields["source"]
    source = {name: value for name, value in asdict(row.source).items() if value is not False}
    return json_line(fields | {"source": source})


def json_line(content: dict[str, Any]) -> str:
    """Return an object as a line of JSON; where half a character stands in a field that is not read, in ASCII."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(content)
    return line + "\n"
