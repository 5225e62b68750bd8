"""Leaks between splits: each kind by hand, n-grams against plain sets of tuples, and what must not be called one."""

import itertools
import json
import random
import time

import pytest

from minitune.curation.leakage import Probe, find_leaks, probe, probes_of_set, set_files, shared_grams
from minitune.curation.rows import read_source
from minitune.errors import DataError

WORDS = [f"w{i}" for i in range(4000)]


def text(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def probes(name, texts):
    return [Probe(f"{name}:{i}", one, frozenset([one])) for i, one in enumerate(texts)]


def leaks(**splits):
    return [(leak.kind, leak.row, leak.held_row) for leak in find_leaks([(n, probes(n, t)) for n, t in splits.items()])]


def test_each_kind_is_found_from_the_side_nearer_to_training():
    draw = random.Random(0)
    same, near, passage = text(draw, 30), text(draw, 60).split(), text(draw, 13)
    changed = " ".join([*near[:-1], "other"])  # one shingle of 58 on each side is new: J = 57/59
    train = [text(draw, 40), same, " ".join(near), f"{text(draw, 20)} {passage} {text(draw, 20)}"]
    test = [changed, f"{passage} {text(draw, 15)}", same]
    assert leaks(train=train, test=test) == [
        ("exact", "train:1", "test:2"),
        ("near", "train:2", "test:0"),
        ("n-gram", "train:3", "test:1"),
    ]
    found = find_leaks([("train", probes("train", train)), ("test", probes("test", test))])
    assert [leak.share for leak in found] == [1.0, round(57 / 59, 4), round(1 / 16, 4)]
    assert found[2].passage == passage
    assert leaks(train=[*train[:1]], test=test) == []


def test_a_row_has_one_leak_into_each_later_split_and_none_into_earlier_ones():
    draw = random.Random(1)
    same = text(draw, 20)
    assert leaks(train=[same], validation=[same], test=[same, same]) == [
        ("exact", "train:0", "validation:0"),
        ("exact", "train:0", "test:0"),
        ("exact", "validation:0", "test:0"),
    ]
    both = [("train", probes("train", ["x y z"])), ("one", probes("one", [same])), ("two", probes("two", [same]))]
    assert len(find_leaks(both)) == 1 and find_leaks(both, outer=2) == []


def test_short_texts_need_all_their_words_and_the_shortest_are_only_compared_whole():
    draw = random.Random(2)
    eight, seven = text(draw, 8), text(draw, 7)
    around = [f"{text(draw, 20)} {part} {text(draw, 20)}" for part in (eight, seven)]
    assert leaks(train=around, test=[eight, seven]) == [("n-gram", "train:0", "test:0")]
    assert leaks(train=[eight], test=around) == []  # a held-out text of 48 words shares 8 of them
    twelve = text(draw, 12)
    assert leaks(train=[f"x {twelve} y"], test=[f"{twelve} z"]) == []  # 13 words, of which 12 are shared
    assert leaks(train=[f"x {twelve} z y {text(draw, 30)}"], test=[f"{twelve} z"]) == [("n-gram", "train:0", "test:0")]


def test_a_template_is_no_leak():
    draw = random.Random(3)
    template = text(draw, 15)
    rows = [f"{template} {text(draw, 30)}" for _ in range(24)]
    assert leaks(train=rows[:12], test=rows[12:]) == []
    assert len(leaks(train=rows[:5], test=rows[12:14])) == 5  # in so few rows it may be one passage


def test_a_phrase_in_a_long_text_is_no_leak_but_a_long_passage_is():
    draw = random.Random(6)
    for words, leaked in ((25, False), (26, True)):  # 13 and 14 n-grams
        passage = text(draw, words)
        train, test = f"{passage} {text(draw, 400)}", f"{text(draw, 400)} {passage}"
        assert bool(leaks(train=[train], test=[test])) == leaked
    passage = text(draw, 13)  # one of 20 n-grams and one of 21
    assert leaks(train=[f"x {passage}"], test=[f"{passage} {text(draw, 19)}"])
    assert not leaks(train=[f"x {passage}"], test=[f"{passage} {text(draw, 20)}"])


def test_n_grams_are_those_of_plain_sets():
    draw = random.Random(4)
    few = ["t0", "t1"]  # two words: many n-grams meet by chance

    def grams(one, n):
        words = one.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    train = [" ".join(draw.choices(few, k=draw.randint(5, 30))) for _ in range(200)]
    test = [" ".join(draw.choices(few, k=draw.randint(5, 30))) for _ in range(200)]
    length = [13 if len(one.split()) >= 13 else len(one.split()) for one in test]
    common = set()
    for side in (train, test):
        for n in range(8, 14):
            counts: dict = {}
            for one in side:
                for gram in grams(one, n):
                    counts[gram] = counts.get(gram, 0) + 1
            common |= {gram for gram, count in counts.items() if count > 10}
    expected = {}
    for j, one in enumerate(train):
        for i, held in enumerate(test):
            shared = (grams(held, length[i]) & grams(one, length[i])) - common if length[i] >= 8 else set()
            if shared:
                share = len(shared) / (len(held.split()) - length[i] + 1)
                expected[j] = max(expected.get(j, 0), share)
    found = shared_grams(train + test, [0] * 200 + [1] * 200)
    assert len(expected) > 20
    assert {j: share for _, j, share, _ in found} == pytest.approx(expected)
    for i, j, _, passage in found:
        assert passage in test[i - 200] and passage in train[j]


def test_rows_are_compared_without_their_system_prompt_and_by_question_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "S " * 30}, {"role": "user", "content": "Why?  "}]
    path.write_text(json.dumps({"messages": [*turns, {"role": "assistant", "content": "So."}]}))
    (row,), _ = read_source(str(path), "training")
    assert probe(row.record) == Probe(f"{path}:1", "Why?  \nSo.", frozenset({"why?", "why? so."}))


