"""Splits and duplicates: equal rows stay together, and no row's split depends on another."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.formats import Record, read_records
from minitune.data.splits import deduplicate, duplicates, normalise, question_key, row_parts, split_by_hash
from minitune.errors import ConfigError

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@pytest.mark.parametrize(
    ("one", "other"),
    [("Ｆｕｌｌ width", "full width"), ("Straße", "STRASSE"), (" a\t b\n", "a b"), ("ﬁne", "FINE"), ("é", "e\u0301"),
     ("\U0001d400", "a"), ("\u01f0", "J\u030c")],  # NFKC gives what casefold still changes, and the other way
)  # fmt: skip
def test_normalise_ignores_what_readers_do_not_see(one, other):
    assert normalise(one) == normalise(other)
    assert normalise(normalise(one)) == normalise(one)


def test_normalise_keeps_what_differs():
    assert len({normalise(text) for text in ("a b", "ab", "a.b", "á")}) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=30), st.integers(0, 5))
def test_split_keeps_equals_together_and_ignores_other_rows(texts, seed):
    parts = split_by_hash(texts, FRACTIONS, seed, key=normalise)
    assert sorted(sum(parts.values(), [])) == sorted(texts)
    where = {normalise(text): name for name, part in parts.items() for text in part}
    for name, part in parts.items():
        assert all(where[normalise(text)] == name for text in part)
    for text in texts:
        alone = split_by_hash([text], FRACTIONS, seed, key=normalise)
        assert alone[where[normalise(text)]] == [text]


def test_split_sizes_are_near_the_fractions_and_depend_on_the_seed():
    items = [f"row {i}" for i in range(10_000)]
    parts = split_by_hash(items, FRACTIONS, 0, key=normalise)
    # binomial: the standard deviation of a part of 0.1 is 30 rows
    assert abs(len(parts["test"]) - 1000) < 150 and abs(len(parts["validation"]) - 1000) < 150
    assert parts["test"] != split_by_hash(items, FRACTIONS, 1, key=normalise)["test"]
    assert [item for item in items if item in set(parts["test"])] == parts["test"]


@pytest.mark.parametrize("fractions", [{}, {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}])
def test_fractions_must_make_a_whole(fractions):
    with pytest.raises(ConfigError, match="must be above 0 and together they must be 1"):
        split_by_hash([], fractions, 0)


def test_rows_that_ask_the_same_share_a_split(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": answer} for i in range(50) for answer in ("yes", "no")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = split_by_hash(read_records(tmp_path / "a.jsonl"), FRACTIONS, 0)
    assert all(len(part) % 2 == 0 for part in parts.values())
    questions = [{record.prompt for record in part} for part in parts.values()]
    assert not questions[0] & questions[1] | questions[0] & questions[2] | questions[1] & questions[2]


def test_question_and_text_of_each_kind():
    turns = [("system", "user"), ("user", "Ask"), ("assistant", "b")]
    chat = Record("a:1", "messages", messages=tuple({"role": r, "content": c} for r, c in turns))
    assert question_key(chat) == "ask"
    assert question_key(Record("a:1", "prompt_completion", prompt="Ask", completion="b")) == "ask"
    assert question_key(Record("a:1", "text", text="All")) == "all"
    one = Record("a:1", "prompt_completion", prompt="a b", completion="c")
    other = Record("a:2", "prompt_completion", prompt="a", completion="b c")
    assert row_parts(one) != row_parts(other)


def test_duplicates_name_the_first():
    assert duplicates(["a", "b", "a", "c", "b", "a"]) == [(2, 0), (4, 1), (5, 0)]
    records = [Record(f"a:{i}", "text", text=text) for i, text in enumerate(["One", "two", "ONE ", "one"])]
    assert [record.origin for record in deduplicate(records)] == ["a:0", "a:1"]
