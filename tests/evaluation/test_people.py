"""People's scores against a judge's: scikit-learn's weighted kappa, and rows that do not fit."""

import json
import re

import pytest
from sklearn.metrics import cohen_kappa_score

from minitune import evaluate
from minitune.errors import ConfigError, DataError
from minitune.evaluation.people import agreement_lines, read_people, score_agreement
from minitune.evaluation.rubric import Rubric
from minitune.evaluation.verdicts import Missing
from tests.chat_server import chat_server

RUBRIC = Rubric("Judge.", {"clarity": "Clear.", "truth": "True."}, (1, 5))


@pytest.fixture
def write(tmp_path):
    def writer(*rows):
        path = tmp_path / "people.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return writer


def test_agreement_by_criterion_equals_scikit_learn(write):
    judged = {
        "tuned": [{"clarity": 1, "truth": 4}, {"clarity": 5, "truth": 4}, Missing("?"), {"clarity": 2, "truth": 4}],
        "base": [{"clarity": 3, "truth": 4}] * 4,
    }
    rows = [{"row": i, "scores": {"clarity": score}} for i, score in ((1, 2), (2, 5), (3, 1), (4, 4))]
    path = write(*rows, {"row": 4, "side": "base", "scores": {"clarity": 3, "truth": 5}})
    found = score_agreement(judged, read_people(path, 4, ("tuned", "base"), RUBRIC), RUBRIC)
    expected = cohen_kappa_score([1, 5, 2, 3], [2, 5, 4, 3], labels=[1, 2, 3, 4, 5], weights="quadratic")
    assert found["clarity"]["kappa"] == pytest.approx(expected) and found["clarity"]["rows"] == 4
    assert found["truth"]["rows"] == 1 and found["truth"]["kappa_interval"] is None
    lines = agreement_lines(found | {"wit": None})
    assert "clarity: weighted kappa" in lines[0] and "no kappa" in lines[1] and "not known" in lines[2]


ROW = {"row": 1, "scores": {"clarity": 3}}


@pytest.mark.parametrize(
    "row, line",
    [
        (ROW | {"row": 0}, "the row is 0; count the prompts, 1 to 2"),
        (ROW | {"row": 3}, "the row is 3"),
        (ROW | {"row": True}, "the row is True"),
        (ROW | {"side": "base"}, "the side is 'base'; write tuned"),
        (ROW | {"score": 3}, "unknown key 'score'; did you mean 'scores'"),
        (ROW | {"scores": {}}, "'scores' is an object"),
        (ROW | {"scores": {"charity": 3}}, "unknown criterion 'charity'; did you mean 'clarity'"),
        (ROW | {"scores": {"clarity": 6}}, "the score of 'clarity' is 6; write a whole number, 1 to 5"),
        (ROW | {"scores": {"clarity": 3.0}}, "the score of 'clarity' is 3.0"),
    ],
)
def test_rows_that_do_not_fit_are_one_line(write, row, line):
    with pytest.raises(DataError, match=f"people.jsonl:1: {re.escape(line)}"):
        read_people(write(row), 2, ("tuned",), RUBRIC)


def test_an_answer_scored_twice(write):
    with pytest.raises(DataError, match="people.jsonl:2: row 1 of the tuned model has scores already"):
        read_people(write(ROW, ROW), 2, ("tuned",), RUBRIC)


def test_by_the_command(write, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\nThree?\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"answer": f"{i} x"}) + "\n" for i in (2, 5, 9)))
    people = write(*({"row": i, "scores": {"clarity": score}} for i, score in ((1, 3), (2, 5), (3, 8))))
    options = ["--judge.prompts", tmp_path / "prompts.txt", "--answers", tmp_path / "a.jsonl", "--judge.model", "any"]

    def score(request):
        level = re.search(r"\[Answer\]\n(\d)", request["messages"][-1]["content"])[1]
        return "\n".join(f"SCORE {name}: {level}" for name in ("correctness", "relevance", "clarity"))

    with chat_server(score) as server:
        options += ["--judge.endpoint", server.url, "--judge.scores", people]
        assert evaluate.main([*map(str, options), "--judge.by", "scores"]) == 0
    printed = capsys.readouterr().out
    kappa = cohen_kappa_score([2, 5, 9], [3, 5, 8], labels=range(1, 11), weights="quadratic")
    assert f"agreement   clarity: weighted kappa {kappa:.2f} " in printed and "truth" not in printed
    with pytest.raises(ConfigError, match="a judge gives some with --judge.by scores"):
        evaluate.main([*map(str, options)])
