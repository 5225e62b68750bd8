"""Rows kept apart as a golden set: taken before any split, and written with their answers as what is expected.

A golden row is asked of every version of a model, so it must never be learned: nothing that asks the same stays in any
split, and near duplicates of it leave too (`leakage`). Which rows: the first by hash, dealt by label like a split where
there are labels, or those whose questions a file names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitune.curation.rows import Row
from minitune.curation.splitting import checked_labels, deal, field_values, last_answer
from minitune.data.prompts import read_prompts
from minitune.data.splits import question_key
from minitune.errors import ConfigError, DataError, counted

GOLDEN = "golden"


def take_golden(
    rows: Sequence[Row], wanted: str, seed: int, *, group: str | None, stratify: str | None
) -> tuple[list[Row], list[tuple[Row, str]], list[Row]]:
    """Return the golden rows, those that leave because they ask the same (each with its reason), and the others.

    `wanted` is a number of rows or a file of questions (`data.prompts` says of which shapes). With `group`, whole
    groups are taken, so that the number is met as nearly as they allow; what else is of a group of theirs (rows that
    the file does not name, answers judged bad) leaves.
    Raises ConfigError for a number that is not below the rows there are, DataError for a question that no row asks.
    """
    usable = [row for row in rows if getattr(row.record, "desirable", None) is not False]
    texts = next((row for row in usable if row.record.sides[0].text is not None), None)
    if texts is not None:
        raise DataError(f"{texts.origin}: a text has no answer to expect; a golden set is for questions with answers")
    if not wanted.isdigit():
        chosen = _named(usable, wanted)
    else:
        chosen = _drawn(usable, int(wanted), seed, group, stratify)
    asked = {question_key(row.record): row for row in reversed(chosen)}
    golden = [row for row in chosen if asked[question_key(row.record)] is row]
    kept, twins = [], []
    taken = {id(row) for row in golden}
    groups = [""] * len(rows) if group is None else field_values(rows, group, "group")
    first = {of: row for of, row in reversed(list(zip(groups, rows, strict=True))) if of and id(row) in taken}
    for row, of in zip(rows, groups, strict=True):
        if id(row) in taken:
            continue
        if twin := asked.get(question_key(row.record)):
            twins.append((row, f"asks what a golden row asks: {twin.origin}"))
        elif twin := first.get(of):
            twins.append((row, f"has the {group} of a golden row: {twin.origin}"))
        else:
            kept.append(row)
    return golden, twins, kept


def _drawn(rows: Sequence[Row], count: int, seed: int, group: str | None, stratify: str | None) -> list[Row]:
    """Return rows of `count` different questions, or the groups that come nearest."""
    if group is None:
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(question_key(row.record), row)
        keys, rows = list(first), list(first.values())
    else:
        keys = field_values(rows, group, "group")
    if not 0 < count < len(rows):
        found = counted(len(rows), "row" if group else "different question")
        raise ConfigError(f"golden is {count}, of {found}; it must be above 0 and leave rows to train on")
    labels = [""] * len(rows) if stratify is None else checked_labels(rows, stratify)
    parts = deal(
        [f"{GOLDEN} {key}" for key in keys], labels, {GOLDEN: count / len(rows), "": 1 - count / len(rows)}, seed
    )
    return [rows[i] for i in parts[GOLDEN]]


def _named(rows: Sequence[Row], path: str) -> list[Row]:
    """Return the rows that ask what a file names."""
    if not Path(path).exists():
        raise ConfigError(f"golden is '{path}', neither a number of rows nor a file; give one of them")
    asked = {question_key(record): record.origin for record in read_prompts(path)}
    chosen = [row for row in rows if question_key(row.record) in asked]
    missing = [origin for key, origin in asked.items() if key not in {question_key(row.record) for row in chosen}]
    if missing:
        more = f" ({counted(len(missing) - 1, 'more such question')})" if missing[1:] else ""
        raise DataError(
            f"{missing[0]}: no row asks this{more}; golden rows are taken out of the data, correct the file"
        )
    return chosen


def golden_line(row: Row, tags: Sequence[str] = ()) -> dict[str, Any]:
    """Return a row as golden sets have them: the question, the exact answer expected (of a pair the chosen one)."""
    record = row.record.sides[0]
    asked = {"prompt": record.prompt} if record.messages is None else {"messages": list(record.messages[:-1])}
    line = {"id": row.source.origin, **asked, "expect": {"exact": last_answer(record)}}
    return line | ({"tags": list(tags)} if tags else {})
