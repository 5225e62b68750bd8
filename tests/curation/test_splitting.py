"""Splits: whole units, sizes and label shares as derived by hand, and nothing that depends on the order of rows."""

import random
from collections import Counter, defaultdict

import pytest

from minitune.curation.rows import Row
from minitune.curation.splitting import deal, fractions_of, label_table, split_rows
from minitune.data.formats import Record, RowSource
from minitune.errors import ConfigError, DataError

THREE = {"train": 0.8, "validation": 0.1, "test": 0.1}


def row(number, question=None, answer="a", **fields):
    record = Record(f"f:{number}", "prompt_completion", prompt=question or f"question {number}", completion=answer)
    return Row(record, fields, RowSource(record.origin, "training", record.format))


def split(rows, fractions=THREE, seed=0, *, group=None, stratify=None, exact=False):
    return split_rows(rows, fractions, seed, group=group, stratify=stratify, exact=exact)


def numbers(parts):
    return {name: sorted(int(one.origin[2:]) for one in rows) for name, rows in parts.items()}


def test_by_hash_a_row_stays_where_it_is_when_others_come_and_go():
    rows = [row(i) for i in range(500)]
    before, after = numbers(split(rows)), numbers(split(rows[:200]))
    for name in THREE:
        assert after[name] == [i for i in before[name] if i < 200]
    # 3 standard deviations of a binomial count: 500 x 0.1 +- 3 x 6.7
    assert 30 <= len(before["test"]) <= 70


def test_rows_that_ask_the_same_share_a_split_whatever_they_answer():
    rows = [row(i, f"  Question {i % 50}?", str(i)) for i in range(200)]
    for options in ({}, {"exact": True}):
        place = {i: name for name, part in numbers(split(rows, **options)).items() for i in part}
        assert all(place[i] == place[i % 50] for i in range(200))


def test_exact_sizes_are_hamiltons():
    # 103 rows: 82.4, 10.3 and 10.3, so 82 + 10 + 10 and the one left to the largest remainder, train's
    parts = numbers(split([row(i) for i in range(103)], exact=True))
    assert {name: len(part) for name, part in parts.items()} == {"train": 83, "validation": 10, "test": 10}
    assert sorted(i for part in parts.values() for i in part) == list(range(103))


def test_labels_have_their_share_in_every_split():
    rows = [row(i, answer="rare" if i % 10 == 0 else "common") for i in range(200)]
    parts = split(rows, stratify="answer")
    table = {entry.pop("label"): entry for entry in label_table(parts, "answer")}
    # 180 and 20 rows: 144, 18, 18 and 16, 2, 2
    assert table == {"common": {"train": 144, "validation": 18, "test": 18},
                     "rare": {"train": 16, "validation": 2, "test": 2}}  # fmt: skip
    # labels that are blind to the rule come out otherwise: this test can fail
    blind = {entry.pop("label"): entry for entry in label_table(split(rows, exact=True), "answer")}
    assert blind["rare"] != table["rare"]


@pytest.mark.parametrize("sizes", [[3] * 100, [5] * 40, [1000, 7, 3, 33], [11, 13, 17, 19, 23]])
def test_each_label_is_within_two_rows_of_its_share_and_sizes_are_met(sizes):
    labels = [f"label {k}" for k, size in enumerate(sizes) for _ in range(size)]
    parts = deal([str(i) for i in range(len(labels))], labels, THREE, seed=3)
    total = len(labels)
    for name, share in THREE.items():
        assert abs(len(parts[name]) - share * total) < 1
    if min(sizes) > 5:
        for name, share in THREE.items():
            counts = Counter(labels[i] for i in parts[name])
            assert all(abs(counts[f"label {k}"] - share * size) < 2 for k, size in enumerate(sizes))


