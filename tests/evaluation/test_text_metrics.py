"""Exact match, variety, repetition, pass@k, calibration and format compliance, by hand and by independent tools."""

import itertools
import json
import random

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from minitune.errors import ConfigError, DataError
from minitune.evaluation.bootstrap import interval, mean_of
from minitune.evaluation.calibration import calibration_statistics
from minitune.evaluation.compliance import answer_form
from minitune.evaluation.text_metrics import distinct_n, exact_match, pass_at_k, repetition


def test_exact_match_ignores_outer_white_space_only():
    assert exact_match(" Paris\n", ["Rome", "Paris "])
    assert not exact_match("paris", ["Paris"])
    assert not exact_match("Paris.", ["Paris"])
    assert not exact_match("", [""]) and not exact_match(" \n", [" "])


def test_variety_and_repetition_by_hand():
    # "a b a b" has the pairs ab, ba, ab; "a b" has ab: 2 different of 4. Words: 2 different of 6.
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["", "a"], 2) == 0
    assert repetition("a b a b", 2) == pytest.approx(1 / 3)
    assert repetition("so it goes on " * 5) == pytest.approx(1 - 4 / 17)  # 20 words: 17 runs of 4, of which 4 differ
    assert repetition("one two three four") == repetition("short") == repetition("") == 0
    with pytest.raises(ConfigError, match="n is 0"):
        repetition("a", 0)


@pytest.mark.parametrize("samples, right", [(1, 0), (1, 1), (5, 2), (6, 0), (6, 6), (7, 3)])
def test_pass_at_k_is_the_mean_over_every_choice_of_k(samples, right):
    results = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        chosen = list(itertools.combinations(results, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


def test_pass_at_k_of_many_samples_is_stable_and_checked():
    # The paper's own way to compute it: 1 - prod (1 - k / i) for i from n - c + 1 to n.
    assert pass_at_k(200, 37, 100) == pytest.approx(1 - np.prod(1 - 100 / np.arange(164, 201)), rel=1e-12)
    for k in (0, 6):
        with pytest.raises(ConfigError, match=f"k is {k}; it must be 1 to the 5"):
            pass_at_k(5, 1, k)
    with pytest.raises(DataError, match="6 of 5 samples"):
        pass_at_k(5, 6, 1)
    low, high = interval(mean_of([pass_at_k(5, right, 2) for right in (0, 1, 5, 3, 0, 2)]))
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
def test_calibration_equals_a_curve_of_scikit_learn(bins):
    draw = random.Random(bins)
    sure = [draw.choice([draw.random(), draw.randrange(bins + 1) / bins]) for _ in range(300)]  # edges, too
    right = [draw.random() < (confidence + 0.5) % 1 for confidence in sure]  # bins err on both sides
    shares, means = calibration_curve(right, sure, n_bins=bins, strategy="uniform")
    edges = np.linspace(0, 1, bins + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], sure), minlength=bins)
    expected = (np.abs(shares - means) * counts[counts > 0]).sum() / 300
    found = calibration_statistics(sure, right, bins=bins)
    assert found.value == pytest.approx(expected, abs=1e-12)
    low, high = interval(found)
    assert 0 <= low < high <= 1


def test_calibration_by_hand_and_what_it_refuses():
    # Bins (0, 1/2] and (1/2, 1]: |1 - 0.4| + |1 - 1.7| over 3 rows.
    assert calibration_statistics([0.4, 0.8, 0.9], [1, 1, 0], bins=2).value == pytest.approx((0.6 + 0.7) / 3)
    assert calibration_statistics([1.0, 0.0], [True, False]).value == 0
    for bad in (1.1, -0.1, float("nan")):
        with pytest.raises(DataError, match="row 2: the confidence is"):
            calibration_statistics([0.5, bad], [True, True])
    with pytest.raises(DataError, match="1 confidences for 2 answers"):
        calibration_statistics([0.5], [True, True])
    with pytest.raises(ConfigError, match="bins is 0"):
        calibration_statistics([0.5], [True], bins=0)


@pytest.mark.parametrize(
    "form, good, bad",
    [
        ("regex:[A-D]", ["A", " D\n"], ["", "AB", "a", "A."]),
        ("regex:x:\\d+", ["x:12"], ["x:", "12"]),  # only the first colon ends the kind
        ("choices:yes, no", ["yes", "no\n"], ["Yes", "yes.", "", "yes, no"]),
        ("json", ['{"a": 1}', "[1, 2]", " 3 "],
         ["", "{'a': 1}", '{"a": 1, "a": 2}', "NaN", "```json\n{}\n```", '{"a": 1} so', "[" * 100_000]),
    ],
)  # fmt: skip
def test_a_form_is_met_by_the_whole_answer(form, good, bad):
    complies = answer_form(form)
    assert [answer for answer in good if not complies(answer)] == []
    assert [answer[:20] for answer in bad if complies(answer)] == []


def test_a_schema_decides_by_jsonschema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({
        "type": "object", "required": ["name"], "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    }))  # fmt: skip
    complies = answer_form(f"json:{path}")
    assert complies('{"name": "Ada", "age": 36}') and complies(' {"name": ""}\n')
    for answer in ('{"age": 3}', '{"name": "Ada", "age": -1}', '{"name": "Ada", "x": 1}', "[]", '{"name": 1}', "Ada"):
        assert not complies(answer)


@pytest.mark.parametrize(
    "form, line",
    [
        ("regexp:a", "did you mean 'regex'"),
        ("regex:", "write regex:PATTERN"),
        ("regex:(", "the pattern '\\(' is broken"),
        ("choices:a,,b", "name the choices"),
        ("choices:", "name the choices"),
    ],
)
def test_a_form_that_is_none_is_named(form, line):
    with pytest.raises(ConfigError, match=line):
        answer_form(form)


def test_a_schema_that_is_none_is_named(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "objekt"}')
    with pytest.raises(ConfigError, match="schema.json: no JSON schema"):
        answer_form(f"json:{path}")
    path.write_text('{"type": ')
    with pytest.raises(ConfigError, match="schema.json: broken JSON"):
        answer_form(f"json:{path}")
    with pytest.raises(FileNotFoundError):
        answer_form(f"json:{tmp_path / 'none.json'}")
    path.write_text('{"type": "string", "pattern": "("}')
    with pytest.raises(ConfigError, match="schema.json: no JSON schema"):
        answer_form(f"json:{path}")
    path.write_text('{"$ref": "http://localhost:9/x.json"}')  # nothing is fetched
    with pytest.raises(ConfigError, match="the schema refers to what is not in it"):
        answer_form(f"json:{path}")('"a"')
