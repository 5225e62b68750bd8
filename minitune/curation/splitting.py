"""Which rows are trained on and which are kept for measuring: by hash alone, or by labels and groups too.

Rows come in units that are never parted: rows that ask the same thing or, on request, rows that share the value of a
field (a patient, a customer, a book). Alone, a unit's split is its hash (`data.splits`): it depends on no other row,
and sizes are only near their shares. With labels, or where sizes are to be met, units are dealt instead:

    in order of falling size, then of their hash, each unit goes to the split for which
        sum over labels of  c(label) need(split, label) / n(label)      is greatest
    need(split, label) = share(split) n(label) - rows of that label that the split has

c counts the unit's rows by label, n all rows by label. Only splits that lack rows in all are looked at, so sizes are
met where units are single rows, and each label is then within a row or two of its share; of larger units the rule is
the best effort that the report shows. (The sum is the fall of the squared distance from the wanted counts, each label's
over its size: Sechidis et al. 2011 deal by the rarest label alone, which has no answer for a group of several.) The
order of rows changes nothing, as ties fall to the hash; rows that are added later may move others, which with the hash
alone they never do.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minitune.curation.rows import Row
from minitune.data.batching import apportion
from minitune.data.reading import RowError, first_of
from minitune.data.splits import hash_point, normalise, question_key, split_by_hash
from minitune.errors import ConfigError, DataError, counted, nearest

PREPARED = "prepare"  # before what is hashed: a validation_fraction of what is written is to be one of all questions
ANSWER = "answer"  # as a label: what the row answers, whatever its field is called


def fractions_of(shares: Sequence[float], names: Sequence[str] = ("train", "validation", "test")) -> dict[str, float]:
    """Return the shares by split, without those of 0. Raises ConfigError unless they are shares and train has one."""
    if len(shares) != len(names):
        raise ConfigError(f"split {list(shares)}: give {len(names)} shares, of {', '.join(names)}")
    if not all(0 <= share <= 1 for share in shares) or not shares[0] or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"split {list(shares)}: shares are from 0 to 1, that of train is above 0, their sum is 1")
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True) if share}


def split_rows(
    rows: Sequence[Row],
    fractions: Mapping[str, float],
    seed: int,
    *,
    group: str | None,
    stratify: str | None,
    exact: bool,
) -> dict[str, list[Row]]:
    """Return the rows of each split, in their order.

    Raises ConfigError or DataError where a field is missing or no label, and where a split would be empty.
    """
    keys = [question_key(row.record) for row in rows] if group is None else field_values(rows, group, "group")
    keys = [f"{PREPARED} {key}" for key in keys]
    if stratify is None and not exact:
        parts = split_by_hash(range(len(rows)), dict(fractions), seed, keys.__getitem__)
    else:
        labels = [""] * len(rows) if stratify is None else checked_labels(rows, stratify)
        parts = deal(keys, labels, fractions, seed)
    empty = next((name for name, part in parts.items() if not part), None)
    if empty:
        units = counted(len(set(keys)), "different question" if group is None else f"value of {group}"[:60])
        raise DataError(f"{empty} would be empty: {counted(len(rows), 'row')}, {units}; give more rows, {_REMEDY}")
    return {name: [rows[i] for i in part] for name, part in parts.items()}


_REMEDY = "meet the sizes with --exact_sizes, or leave that split out with a share of 0 in --split"


def deal(keys: Sequence[str], labels: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Return the rows' numbers by split, in order, by the rule at the top: units of equal key, with their labels."""
    units: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        units.setdefault(key, []).append(i)
    sizes = Counter(labels)
    need = {name: {label: share * size for label, size in sizes.items()} for name, share in shares.items()}
    lacking = dict(zip(shares, apportion(len(keys), list(shares.values())), strict=True))
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for key in sorted(units, key=lambda key: (-len(units[key]), hash_point(key, seed), key)):
        counts = Counter(labels[i] for i in units[key])
        open_parts = [name for name in shares if lacking[name] > 0]

        def gain(name: str, counts: Counter = counts) -> tuple[float, int]:
            return sum(count * need[name][label] / sizes[label] for label, count in counts.items()), lacking[name]

        best = max(open_parts, key=gain)
        parts[best] += units[key]
        lacking[best] -= len(units[key])
        for label, count in counts.items():
            need[best][label] -= count
    return {name: sorted(part) for name, part in parts.items()}


def field_values(rows: Sequence[Row], field: str, option: str) -> list[str]:
    """Return the value of a field in every row as text; DataError where a row has none, or one that is no value."""
    errors, values = [], []
    for row in rows:
        value = row.fields.get(field)
        if value is None or value == "":
            hint = "" if field in row.fields else nearest(field, row.fields) or f": it has {', '.join(row.fields)}"
            remedy = f"fill it in, or choose another field for --{option}{hint}"
            errors.append(RowError(row.origin, f"no value in the field '{field}'", remedy))
        elif not isinstance(value, str | int | float):
            remedy = f"--{option} takes texts and numbers"
            errors.append(RowError(row.origin, f"the field '{field}' holds more than one value", remedy))
        else:
            values.append(str(value))
    if errors:
        raise DataError(first_of(errors))
    return values


def labels_of(rows: Sequence[Row], stratify: str) -> list[str]:
    """Return each row's label, of a field or its answer."""
    return [answer_of(row) for row in rows] if stratify == ANSWER else field_values(rows, stratify, "stratify")


def checked_labels(rows: Sequence[Row], stratify: str) -> list[str]:
    """Return `labels_of` the rows; ConfigError where most of them have one of their own."""
    labels = labels_of(rows, stratify)
    counts = Counter(labels)
    alone = sum(count for count in counts.values() if count < 3)
    if 2 * alone > len(rows):
        found = f"{counted(len(counts), 'different value')} in {counted(len(rows), 'row')}"
        raise ConfigError(
            f"stratify {stratify}: {found} are no labels; choose a field with few values, or leave it out"
        )
    return labels


def answer_of(row: Row) -> str:
    """Return a row's answer as a label, without case and outer space; a judged row's verdict. Texts have none."""
    record = row.record
    if getattr(record, "desirable", None) is not None:
        return str(record.desirable).lower()
    if record.sides[1:] or record.sides[0].text is not None:
        kind = "a pair of answers" if record.sides[1:] else "a text without an answer"
        raise DataError(f"{row.origin}: {kind} has no label; name a field with --stratify")
    return normalise(last_answer(record.sides[0]))


def last_answer(record: Any) -> str:
    """Return the text of a record's last answer."""
    return record.messages[-1]["content"] if record.messages is not None else record.completion


def label_table(parts: Mapping[str, Sequence[Row]], stratify: str) -> list[dict[str, Any]]:
    """Return for each label its rows in each split: [{"label": "positive", "train": 80, ...}], most rows first."""
    counts = {name: Counter(labels_of(rows, stratify)) for name, rows in parts.items()}
    total = sum(counts.values(), Counter())
    return [{"label": label} | {name: counts[name][label] for name in parts} for label, _ in total.most_common()]
