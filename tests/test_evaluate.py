"""The evaluate command on a tiny random model, against the libraries it calls and against transformers."""

import json
import math

import pytest
import torch

from minitune import evaluate
from minitune.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [("good", "positive"), ("bad", "negative"), ("fine", "positive")]
    path.write_text("\n".join(json.dumps({"prompt": text, "completion": label}) for text, label in rows))
    return path


TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 3


def run(tiny: str, *options) -> None:
    evaluate.main(["--model", tiny, "--dtype", "float32", *map(str, options)])


def test_everything_measured_is_printed_and_written(tiny, reviews, tmp_path, capsys):
    text, output = tmp_path / "wiki.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    run(tiny, "--classify", reviews, "--labels", "positive,negative", "--perplexity", text, "--output", output,
        "--max_new_tokens", 4, "--max_rows", 2, "--window", 200)  # fmt: skip
    result = json.loads(output.read_text())
    found = result["classification"]
    assert found["rows"] == 2
    assert found["confusion"] == [[0, 0, 1], [0, 0, 1]]  # a random model writes no label
    assert (found["accuracy"], found["format_compliance"]) == (0.0, 0.0)
    printed = capsys.readouterr().out
    assert "accuracy    0.0%" in printed and "other answers: " in printed
    assert f"perplexity  {result['perplexity']['perplexity']:.3f}" in printed


def test_perplexity_equals_transformers(tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, output = tmp_path / "wiki.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    run(tiny, "--perplexity", text, "--output", output, "--max_tokens", 150)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"][:150]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny)(ids, labels=ids).loss.item()
    result = json.loads(output.read_text())
    assert result["perplexity"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert result["perplexity"]["tokens"] == 149
    assert "classification" not in result


@pytest.mark.parametrize(
    "options, line",
    [
        ((), "nothing to measure"),
        (("--classify", "x.jsonl"), "labels are missing"),
        (("--classify", "x.jsonl", "--labels", "a"), "at least two different ones"),
        (("--perplexity", "x.txt", "--labels", "a,b"), "labels is set without classify"),
        (("--classify", "x.jsonl", "--labels", "a,b", "--window", "4"), "window is set without perplexity"),
        (("--perplexity", "x.txt", "--batch_size", "4"), "batch_size is set without classify"),
        (("--classify", "x.jsonl", "--labels", "a,b", "--batch_size", "0"), "batch_size is 0"),
    ],
)
def test_options_without_meaning_are_refused(tiny, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ConfigError, match=line):
        run(tiny, *options)


def test_data_that_cannot_be_measured_is_named(tiny, reviews, tmp_path):
    with pytest.raises(DataError, match=r"test.jsonl:1: the answer 'positive' is not one of the labels good, bad"):
        run(tiny, "--classify", reviews, "--labels", "good,bad")
    with pytest.raises(CheckpointError, match="nothing.jsonl: no such file"):
        run(tiny, "--classify", tmp_path / "nothing.jsonl", "--labels", "a,b")
    with pytest.raises(DataError, match="perplexity reads plain text"):
        run(tiny, "--perplexity", reviews)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        run(tiny, "--perplexity", empty)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)  # calling it would fail
    with pytest.raises(CheckpointError, match="is a folder; a file was to be written there"):
        run(tiny, "--perplexity", tmp_path / "a.txt", "--output", tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused(tiny_folder, tmp_path):
    small = tiny_folder(tmp_path / "model", vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(CheckpointError, match="up to 259 .* has 200 rows"):
        evaluate.main(["--model", str(small), "--perplexity", str(tmp_path / "a.txt")])


def test_a_window_of_nothing_is_not_the_default(tiny, tmp_path):
    with pytest.raises(ConfigError, match="window is 0; it must be at least 1"):
        run(tiny, "--perplexity", tmp_path / "a.txt", "--window", 0)
