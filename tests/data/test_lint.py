"""The report on files, counted by hand, and its promise: it finds a problem exactly where training refuses."""

import json

import pytest

from minitune.data.corpus import Encoding, Source, load_corpus
from minitune.data.examples import build_examples
from minitune.data.formats import read_records
from minitune.data.lint import histogram, inspect_files
from minitune.errors import ConfigError, DataError

OPTIONS = {
    "format": "auto", "columns": None, "max_length": 40, "truncate": "error", "train_on": "all",
    "batch_size": 2, "packing": True, "seed": 0,
}  # fmt: skip


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row for row in rows))
    return str(path)


def inspect(files, tokenizer, weights=None, **options):
    report, examples = inspect_files(files, tokenizer, weights=weights or [None] * len(files), **OPTIONS | options)
    json.dumps(report.to_dict())
    return report, examples


def test_counts_of_good_files(tmp_path, tokenizers):
    one = write(tmp_path, "a.jsonl", [
        {"prompt": "What?", "completion": "yes", "id": 1},
        {"prompt": "What?", "completion": "yes"},
        {"prompt": " what? ", "completion": "YES"},
        {"prompt": "WHAT?", "completion": "no"},
    ])  # fmt: skip
    two = write(tmp_path, "b.jsonl", [{"text": "abc"}])
    report, examples = inspect([one, two], tokenizers["plain"])
    assert [(f["format"], f["rows"], f["examples"]) for f in report.files] == [
        ("prompt_completion", 4, 4),
        ("text", 1, 1),
    ]
    assert report.files[0]["unread_fields"] == {"id": 1}
    assert (report.rows, report.examples, len(examples)) == (5, 5, 5)
    assert (report.duplicates["exact"], report.duplicates["normalised"], report.duplicates["other_answer"]) == (1, 2, 1)
    assert report.duplicates["first"] == [f"{one}:2 = {one}:1", f"{one}:3 = {one}:1"]
    # bytes and EOS: 9, 9, 11, 8 and 4 tokens; answers with EOS 4, 4, 4, 3; of the text all but its first
    assert report.tokens == 41
    assert report.target_tokens == 4 + 4 + 4 + 3 + 3
    assert report.percentiles == {50: 9, 90: 11, 99: 11, 100: 11}
    assert sum(count for _, _, count in report.histogram) == 5
    assert not report.problems
    # 41 tokens in rows of 40 need two rows, one batch; the best packing of these puts 37 and 4 together
    assert report.batches == 1
    assert report.efficiency["packed"] == pytest.approx(41 / (2 * 37))


def test_every_kind_of_problem_is_listed_with_its_count_and_first_places(tmp_path, tokenizers):
    bad = write(tmp_path, "a.jsonl", [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ""},
        "{broken\n",
        *[{"prompt": "q", "completion": "x" * 50}] * 5,
        {"prompt": "q", "completion": " "},
        {"prompt": "q" * 39, "completion": "x"},
    ])  # fmt: skip
    report, examples = inspect([bad, str(tmp_path / "b.jsonl")], tokenizers["plain"])
    found = {problem.kind: (problem.count, problem.origins) for problem in report.problems}
    assert found.pop("a row without an answer") == (2, [f"{bad}:2", f"{bad}:9"])
    assert found.pop("a row over max_length 40") == (6, [f"{bad}:4", f"{bad}:5", f"{bad}:6"])
    assert next(value for kind, value in found.items() if kind.startswith("broken JSON")) == (1, [f"{bad}:3"])
    assert any("b.jsonl: no such file" in kind for kind in found)
    assert (report.rows, report.empty, report.over_long, len(examples)) == (10, 2, 6, 1)


FILES = {
    "good.jsonl": [{"prompt": "q", "completion": "a"}],
    "empty.jsonl": [""],
    "blank.jsonl": ["\n\n"],
    "broken.jsonl": [{"prompt": "q", "completion": "a"}, "{\n"],
    "noanswer.jsonl": [{"prompt": "q", "completion": ""}],
    "unknown.jsonl": [{"question": "q", "answer": "a"}],
    "ambiguous.jsonl": [{"prompt": "q", "completion": "a", "text": "qa"}],
    "long.jsonl": [{"prompt": "q" * 60, "completion": "a"}],
    "longanswer.jsonl": [{"prompt": "q", "completion": "a" * 60}],
    "longtext.jsonl": [{"text": "t" * 60}],
    "document.txt": ["t" * 60],
    "header.csv": ["prompt,completion\n"],
    "ragged.csv": ["prompt,completion\nq,a\nq\n"],
    "chat.jsonl": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    "model.pkl": ["x"],
}


@pytest.mark.parametrize("truncate", ["error", "prompt", "split", "drop"])
@pytest.mark.parametrize("tokenizer", ["plain", "chat"])
def test_a_problem_is_found_exactly_where_training_refuses(tmp_path, tokenizers, tokenizer, truncate):
    refusals = 0
    for name, rows in FILES.items():
        path = write(tmp_path, name, rows)
        try:
            build_examples(read_records(path), tokenizers[tokenizer], max_length=40, truncate=truncate)
            refused = False
        except DataError:
            refused = True
        report, _ = inspect([path], tokenizers[tokenizer], truncate=truncate)
        assert bool(report.problems) == refused, name
        refusals += refused
    assert 9 < refusals < len(FILES)


def test_documents_are_counted_by_their_windows(tmp_path, tokenizers):
    path = write(tmp_path, "a.txt", ["t" * 100])  # 101 tokens in windows of 40, 40, 23 that share a token
    report, _ = inspect([path], tokenizers["plain"])
    assert (report.rows, report.over_long, report.shortened, report.examples) == (1, 0, 0, 3)
    assert report.percentiles[100] == 40
    assert report.target_tokens == 100


