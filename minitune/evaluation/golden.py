"""A golden set: rows that a model has to get right, each with what is expected of its answer.

    {"prompt": "2 + 2 = ?", "expect": {"contains": "4", "not_contains": ["five", "sorry"]}, "tags": ["maths"]}

| expectation  | holds where                                                                            |
|--------------|----------------------------------------------------------------------------------------|
| exact        | the answer is the text, or one of several, but for white space around it               |
| contains     | the text, or every one of several, is in the answer                                    |
| not_contains | none of them is                                                                        |
| regex        | the pattern, or every one of several, is found in the answer (^...$ for the whole)     |
| schema       | the answer is JSON that the schema (an object here, or a file's name) accepts          |
| judge        | a judge says that the answer does what the text asks for                               |

All that a row expects must hold. Upper and lower case differ. An answer that was cut off can only contain: more would
have followed, so nothing else is known of it, and it does not hold; nor does an empty one. Where a judge gives no
verdict the row is not passed, and counted apart. Patterns are searched in a process that is ended after some seconds
(those inside a schema are not). Partial credit was rejected: a golden set is a contract.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.formats import Record
from minitune.data.prompts import parse_prompt
from minitune.data.reading import RowError, data_path, first_of, read_rows
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError, nearest, type_name
from minitune.evaluation.answers import shown_prompt
from minitune.evaluation.compliance import answer_form, json_test, schema_test
from minitune.evaluation.judging import Ask
from minitune.evaluation.patterns import check_pattern, found_in
from minitune.evaluation.text_metrics import exact_match
from minitune.evaluation.verdicts import Missing, pass_question, read_verdict

EXPECTATIONS = ("exact", "contains", "not_contains", "regex", "schema", "judge")
_FIELDS = ("id", "tags", "expect", "prompt", "messages", "system")
CUT_OFF = "was cut off"


@dataclass(frozen=True)
class Row:
    """A row of a golden set: what is asked, and what is expected, texts in a list each.

    `schema` is the test of an answer, where the row has one.
    """

    id: str
    record: Record
    texts: dict[str, list[str]]
    schema: Callable[[str], bool] | None = None
    judge: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Whether an answer holds, why it does not, whether a judge was asked, and gave no verdict."""

    passed: bool
    reasons: tuple[str, ...] = ()
    judged: bool = False
    no_verdict: bool = False


def read_golden(path: str | Path) -> list[Row]:
    """Return the rows of a golden set.

    Raises DataError with file:line for the first row that is malformed (unknown key or expectation, one of a wrong
    type, a broken pattern or schema, an id given twice), and how many more there are.
    """
    path = data_path(path)
    rows: list[Row] = []
    errors, ids = [], {}
    for origin, fields in read_rows(path):
        try:
            if isinstance(fields, RowError):
                raise fields
            row = _row(fields, origin, path)
            if row.id in ids:
                raise RowError(origin, f"the id {row.id!r} is that of {ids[row.id]} too", "give each row its own")
            ids[row.id] = origin
            rows.append(row)
        except RowError as error:
            errors.append(error)
    if errors:
        raise DataError(first_of(errors))
    if not rows:
        raise DataError(f"{path}: no rows; give a file with at least one row")
    return rows


def _row(fields: dict[str, Any], origin: str, path: Path) -> Row:
    for name in fields:
        if name not in _FIELDS:
            remedy = f"a golden row has {', '.join(_FIELDS)}"
            raise RowError(origin, f"unknown key '{name}'{nearest(name, _FIELDS)}", remedy)
    if ("prompt" in fields) == ("messages" in fields):
        raise RowError(origin, "a row needs one of 'prompt' and 'messages'", "write what is asked in one of them")
    turns = fields.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        raise RowError(origin, "the last message is the assistant's", "leave the answer out: it is what is tested")
    tags = _texts(fields.get("tags", []), "tags", origin)
    name = fields.get("id", origin.rpartition("/")[2])
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise RowError(origin, f"the id is {name!r}", "write a text or a whole number")
    return Row(str(name), parse_prompt(fields, origin), **_expected(fields.get("expect"), origin, path), tags=(*tags,))


