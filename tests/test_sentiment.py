"""`make train` on a tiny model: data without leaks, every step, and what happens when it is repeated."""

import csv
import dataclasses
import json
import random

import pytest

from examples import sentiment
from minitune import sources
from minitune.errors import ConfigError, DataError
from minitune.evaluation.classification import LabelledPrompt
from minitune.evaluation.prompting import reworded
from minitune.training import run as training

SIZES = ["--train_rows", "24", "--validation_rows", "8", "--test_rows", "10", "--perplexity_tokens", "60"]


def review(number: int) -> tuple[str, str]:
    """A review of random words that say what it is."""
    draw = random.Random(number)
    words = [draw.choice(["warm", "bright", "loved"] if number % 2 else ["cold", "dull", "hated"]) for _ in range(3)]
    return f"{' '.join(words)} {number}", str(number % 2)


@pytest.fixture
def reviews(tmp_path):
    """A file of reviews in which some stand twice, written a little differently."""
    path = tmp_path / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for number in range(240):
            text, label = review(number)
            writer.writerow([text, label, "rotten_tomatoes"])
            if number % 3 == 0:
                writer.writerow([f"  {text.upper()} ", label, "rotten_tomatoes"])
            writer.writerow([f"other {text}", label, "imdb"])
    return path


@pytest.fixture
def stage(tiny_folder, tmp_path, reviews, monkeypatch):
    """Everything the command fetches, and its options."""
    text = tmp_path / "wiki.txt"
    text.write_text("It is a truth universally acknowledged. " * 5)
    fetched = {"movie-reviews": reviews, "wiki-demo": text}
    monkeypatch.setattr(sources, "fetch", lambda name, **_: fetched[name])
    model = tiny_folder(tmp_path / "model", max_position_embeddings=2048)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora: {rank: 2}\nmax_length: 400\nbatch_size: 2\naccumulation_steps: 1\n")
    return ["--output", str(tmp_path / "run"), "--model", str(model), "--recipe", str(recipe), *SIZES]


def no_work(*_):
    pytest.fail("a step that was done before is done again")


def text(row) -> str:
    return row.prompt[-1]["content"]


def test_splits_share_no_review(reviews):
    config = sentiment.DemoConfig(train_rows=100, validation_rows=12, test_rows=12)
    splits = sentiment.split_reviews(reviews, config)
    texts = [text(one).lower() for part in splits.values() for one in part]
    assert len(texts) == len(set(texts)) == 124
    assert not any(one.startswith("other") for one in texts)
    assert {one.label for one in splits["test"]} == {"positive", "negative"}
    for one in splits["train"]:
        assert one.label == ("positive" if int(text(one).split()[-1]) % 2 else "negative")
    assert sentiment.split_reviews(reviews, config) == splits
    assert sentiment.split_reviews(reviews, dataclasses.replace(config, seed=1)) != splits
    # Fewer rows are the first of more: sizes can change without mixing test into training.
    fewer = sentiment.split_reviews(reviews, dataclasses.replace(config, train_rows=50))
    assert fewer["train"] == splits["train"][:50] and fewer["test"] == splits["test"]
    with pytest.raises(DataError, match="test reviews, 500 asked for; lower test_rows"):
        sentiment.split_reviews(reviews, dataclasses.replace(config, test_rows=500))


def test_prompts_hold_the_review_as_it_is():
    one, shot = (LabelledPrompt(sentiment.trained_turns(words), label, "") for words, label in
                 (("{braces} {}", "negative"), ("fine", "positive")))  # fmt: skip
    assert len(sentiment.ways()) == len(sentiment.TEMPLATES) + len(sentiment.SHOWN)
    for way in sentiment.ways():
        messages = reworded(one, way, [shot], chat=True).prompt
        assert "{braces} {}" in messages[-1]["content"]
        assert [turn["role"] for turn in messages[-3:]] == ["user", "assistant", "user"]
        assert messages[-2]["content"] == "positive"