def test_evaluation_sets_of_any_shape_are_read(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"question": "What is the  Answer?", "choices": ["yes", "no"], "label": 1},
            {"turns": [{"role": "system", "content": "be nice"}, {"role": "user", "content": "A b C"}]}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (one, two), broken = probes_of_set(set_files(str(path)))
    assert broken == 1
    assert one.keys == {"what is the answer?", "what is the answer? yes no"}
    assert two.keys == {"a b c"} and "nice" not in two.text
    lines = tmp_path / "set.txt"
    lines.write_text("one two three\n\nfour five six\n")
    assert [found.origin for found in probes_of_set([lines])[0]] == [f"{lines}:1", f"{lines}:3"]
    assert set_files(str(tmp_path)) == [path, lines]
    (tmp_path / "bad.csv").write_text("a,b\n1,2,3\n")
    with pytest.raises(DataError, match="bad.csv: no row that can be read"):
        probes_of_set(set_files(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data file in this folder"):
        set_files(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no such file"):
        probes_of_set(set_files(str(tmp_path / "none.jsonl")))


@pytest.mark.real
def test_a_hundred_thousand_rows_take_less_than_a_minute_of_one_core():
    draw = random.Random(5)
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(WORDS))))
    texts = [" ".join(draw.choices(WORDS, cum_weights=weights, k=draw.randint(20, 100))) for _ in range(100_000)]
    for k in range(100):  # passages of 20 words out of training rows
        texts[90_000 + k] += " " + " ".join(texts[k].split()[:20])
    parts = {"train": texts[:80_000], "validation": texts[80_000:90_000], "test": texts[90_000:]}
    splits = [(name, probes(name, part)) for name, part in parts.items()]
    began = time.process_time()
    found = find_leaks(splits)
    assert time.process_time() - began < 60
    assert {f"train:{k}" for k in range(100)} <= {leak.row for leak in found}


def test_texts_without_words_are_no_leak():
    assert leaks(train=["?!", "", "a"], test=["", "..."]) in ([], [("exact", "train:1", "test:0")])
