"""Rows out of files: bytes -> (origin, fields), where an origin is "file:line".

Every row keeps the line it starts on, so that any later complaint can point at it. For that a JSON array is
walked element by element instead of by one `json.load`, which forgets positions; where its rows share a line,
the origin is "file:line (row N)", N counting from 1 in the array. So each row has its own. A row that is broken is
yielded as an error and the reading goes on where it can; a file that cannot be read at all raises. The
`datasets` library was rejected: it guesses types, caches on disk and loses the line numbers.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from minitune.errors import DataError, counted, nearest, type_name
from minitune.sources import read_manifest, resolve

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
_SPACE = re.compile(r"[ \t\r\n]*")


class RowError(DataError):
    """A row that cannot be used: `origin` is its file:line, `problem` the kind, the same for all such rows."""

    def __init__(self, origin: str, problem: str, remedy: str):
        """Build the line from its three parts."""
        super().__init__(f"{origin}: {problem}; {remedy}")
        self.origin, self.problem, self.remedy = origin, problem, remedy


def first_of(errors: list[RowError], hint: str = "") -> str:
    """Return the line of the first error with the number of the others, and a hint on where to see them."""
    more = f" ({counted(len(errors) - 1, 'more such row')}{hint})" if errors[1:] else ""
    return f"{errors[0]}{more}"


class _RepeatedField(ValueError):
    """A JSON object gives one field twice; Python would silently keep the last."""


def data_path(path: str | Path) -> Path:
    """Return the file of a data set that is known by name, as `python -m minitune.fetch` does; else the path itself.

    Raises CheckpointError, naming the command that fetches it, where that has not been done.
    """
    name = str(path)
    if Path(path).exists() or "/" in name:  # a path is never a name, and may be missing without a manifest
        return Path(path)
    entries = read_manifest()
    known = {*entries, *(file.name for entry in entries.values() for file in entry.files)}
    return resolve(name) if name in known else Path(path)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict | RowError]]:
    """Yield (origin, fields) for each row of a JSONL, JSON, CSV, TSV or text file; a broken row is a RowError.

    The path may be a name, as `data_path` has it. A .txt file is one row with the field "text". JSON arrays and JSON
    lines are told apart by their first character, not by their name. Blank lines are skipped, a UTF-8 byte-order mark
    is accepted. Raises DataError for what spoils the whole file: missing, a folder, empty, a pickle, unknown kind, not
    UTF-8, NUL bytes.
    """
    path = data_path(path)
    suffix = _checked_suffix(path)
    text = _decode(str(path), path.read_bytes())
    if suffix == ".txt":
        return iter([(f"{path}:1", {"text": text})])
    if suffix in (".csv", ".tsv"):
        return _csv_rows(str(path), text, "\t" if suffix == ".tsv" else ",")
    if text.lstrip().startswith("["):
        return _json_array(str(path), text)
    return _json_lines(str(path), text)


def _checked_suffix(path: Path) -> str:
    """Return the suffix of a file that may be opened, or say why it may not."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the data files in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, beside) or '; check the path'}")
    if suffix in _PICKLES:
        raise DataError(f"{path}: pickle files can run code when opened and are refused; export the rows as JSONL")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file '{suffix}'; give one of {', '.join(SUFFIXES)}")
    return suffix


def _decode(path: str, data: bytes) -> str:
    """Return the text of UTF-8 bytes without byte-order mark; name the line of the first byte that is not."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    body = data.removeprefix(codecs.BOM_UTF8)
    if not body.strip():
        raise DataError(f"{path}: the file is empty; give a file with at least one row")
    if (nul := body.find(b"\0")) >= 0:
        raise DataError(f"{path}:{body.count(10, 0, nul) + 1}: NUL byte; this is not a UTF-8 text file, convert it")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        offset = error.start + len(data) - len(body)
        raise DataError(
            f"{path}:{line}: byte {body[error.start]:#04x} at offset {offset} is not UTF-8; save the file as UTF-8"
        ) from None


def _json_lines(path: str, text: str) -> Iterator[tuple[str, dict | RowError]]:
    """Yield one row per line; only "\\n" ends a line, as JSON strings may hold U+2028 and its like."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields, end = _json_value(line, _SPACE.match(line).end(), path, number)
            if line[end:].strip():
                fields = _broken(path, number, "text after the object")
        except RowError as error:
            fields = error
        yield f"{path}:{number}", fields


