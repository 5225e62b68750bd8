"""Metrics against scikit-learn, and Wilson's interval against the roots of its defining equation."""

import random

import pytest
from sklearn import metrics as judge

from minitune.errors import ConfigError, DataError
from minitune.evaluation.classification import check_labels, read_labelled, summarize
from minitune.evaluation.metrics import accuracy, confusion_matrix, f1_statistics, macro_f1, wilson_interval

LABELS = ("negative", "neutral", "positive")


def answers(seed: int, *, other: bool = True) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    expected = [draw.choice(LABELS) for _ in range(200)]
    strange = ["It is positive", "positively", ""] if other else []
    return expected, [right if draw.random() < 0.6 else draw.choice([*LABELS, *strange]) for right in expected]


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_scikit_learn(seed):
    expected, predicted = answers(seed)
    result = summarize(expected, predicted, LABELS)
    assert result.accuracy == pytest.approx(judge.accuracy_score(expected, predicted), abs=1e-12)
    f1 = judge.f1_score(expected, predicted, labels=list(LABELS), average="macro", zero_division=0)
    assert result.macro_f1 == pytest.approx(f1, abs=1e-12)
    micro = judge.f1_score(expected, predicted, labels=list(LABELS), average="micro", zero_division=0)
    assert result.micro_f1 == pytest.approx(micro, abs=1e-12)
    for average, found in f1_statistics(expected, predicted, LABELS).items():
        assert found.value == pytest.approx({"macro": f1, "micro": micro}[average], abs=1e-12)
    named = [answer if answer in LABELS else "other" for answer in predicted]
    matrix = judge.confusion_matrix(expected, named, labels=[*LABELS, "other"])
    assert result.confusion == matrix[:3].tolist()
    assert result.format_compliance == pytest.approx(sum(n != "other" for n in named) / 200)
    assert sum(count for _, count in result.other_answers) == named.count("other")


def test_f1_is_resampled_by_rows():
    expected, predicted = answers(7)
    result = summarize(expected, predicted, LABELS)
    draw, scores = random.Random(0), {"macro": [], "micro": []}
    for _ in range(200):
        rows = draw.choices(range(200), k=200)
        pair = [expected[i] for i in rows], [predicted[i] for i in rows]
        for average, found in scores.items():
            found.append(judge.f1_score(*pair, labels=list(LABELS), average=average, zero_division=0))
    for average, found in scores.items():
        found.sort()
        bounds = getattr(result, f"{average}_f1_interval")
        assert bounds == pytest.approx((found[5], found[194]), abs=0.02)


def test_a_label_that_never_occurs_scores_zero():
    expected, predicted = ["negative"] * 3, ["negative"] * 3
    matrix = confusion_matrix(expected, predicted, LABELS)
    f1 = judge.f1_score(expected, predicted, labels=list(LABELS), average="macro", zero_division=0)
    assert macro_f1(matrix) == pytest.approx(f1)
    assert accuracy(matrix) == 1.0


@pytest.mark.parametrize("right, total", [(0, 5), (5, 5), (1, 3), (433, 500), (62, 100), (1, 10000)])
def test_wilson_interval_bounds_solve_its_equation(right, total):
    # Wilson's bounds are the p with |right/total - p| = z sqrt(p (1 - p) / total), and z = 1.959964 for 95%.
    share = right / total
    low, high = wilson_interval(right, total)
    for bound in (low, high):
        variance = 1.959963984540054**2 * bound * (1 - bound) / total
        assert (share - bound) ** 2 == pytest.approx(variance, rel=1e-9, abs=1e-15)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


def test_wilson_interval_by_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score): 81/263 and 0/20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a"), ("a", " "), ("a", "other")])
def test_labels_must_be_two_different_words(labels):
    with pytest.raises(ConfigError, match="at least two different"):
        check_labels(labels)


def test_a_row_whose_answer_is_no_label_is_named(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"prompt": "good?", "completion": " positive\\n"}\n'
        '{"prompt": "bad?", "completion": "negativ"}\n'
    )  # fmt: skip
    with pytest.raises(DataError, match=r"rows.jsonl:2: the answer 'negativ' is not one of .*did you mean 'negative'"):
        read_labelled(data, LABELS)
    rows = read_labelled(data, (*LABELS, "negativ"))
    expected = [("good?", "positive", True), ("bad?", "negativ", True)]
    assert [(row.prompt, row.label, row.raw) for row in rows] == expected
    text = tmp_path / "page.txt"
    text.write_text("just text")
    with pytest.raises(DataError, match="page.txt:1: a text without question and answer"):
        read_labelled(text, LABELS)


def test_chat_rows_give_the_last_answer(tmp_path):
    data = tmp_path / "rows.jsonl"
    turns = '[{"role": "user", "content": "good film"}, {"role": "assistant", "content": "positive"}]'
    data.write_text(f'{{"messages": {turns}}}\n')
    (row,) = read_labelled(data, LABELS)
    assert row.prompt == ({"role": "user", "content": "good film"},)
    assert (row.label, row.raw) == ("positive", False)
