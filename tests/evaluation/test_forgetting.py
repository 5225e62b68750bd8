"""What was forgotten: the arithmetic against counts by hand, verdicts at their borders, data that cannot be read."""

import json
import math

import pytest
import torch

from minitune import load_model, load_tokenizer
from minitune.data.reading import RowError
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.evaluation.forgetting import (
    ACCURACY,
    PERPLEXITY,
    General,
    Retained,
    compare_general,
    general_lines,
    measure_general,
    read_general,
    verdict_of,
    worst,
)
from minitune.evaluation.kinds import general
from minitune.reporting.gates import check, parse_gates

TEXT = General("wiki", {"file": "wiki.txt"}, documents=("a text",))
QUIZ = General("quiz", {"file": "quiz.jsonl"}, questions=("q",) * 200)


def losses(factor, windows=20):
    """A loss a token of ln 10, and of ln(10 factor), in windows that differ."""
    tokens = tuple(50 + n for n in range(windows))
    return Retained(tuple(count * (math.log(10 * factor) + 0.01 * (n % 3)) for n, count in enumerate(tokens)), tokens)


@pytest.mark.parametrize(
    "factor, verdict", [(0.9, "kept"), (1.0, "kept"), (1.04, "kept"), (1.1, "slightly forgotten"), (1.3, "forgotten")]
)
def test_a_rise_of_perplexity_is_that_of_its_factor(factor, verdict):
    found = compare_general(TEXT, losses(factor), losses(1.0))
    assert found["difference"] == pytest.approx(factor - 1)
    assert found["difference_interval"] == pytest.approx([factor - 1] * 2)  # of every window: nothing varies
    assert found["value"] / found["base"] == pytest.approx(factor)
    assert found["verdict"] == verdict
    assert f"{100 * (factor - 1):+.1f}%" in general_lines(found, "wiki")[0]


def test_the_ends_of_a_difference_are_not_those_of_the_perplexity():
    results = {"forgetting": {"sets": {"wiki": compare_general(TEXT, losses(1.2), losses(1.0))}}}
    outcomes = check(parse_gates(["sets.wiki<20", "wiki.difference.high<=0.5"]), results)
    assert [one.passed for one in outcomes] == [True, True]
    with pytest.raises(ConfigError, match="nothing measured is called 'wiki.high'"):
        check(parse_gates(["wiki.high<=10"]), results)  # it was 0.2, and passed


def test_what_could_not_be_compared_is_not_kept():
    other = Retained((1.0,), (2,), tokens_digest="other")
    base, right = losses(1.0), Retained(right=(True,) * 200)
    found = general.report([TEXT, QUIZ], [other, right], [base, right], None)
    assert [one["verdict"] for one in found["sets"].values()] == [None, "kept"] and found["verdict"] == "undecided"
    assert general.report([TEXT, QUIZ], [base, right], None, None)["verdict"] is None