def _json_array(path: str, text: str) -> Iterator[tuple[str, dict | RowError]]:
    """Yield the elements of one JSON array; what is broken ends it, for there is no telling where to go on."""
    position, seen, line, last = text.index("[") + 1, 0, 1, 0
    one_line = "\n" not in text.strip()
    try:
        for row in itertools.count(1):
            position = _SPACE.match(text, position).end()
            line += text.count("\n", seen, position)
            seen = position
            if text.startswith("]", position):
                break
            mark = f" (row {row})" if one_line or line == last else ""
            fields, position = _json_value(text, position, path, line, mark)
            yield f"{path}:{line}{mark}", fields
            last = line
            position = _SPACE.match(text, position).end()
            if text.startswith(",", position):
                position += 1
            elif not text.startswith("]", position):
                raise _broken(path, line + text.count("\n", seen, position), "no ',' or ']' after a row", mark)
        if text[position + 1 :].strip():
            raise _broken(path, line, "text after the array's ']'")
    except RowError as error:
        yield error.origin, error


def _json_value(text: str, start: int, path: str, line: int, mark: str = "") -> tuple[dict | RowError, int]:
    """Return the JSON object at `start`, on `line` (an error when it is no plain object), and where it ends."""
    origin = f"{path}:{line}{mark}"
    try:
        value, end = _STRICT.raw_decode(text, start)
    except _RepeatedField as error:
        _, end = _LOOSE.raw_decode(text, start)
        return RowError(origin, f"the field '{error}' is given twice", "keep one of them"), end
    except json.JSONDecodeError as error:
        raise _broken(path, line + text.count("\n", start, error.pos), error.msg, mark) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise _broken(path, line, str(error), mark) from None
    if not isinstance(value, dict):
        problem = f"a row that is {type_name(value)}, not an object"
        return RowError(origin, problem, 'write rows like {"instruction": ..., "output": ...}'), end
    return value, end


def _broken(path: str, line: int, what: str, mark: str = "") -> RowError:
    """Return the error for JSON that stops making sense on `line`, in the row of that `mark`."""
    remedy = "write one array of objects, or one whole object per line"
    return RowError(f"{path}:{line}{mark}", f"broken JSON ({what})", remedy)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object, refusing a field that is given twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedField(next(name for name in names if names.count(name) > 1))
    return fields


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
_LOOSE = json.JSONDecoder()


def _csv_rows(path: str, text: str, delimiter: str) -> Iterator[tuple[str, dict | RowError]]:
    """Yield the rows under a CSV header; a field may be as large as the file."""
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        lines, cells = [1], []
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            cells.append(row)
            lines.append(reader.line_num + 1)
    except csv.Error as error:
        raise DataError(
            f"{path}:{lines[-1]}: broken CSV ({error}); quote fields that hold quotes, commas or line ends"
        ) from None
    finally:
        csv.field_size_limit(limit)
    header = cells[0]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:1: the column '{twice}' is given twice; rename one of them")
    for line, row in zip(lines[1:], cells[1:], strict=False):
        origin = f"{path}:{line}"
        if len(row) == len(header):
            yield origin, dict(zip(header, row, strict=True))
        elif row:
            problem = f"a CSV row of {counted(len(row), 'cell')} under a header of {len(header)}"
            yield origin, RowError(origin, problem, "quote fields that hold commas or line ends")