def test_shortened_and_dropped_rows_are_counted(tmp_path, tokenizers):
    path = write(tmp_path, "a.jsonl", [{"prompt": "q" * n, "completion": "a"} for n in (5, 50, 60)])
    report, _ = inspect([path], tokenizers["plain"], truncate="prompt")
    assert (report.over_long, report.shortened, report.dropped, report.examples) == (2, 2, 0, 3)
    report, _ = inspect([path], tokenizers["plain"], truncate="drop")
    assert (report.over_long, report.shortened, report.dropped, report.examples) == (2, 0, 2, 1)


def test_weights_make_the_epoch(tmp_path, tokenizers):
    one = write(tmp_path, "a.jsonl", [{"text": f"a{i}"} for i in range(9)])
    two = write(tmp_path, "b.jsonl", [{"text": "b"}])
    _, examples = inspect([one, two], tokenizers["plain"], weights=[1, 1])
    assert [example.origin for example in examples].count(f"{two}:1") == 5
    assert len(examples) == 10
    for weights in ([1], [1, 0], [1, -2]):
        with pytest.raises(ConfigError, match="weight"):
            inspect([one, two], tokenizers["plain"], weights=weights)


def test_histogram_holds_every_length_in_few_bins():
    lengths = [3, 3, 4, 50, 51, 99]
    bins = histogram(lengths, bins=4)
    assert len(bins) <= 4
    assert [low for low, _, _ in bins[1:]] == [high + 1 for _, high, _ in bins[:-1]]
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in bins) == 6
    assert histogram([]) == []
    assert histogram([7]) == [(7, 7, 1)]


def pair(prompt="q", chosen="a", rejected="b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def judged(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


PREFERENCES = {
    "good.jsonl": [pair(), pair("r"), pair(margin=2)],
    "partly.jsonl": [pair(), pair(chosen="b"), pair(score_chosen=1, score_rejected=1)],
    "equal.jsonl": [pair(chosen="b")],
    "tied.jsonl": [pair(score_chosen=1, score_rejected=1)],
    "swapped.jsonl": [pair(), pair(chosen="b", rejected="a")],
    "empty.jsonl": [pair(), pair(rejected=" ")],
    "long.jsonl": [pair("q" * 60), pair()],
    "longside.jsonl": [pair(), pair(rejected="b" * 60)],
    "broken.jsonl": [pair(), "{\n"],
    "worse.jsonl": [pair(margin=-1)],
    "scored.jsonl": [{"instruction": "q", "completions": [{"response": "a", "score": 1}, {"response": "b"}]}],
    "supervised.jsonl": [{"prompt": "q", "completion": "a"}],
    "judged.jsonl": [judged("q", "a", True), judged("r", "b", False)],
    "onelabel.jsonl": [judged("q", "a", True), judged("r", "b", True)],
    "oneprompt.jsonl": [judged("q", "a", True), judged("q", "b", False)],
    "both.jsonl": [judged("q", "a", True), judged("r", "a", False), judged("r", "a", True)],
    "nolabel.jsonl": [judged("q", "a", True), judged("r", "b", "no")],
}


@pytest.mark.parametrize("truncate", ["error", "prompt", "drop"])
@pytest.mark.parametrize("kind", ["pairs", "judged"])
def test_a_problem_of_preferences_is_found_exactly_where_training_refuses(tmp_path, tokenizers, kind, truncate):
    refusals = set()
    for name, rows in PREFERENCES.items():
        path = write(tmp_path, name, rows)
        try:
            load_corpus([Source(path)], [], tokenizers["plain"], Encoding(40, truncate), kind=kind)
        except DataError as error:
            refusals.add(name)
            assert "\n" not in str(error)
        report, items = inspect([path], tokenizers["plain"], truncate=truncate, kind=kind)
        assert bool(report.problems) == (name in refusals), name
        assert report.examples == len(items)
    accepted = {"pairs": {"good.jsonl", "partly.jsonl"}, "judged": {"judged.jsonl"}}[kind]
    accepted |= {"long.jsonl", "longside.jsonl"} if (kind, truncate) == ("pairs", "drop") else set()
    accepted |= {"long.jsonl"} if (kind, truncate) == ("pairs", "prompt") else set()
    assert set(PREFERENCES) - refusals == accepted


def test_an_epoch_of_pairs_is_counted_by_hand(tmp_path, tokenizers):
    rows = [pair("qq", "a" * 9, "b" * 4), pair("qq", "a" * 3, "b" * 6), pair("qqq", "a", "b", margin=1)]
    report, items = inspect([write(tmp_path, "a.jsonl", rows)], tokenizers["plain"], kind="pairs", packing=False)
    # bytes and EOS: 12 and 7, 6 and 9, 5 and 5 tokens; of the answers 10 and 5, 4 and 7, 2 and 2
    assert (report.examples, report.tokens, report.target_tokens) == (3, 44, 30)
    assert report.percentiles == {50: 9, 90: 12, 99: 12, 100: 12}
    found = report.preferences
    assert (found["chosen_tokens"], found["rejected_tokens"], found["margins"]) == (16, 14, 1)
    assert found["lengths"] == {"chosen": {50: 4, 90: 10, 99: 10, 100: 10}, "rejected": {50: 5, 90: 7, 99: 7, 100: 7}}
    assert found["chosen_longer"] == pytest.approx(1 / 3)
    # padded, the two shortest pairs share a batch of 4 rows of 9, the longest has 2 of 12; packed, 44 tokens
    # lie in one row of 2 x 40
    assert report.batches == 2
    assert report.efficiency == {"padded": pytest.approx(44 / (4 * 9 + 2 * 12)), "packed": 1.0}
    assert len(items) == 3