def test_whole_run_then_again(stage, tmp_path, monkeypatch, capsys):
    sentiment.main(stage)
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert set(result) == {"base", "tuned", "comparison", "seconds", "peak_rss_mb", "steps", "target_tokens"}
    wanted = {"accuracy", "accuracy_interval", "macro_f1", "format_compliance", "perplexity", "rows"}
    for part in ("base", "tuned"):
        assert wanted <= set(result[part])
        assert result[part]["rows"] == 10
    assert len(result["base"]["prompts_tried"]) == len(sentiment.TEMPLATES) + len(sentiment.SHOWN)
    best = max(result["base"]["prompts_tried"].values())
    assert result["base"]["prompts_tried"][result["base"]["prompt"]] == best
    # A target is the label's letters, one token each here, and the end of the turn.
    rows = [json.loads(line) for line in (tmp_path / "run/data/train.jsonl").read_text().splitlines()]
    assert result["target_tokens"] == sum(len(row["messages"][-1]["content"]) + 1 for row in rows)
    printed = capsys.readouterr().out
    assert result["comparison"]["accuracy"]["test"] == "McNemar's exact test"
    assert "the tuned model does" in printed or "the tuned model wins" in printed
    assert "format compliance" in printed and "minitune.generate --model" in printed
    report = (tmp_path / "run/train/report.md").read_text()
    before, after = (f"{result[part]['accuracy']:.4g} (" for part in ("base", "tuned"))
    assert f"| test, classification: accuracy | {before}" in report and f") | {after}" in report
    assert f"{result['base']['perplexity']:.4g} | {result['tuned']['perplexity']:.4g}" in report
    # Again: nothing is done, the same table.
    monkeypatch.setattr(training, "train", no_work)
    monkeypatch.setattr(sentiment.Measured, "base", no_work)
    monkeypatch.setattr(sentiment.Measured, "tuned", no_work)
    sentiment.main(stage)
    again = capsys.readouterr().out
    assert "base: done before" in again and "tuned: done before" in again
    assert again[again.index("macro-F1") :] == printed[printed.index("macro-F1") :]
    assert json.loads((tmp_path / "run/results.json").read_text()) == result


def test_a_changed_setting_and_a_lost_or_damaged_result_do_a_step_again(stage, tmp_path, monkeypatch):
    sentiment.main(stage)
    calls = []
    base, tuned, train = sentiment.Measured.base, sentiment.Measured.tuned, training.train
    monkeypatch.setattr(sentiment.Measured, "base", lambda self: calls.append("base") or base(self))
    monkeypatch.setattr(
        sentiment.Measured, "tuned", lambda self, adapter: calls.append("tuned") or tuned(self, adapter)
    )
    monkeypatch.setattr(training, "train", lambda config: calls.append("train") or train(config))
    (tmp_path / "run/tuned.json").write_text('{"key": ')
    sentiment.main(stage)
    assert calls == ["tuned"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rank: 2", "rank: 3"))
    sentiment.main(stage)
    assert calls == ["tuned", "train", "tuned"]
    sentiment.main([*stage, "--perplexity_tokens", "50"])
    assert calls == ["tuned", "train", "tuned", "base", "train", "tuned"]


def test_an_interrupted_training_goes_on(stage, tmp_path, monkeypatch, capsys):
    sentiment.main(stage)
    (tmp_path / "run/training.json").unlink()  # as if it had been killed at the end of training
    seen = []
    train = training.train

    def stopped(config):
        seen.append((config.resume, config.overwrite))
        return dataclasses.replace(train(config), signal=15)

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(SystemExit) as exit:
        sentiment.main(stage)
    assert exit.value.code == 143
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # nothing was kept as done; with another recipe it begins anew
        sentiment.main([*stage, "--seed", "1"])
    assert seen == [(True, False), (False, True)]


def test_sizes_without_meaning_are_refused():
    with pytest.raises(ConfigError, match="test_rows is 3; it must be at least 8"):
        sentiment.main(["--test_rows", "3"])
    with pytest.raises(ConfigError, match="seed is -1"):
        sentiment.main(["--seed=-1"])


def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "fetch", no_work)
    (tmp_path / "notes.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="output .*notes.txt is a file; name a folder"):
        sentiment.main(["--output", str(tmp_path / "notes.txt")])
    assert (tmp_path / "notes.txt").read_text() == "years of work"