def test_a_model_without_a_finite_loss_is_not_measured(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.head_weight.data[:] = float("nan")
    with pytest.raises(CheckpointError, match="no finite loss"):
        measure_general(model, tokenizer, TEXT, window=8)


def test_windows_that_disagree_leave_it_open_and_so_do_few():
    base = losses(1.0)
    moved = tuple(
        loss + 0.5 * count * (-1) ** n for n, (loss, count) in enumerate(zip(base.losses, base.tokens, strict=True))
    )
    assert compare_general(TEXT, Retained(moved, base.tokens), base)["verdict"] == "undecided"
    assert compare_general(TEXT, losses(1.0, windows=9), losses(1.0, windows=9))["verdict"] == "undecided"
    assert compare_general(TEXT, losses(1.5, windows=9), losses(1.0, windows=9))["verdict"] == "undecided"


def test_a_drop_of_accuracy_is_tested_on_the_same_questions():
    base = Retained(right=(True,) * 120 + (False,) * 80)
    same = compare_general(QUIZ, base, base)
    assert (same["difference"], same["p"], same["verdict"]) == (0, 1, "kept")
    lost = compare_general(QUIZ, Retained(right=(True,) * 90 + (False,) * 110), base)
    assert lost["difference"] == pytest.approx(-0.15) and (lost["lost"], lost["gained"]) == (30, 0)
    assert lost["p"] == pytest.approx(2 / 2**30) and lost["verdict"] == "forgotten"
    slight = compare_general(QUIZ, Retained(right=(True,) * 110 + (False,) * 90), base)
    assert slight["verdict"] == "slightly forgotten"  # 5 points, p = 2 / 2^10
    mixed = (False,) * 20 + (True,) * 100 + (True,) * 18 + (False,) * 62
    assert compare_general(QUIZ, Retained(right=mixed), base)["verdict"] == "undecided"
    assert "-15.0 points" in general_lines(lost, "quiz")[0] and "McNemar" in general_lines(lost, "quiz")[0]


def test_verdicts_turn_at_their_borders():
    assert verdict_of(0.01, 0.049, True, PERPLEXITY) == "kept"
    assert verdict_of(0.01, 0.051, True, PERPLEXITY) == "slightly forgotten"
    assert verdict_of(0.01, 0.051, False, PERPLEXITY) == "undecided"
    assert verdict_of(0.101, 0.2, True, ACCURACY) == "forgotten"
    assert worst(["kept", "undecided", "slightly forgotten", None]) == "slightly forgotten"
    assert worst([None]) is None


def test_models_that_read_other_tokens_are_not_compared():
    ours, theirs = Retained((1.0,), (1,), tokens_digest="a"), Retained((1.0,), (1,), tokens_digest="b")
    found = compare_general(TEXT, ours, theirs)
    assert found["verdict"] is None and "other tokens" in general_lines(found, "wiki")[0]


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    folder = str(tiny_folder(tmp_path_factory.mktemp("model")))
    return load_model(folder), load_tokenizer(folder)


def test_documents_are_read_apart_and_as_transformers_reads_them(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny
    texts = ["The first document is not long.", "x", "The second one begins anew, and is cut somewhere here."]
    found = measure_general(model, tokenizer, General("d", {}, tuple(texts)), window=16, max_tokens=60)
    assert found.skipped == 1  # a byte is a token: one alone predicts nothing
    peer, left, expected = AutoModelForCausalLM.from_pretrained(model_folder(tokenizer)).eval(), 60, 0.0
    for text in (texts[0], texts[2]):
        ids = torch.tensor(tokenizer.encode(text)[:left])
        left -= len(ids)
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            with torch.no_grad():
                expected += peer(window[None], labels=window[None]).loss.item() * (len(window) - 1)
    assert sum(found.losses) == pytest.approx(expected, rel=1e-4)
    assert sum(found.tokens) == 60 - 2
    cut = measure_general(model, tokenizer, General("d", {}, tuple(texts)), window=16, max_tokens=31)
    assert sum(cut.tokens) == 30 and cut.tokens_digest != found.tokens_digest
    with pytest.raises(DataError, match="no text of two tokens"):
        measure_general(model, tokenizer, General("d", {}, ("x", "y")), window=16)


def model_folder(tokenizer):
    from pathlib import Path

    return Path(tokenizer.origin).parent if Path(tokenizer.origin).is_file() else tokenizer.origin


def test_general_data_are_texts_documents_or_questions(tmp_path):
    (tmp_path / "a.txt").write_text("One text.\n\nOf two parts.")
    assert read_general(str(tmp_path / "a.txt")).documents == ("One text.\n\nOf two parts.",)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}')
    assert read_general(str(tmp_path / "b.jsonl"), 2).documents == ("one", "two")
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "?", "choices": ["a", "b"], "answer": "b"}))
    assert read_general(str(tmp_path / "c.jsonl")).questions[0].answer == 1
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(DataError, match="general data are a .txt file, rows"):
        read_general(str(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n{"tex": "two"}')
    with pytest.raises(RowError, match=r"e.jsonl:2: a row without 'text'"):
        read_general(str(tmp_path / "e.jsonl"))