def test_the_order_of_rows_changes_nothing():
    rows = [row(i, f"q {i // 2}", answer="xy"[i % 3 == 0], key=f"k{i // 7}") for i in range(140)]
    mixed = random.Random(1).sample(rows, len(rows))
    for options in (
        {},
        {"exact": True},
        {"stratify": "answer"},
        {"group": "key"},
        {"group": "key", "stratify": "answer"},
    ):
        assert numbers(split(rows, **options)) == numbers(split(mixed, **options))
    assert numbers(split(rows, seed=1)) != numbers(split(rows))


def test_groups_stay_whole_and_labels_come_as_near_as_they_allow():
    draw = random.Random(0)
    rows = []
    for group in range(60):  # some groups lean to one label
        lean = draw.random()
        rows += [
            row(len(rows) + i, answer="yes" if draw.random() < lean else "no", key=group)
            for i in range(draw.randint(1, 20))
        ]
    parts = split(rows, group="key", stratify="answer")
    where = defaultdict(set)
    for name, part in parts.items():
        for one in part:
            where[one.fields["key"]].add(name)
    assert all(len(names) == 1 for names in where.values())
    yes = sum(one.record.completion == "yes" for one in rows) / len(rows)
    for name, share in THREE.items():
        assert abs(len(parts[name]) - share * len(rows)) <= 10  # half of the largest group
        assert abs(sum(one.record.completion == "yes" for one in parts[name]) / len(parts[name]) - yes) < 0.1


def test_a_rare_label_counts_as_much_as_a_common_one():
    # Halves of 100 common and 4 rare rows. The largest group goes to train, the next to test, which then lack 0 and 3
    # common rows, 1 and 0 rare ones. The last: 3 x 0/100 + 1 x 1/4 = 0.25 is more than 3 x 3/100 + 1 x 0/4 = 0.09.
    groups = {"a": ["c"] * 50 + ["r"], "b": ["c"] * 47 + ["r"] * 2, "d": ["c"] * 3 + ["r"]}
    keys = [key for key, labels in groups.items() for _ in labels]
    labels = [label for own in groups.values() for label in own]
    parts = deal(keys, labels, {"train": 0.5, "test": 0.5}, seed=0)
    assert {name: Counter(keys[i] for i in part).keys() for name, part in parts.items()} == {
        "train": {"a", "d"},
        "test": {"b"},
    }


def test_a_label_may_be_a_field_and_a_judgement():
    parts = split([row(i, stars=i % 2) for i in range(40)], {"train": 0.5, "test": 0.5}, stratify="stars")
    assert Counter(one.fields["stars"] for one in parts["train"]) == {0: 10, 1: 10}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.8, 0.1], "give 3 shares"),
        ([0.8, 0.1, 0.2], "their sum is 1"),
        ([1.2, -0.1, -0.1], "shares are from 0 to 1"),
        ([0, 0.5, 0.5], "that of train is above 0"),
        ([float("nan"), 0.5, 0.5], "shares are from 0 to 1"),
    ],
)
def test_shares_that_are_none(shares, message):
    with pytest.raises(ConfigError, match=message):
        fractions_of(shares)
    assert fractions_of([0.9, 0.1, 0]) == {"train": 0.9, "validation": 0.1}


def test_what_rows_do_not_allow_is_one_line():
    rows = [row(1, key="a"), row(2), row(3, key="")]
    with pytest.raises(DataError, match=r"f:2: no value in the field 'key'; .*\(1 more such row\)"):
        split(rows, group="key")
    with pytest.raises(DataError, match="did you mean 'patient'"):
        split([row(1, patient="a")], group="patent")
    with pytest.raises(DataError, match="f:1: the field 'key' holds more than one value"):
        split([row(1, key=["a"])], group="key")
    with pytest.raises(ConfigError, match="stratify answer: 20 different values in 20 rows are no labels"):
        split([row(i, answer=str(i)) for i in range(20)], stratify="answer")
    with pytest.raises(DataError, match="would be empty: 2 rows, 2 different questions"):
        split([row(1), row(2)])
    text = Row(Record("f:1", "text", text="t"), {}, RowSource("f:1", "training", "text"))
    with pytest.raises(DataError, match="a text without an answer has no label"):
        split([text], stratify="answer")