def _expected(found: Any, origin: str, path: Path) -> dict[str, Any]:
    """Return the fields `texts`, `schema` and `judge` of a row."""
    if not isinstance(found, dict) or not found:
        remedy = 'write {"contains": "..."} or another of ' + ", ".join(EXPECTATIONS)
        raise RowError(origin, f"'expect' is {'empty' if found == {} else type_name(found)}", remedy)
    for name in found:
        if name not in EXPECTATIONS:
            hint = nearest(name, EXPECTATIONS)
            raise RowError(origin, f"unknown expectation '{name}'{hint}", f"known: {', '.join(EXPECTATIONS)}")
    texts = {name: _texts(found[name], name, origin) for name in EXPECTATIONS[:4] if name in found}
    for name, values in texts.items():
        if not values:
            raise RowError(origin, f"'{name}' is an empty list", "write at least one text")
    try:
        for pattern in texts.get("regex", ()):
            check_pattern(pattern)
        schema = _schema(found["schema"], origin, path) if "schema" in found else None
    except (ConfigError, OSError) as error:
        problem, _, remedy = str(error).rpartition("; ")
        raise RowError(origin, f"an expectation that cannot be tested ({problem or remedy})", "correct it") from None
    judge = found.get("judge")
    if "judge" in found and (not isinstance(judge, str) or not judge.strip()):
        raise RowError(origin, "'judge' is no text", "write what a good answer does")
    return {"texts": texts, "schema": schema, "judge": judge}


def _texts(value: Any, name: str, origin: str) -> list[str]:
    """Return a text or a list of texts as a list; an empty text would always or never hold."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
        raise RowError(origin, f"'{name}' is neither a text nor a list of texts, none of them empty", "correct it")
    return values


def _schema(value: Any, origin: str, path: Path) -> Callable[[str], bool]:
    """Return the test of a schema that stands in the row, or in a file beside the golden set."""
    if isinstance(value, str):
        return answer_form(f"json:{path.parent / value}")
    if not isinstance(value, dict):
        raise ConfigError(f"the schema is {type_name(value)}, not an object or a file's name")
    return json_test(schema_test(value, origin))


def check(rows: Sequence[Row], replies: Sequence[Reply], judge: Ask | None = None) -> list[Checked]:
    """Return for each row whether its answer holds.

    Args:
        rows: the golden set.
        replies: an answer to each row.
        judge: answers questions; only rows that expect a judge's verdict and hold otherwise are asked about.

    Raises DataError where a pattern runs for too long.
    """
    searched = [(i, pattern) for i, row in enumerate(rows) for pattern in row.texts.get("regex", ())]
    pairs, origins = (
        [(pattern, replies[i].text) for i, pattern in searched],
        [rows[i].record.origin for i, _ in searched],
    )
    hits = dict(zip(searched, found_in(pairs, origins), strict=True))
    reasons = [
        _reasons(row, reply, {pattern: hits[i, pattern] for pattern in row.texts.get("regex", ())})
        for i, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    checked = [Checked(not found, found) for found in reasons]
    judged = [i for i, row in enumerate(rows) if row.judge is not None and not reasons[i]]
    if judged and judge is None:
        raise ConfigError(
            f"{rows[judged[0]].record.origin} expects a judge's verdict; name a judge, as --judge.model M"
        )
    asked = [pass_question(shown_prompt(rows[i].record), replies[i].text, rows[i].judge) for i in judged]
    for i, reply in zip(judged, judge(asked) if judged else (), strict=True):
        checked[i] = _verdict(reply)
    return checked


def _verdict(reply: Reply | Missing) -> Checked:
    found = reply if isinstance(reply, Missing) else read_verdict(reply, ("PASS", "FAIL"))
    if isinstance(found, Missing):
        return Checked(False, (f"no verdict of the judge: {found.kind}",), judged=True, no_verdict=True)
    passed = found == "PASS"
    return Checked(passed, () if passed else (f"judge: {' '.join(reply.text.split())[:200]}",), judged=True)


def _reasons(row: Row, reply: Reply, hits: dict[str, bool]) -> tuple[str, ...]:
    """Return why an answer does not hold, as far as that can be said without a judge; `hits` are its patterns'."""
    text, wanted = reply.text, row.texts
    if not text.strip():
        return ("is empty",)
    found = [f"lacks {part!r}" for part in wanted.get("contains", ()) if part not in text]
    if not reply.finished:
        others = {*wanted} - {"contains"} or row.schema or row.judge
        return (*found, *([CUT_OFF] if others else []))
    if "exact" in wanted and not exact_match(text, wanted["exact"]):
        found.append(f"is not {' or '.join(map(repr, wanted['exact']))}")
    found += [f"contains {part!r}" for part in wanted.get("not_contains", ()) if part in text]
    found += [f"{pattern!r} is not found" for pattern, hit in hits.items() if not hit]
    if row.schema is not None and not row.schema(text):
        found.append("is not JSON that the schema accepts")
    return tuple(found)
