"""Gates: the numbers that names stand for, what passes, what cannot."""

import json
import math

import pytest

from minitune.errors import ConfigError
from minitune.reporting.gates import FAILED, GateOutcome, check, gathered, numbers, parse_gates, verdict

RESULT = {
    "model": "m",
    "classification": {
        "rows": 40,
        "accuracy": 0.9,
        "accuracy_interval": [0.77, 0.96],
        "labels": ["a", "b"],
        "scores": {"accuracy": {"value": 0.9, "interval": [0.77, 0.96], "interval_by": "Wilson"}},
        "base_answers": {"accuracy": 0.5},
        "base": {"accuracy": {"value": 0.5, "interval": [0.3, 0.7]}},
        "comparison": {"accuracy": {"difference": 0.4, "interval": [0.2, 0.6]}},
    },
    "references": {"scores": {"rouge1": {"value": 0.31, "interval": None}, "chrf++": {"value": math.nan}}},
    "perplexity": {"perplexity": 12.5, "interval": [11.0, 14.0], "loss": 2.5},
    "seconds": 3,
}


def outcome(text):
    (found,) = check(parse_gates(text), RESULT)
    return found


@pytest.mark.parametrize(
    "text,metric,value,passed",
    [
        ("accuracy>=0.85", "classification.accuracy", 0.9, True),
        (" accuracy >= 0.9 ", "classification.accuracy", 0.9, True),
        ("accuracy>0.9", "classification.accuracy", 0.9, False),
        ("classification.accuracy<0.95", "classification.accuracy", 0.9, True),
        ("accuracy.low>=0.8", "classification.accuracy.low", 0.77, False),
        ("accuracy.high<=0.96", "classification.accuracy.high", 0.96, True),
        ("base.accuracy==0.5", "classification.base.accuracy", 0.5, True),
        ("comparison.accuracy.low>0", "classification.comparison.accuracy.low", 0.2, True),
        ("rouge1!=0.31", "references.rouge1", 0.31, False),
        ("rouge1<1e0", "references.rouge1", 0.31, True),
        ("rouge1.low>=0", "references.rouge1.low", None, False),
        ("chrf++>=0", "references.chrf++", None, False),
        ("chrf++!=1", "references.chrf++", None, False),
        ("perplexity.perplexity<=12.5", "perplexity.perplexity", 12.5, True),
        ("rows==40", "classification.rows", 40.0, True),
    ],
)
def test_a_gate_and_its_number(text, metric, value, passed):
    found = outcome(text)
    assert (found.metric, found.value, found.passed) == (metric, value, passed)
    assert ("passed" if passed else "FAILED") in found.line


@pytest.mark.parametrize(
    "text,parts",
    [
        ("acuracy>=0.8", ["nothing measured is called 'acuracy'", "did you mean 'accuracy'"]),
        ("zzz>=1", ["'zzz'", "there are: classification.rows, classification.accuracy"]),
        ("low>=1", ["'low' could be", "classification.accuracy.low", "write more of the path"]),
        ("interval_by==1", ["'interval_by'"]),
    ],
)
def test_names_that_stand_for_nothing_or_for_several_are_errors(text, parts):
    with pytest.raises(ConfigError) as caught:
        outcome(text)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy>=", ">=0.5", "accuracy=>0.5", "accuracy>=high", "a>=nan",
                                  "a>=inf", "a>=1>=2", "a=1"])  # fmt: skip
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(ConfigError, match="require is"):
        parse_gates([text])


def test_every_require_counts():
    given = ["run", "--require", "a>=1", "--x", "2", "--require=[b<2,c>3]", "--require", "d==4"]
    assert gathered(given) == ["run", "--x", "2", "--require=[a>=1,b<2,c>3,d==4]"]
    assert gathered(["run"]) == ["run"]
    with pytest.raises(ConfigError, match="missing its value"):
        gathered(["--require"])


def test_numbers_are_found_at_every_depth_and_words_are_not():
    found = numbers({"a": {"b": 1, "c": "x", "d": True}, "e": None, "f": [1, 2], "g": {"value": 2, "interval": [1, 3]}})
    assert found == {"a.b": 1.0, "e": None, "g": 2.0, "g.low": 1, "g.high": 3}


def test_one_gate_that_fails_fails_all(capsys):
    good, bad = GateOutcome("a>=1", "a", 2.0, True), GateOutcome("b>=1", "b", None, False)
    assert (verdict([good]), verdict([]), verdict([good, bad])) == (0, 0, FAILED)
    assert "gate FAILED: b>=1 (b is not measured)" in capsys.readouterr().out
    json.dumps(numbers(RESULT))
