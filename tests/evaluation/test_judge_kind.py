"""`--judge.*` from end to end: a server or a tiny model as judge, where it fails, and how far people agree."""

import json
import re
from itertools import count

import pytest

from minitune import evaluate
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.evaluation import blind
from minitune.evaluation.judge import differences
from minitune.evaluation.rubric import read_rubric
from tests.chat_server import Answer, chat_server

ANY = ("--judge.model", "any", "--judge.endpoint", "http://localhost:9/v1")
PAIRS = [("8 yes", "2 no"), ("1 a", "5 b"), ("7 c", "3 d"), ("4 same", "4 same"), ("9 e", "6 f, at length")]


@pytest.fixture
def files(tmp_path):
    """Prompts, both models' answers, and the options that name them."""
    (tmp_path / "prompts.txt").write_text("".join(f"Question {i}?\n" for i in range(len(PAIRS))))
    for side, texts in zip(("tuned", "base"), zip(*PAIRS, strict=True), strict=True):
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts))
    return tmp_path


def run(*options, code=0) -> None:
    assert evaluate.main([str(option) for option in options]) == code


def judge(files, server, *options, code=0) -> dict:
    """Run the judge over the files and return what was written."""
    output = files / "out.json"
    run("--judge.prompts", files / "prompts.txt", "--answers", f"[{files}/tuned.jsonl,{files}/base.jsonl]",
        "--judge.model", "any", "--judge.endpoint", server.url, "--judge.retries", 0, "--judge.timeout", 5,
        "--output", output, "--overwrite", *options, code=code)  # fmt: skip
    return json.loads(output.read_text())["judge"]


def honest(request) -> str:
    """Prefer the answer that begins with the higher number."""
    first, second = re.findall(r"\[Answer [AB]\]\n(\d)", request["messages"][-1]["content"])
    return f"Clearly.\nVERDICT: {'A' if first > second else 'B'}"


def test_pairs_are_judged_in_both_orders(files, capsys):
    with chat_server(honest) as server:
        found = judge(files, server)
        assert len(server.requests) == 2 * 4
    assert found["outcomes"] == ["tuned", "base", "tuned", "tie", "tuned"]
    assert found["position_bias"]["value"] == 0 and found["wins"]["win_rate"]["value"] == 3.5 / 5
    printed = capsys.readouterr().out
    assert f"judge       any at {server.url}, rubric default, by pairs" in printed
    assert "0.0% (95% interval" in printed and "follow the place" in printed


def test_a_server_that_fails_for_some_is_gone_on_with(files, capsys):
    calls = count()

    def flaky(request):
        return Answer(status=500) if next(calls) % 3 == 0 else honest(request)

    with chat_server(flaky) as server:
        options = ("--judge.journal", files / "journal.jsonl", "--judge.parallel", 1)
        found = judge(files, server, *options, code=1)
        assert found["missing"]["the endpoint failed"] >= 1 and "HTTP 500" in found["details"]["the endpoint failed"]
        assert "have no verdict, more than judge.max_missing 0.1" in capsys.readouterr().err
        server.answer = honest
        again = judge(files, server, *options)
    assert again["outcomes"] == ["tuned", "base", "tuned", "tie", "tuned"] and not again["missing"]


@pytest.mark.parametrize(
    "answer, kind",
    [("I like both.", "no line with a verdict"),
     (Answer("VERDICT: A", finish_reason="length"), "the reply was cut off"),
     (Answer("VERDICT: A", missing=9), "the endpoint failed"), (Answer(status=503), "the endpoint failed")],
)  # fmt: skip
def test_a_judge_without_a_verdict_decides_nothing(files, answer, kind, capsys):
    with chat_server(lambda request: answer) as server:
        found = judge(files, server, code=1)
    assert found["missing"][kind] >= 3 and found["without_verdict"] == 4
    assert "wins" not in found and "win rate" not in capsys.readouterr().out
    assert found["outcomes"] == [None, None, None, "tie", None]


def test_scores_of_both_models_and_of_one(files, capsys):
    def score(request):
        level = re.search(r"\[Answer\]\n(\d)", request["messages"][-1]["content"])[1]
        return "\n".join(f"SCORE {name}: {level}" for name in ("correctness", "relevance", "clarity"))

    with chat_server(score) as server:
        found = judge(files, server, "--judge.by", "scores")
        assert found["scores"]["clarity"]["value"] == pytest.approx(29 / 5)
        assert found["base"]["clarity"]["value"] == pytest.approx(20 / 5)
        assert "paired bootstrap" in capsys.readouterr().out
        run("--judge.prompts", files / "prompts.txt", "--answers", files / "base.jsonl", "--judge.by", "scores",
            "--judge.model", "any", "--judge.endpoint", server.url)  # fmt: skip
        assert re.search(r"all criteria\s+4 \(", capsys.readouterr().out)


def test_agreement_with_people(files, capsys):
    key = files / "key.json"
    run("--blind.prompts", files / "prompts.txt", "--answers", f"[{files}/tuned.jsonl,{files}/base.jsonl]",
        "--blind.key", key, "--blind.page", files / "page.html")  # fmt: skip
    made = blind.read_key(key)
    votes = [{"item": f"pair-{i}", "choice": "a" if first else "b"} for i, (_, first) in enumerate(made.order, 1)]
    content = {"ballot": blind.ballot_id(made.items, blind.CHOICES), "votes": votes}  # always the tuned model
    (files / "votes.json").write_text(json.dumps(content))
    with chat_server(honest) as server:
        options = ("--judge.model", "any", "--judge.endpoint", server.url, "--judge.key", key)
        run(*options, "--judge.votes", files / "votes.json", "--output", files / "out.json")
    found = json.loads((files / "out.json").read_text())["judge"]["agreement"]
    assert (found["rows"], found["share"], found["kappa"], found["kappa_interval"]) == (4, 0.75, 0.0, None)
    assert "75.0% of 4 votes, kappa 0: one side always says the same" in capsys.readouterr().out
    content["ballot"] = "0" * 16
    (files / "votes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="votes on ballot"):
        run(*options, "--judge.votes", files / "votes.json")


def test_a_local_judge_by_probabilities_and_by_words(files, roomy, capsys):
    both = ("--answers", f"[{files}/tuned.jsonl,{files}/base.jsonl]", "--judge.prompts", files / "prompts.txt")
    rubric = files / "rubric.yaml"
    rubric.write_text("instructions: Be fair.")
    options = (*both, "--judge.model", roomy, "--judge.dtype", "float32", "--judge.rubric", rubric)
    run(*options, "--judge.read", "probabilities", "--output", files / "out.json")
    found = json.loads((files / "out.json").read_text())["judge"]
    asked = [pair for pair in PAIRS if pair[0] != pair[1]]
    prompts = [f"Question {i}?" for i, pair in enumerate(PAIRS) if pair[0] != pair[1]]
    expected = differences(load_model(roomy), load_tokenizer(roomy), prompts, asked, read_rubric(rubric).text)
    follow = sum((one[0, 1] > 0) == (one[1, 0] > 0) for one in expected)
    assert found["position_bias"]["count"] == follow and found["judged"] == 4 and not found["missing"]
    run(*options, "--judge.max_new_tokens", 4, code=1)  # a random model writes no verdict
    assert "4 of 4 have no verdict" in capsys.readouterr().err


def test_a_judge_that_cannot_be_asked_is_refused_before_models_answer(files, tiny_folder, tmp_path, monkeypatch):
    bare = tiny_folder(tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr(evaluate.ModelOptions, "load", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="bare has no chat template, which a judge needs"):
        run("--judge.prompts", files / "prompts.txt", "--base", "x", "--judge.model", bare)


@pytest.mark.parametrize(
    "options, line",
    [
        (("--judge.prompts", "p"), "no model is named that answers"),
        (("--judge.model", "m", "--judge.prompts", "p", "--judge.key", "k"), "leave one of them out"),
        (("--judge.model", "m", "--judge.prompts", "p", "--judge.votes", "v"), "name its key with --judge.key"),
        (("--judge.model", "m", "--judge.key", "k", "--adapter", "a"), "adapter has no effect on answers"),
        (("--judge.model", "m", "--judge.key", "k", "--max_rows", "3"), "max_rows has no effect on answers"),
        (("--judge.model", "nosuch", "--judge.prompts", "p", "--base", "b"), "nosuch: no such file or folder"),
        ((*ANY, "--judge.prompts", "p", "--base", "b", "--judge.journal", "p"), "not a line of a judge's journal"),
        ((*ANY, "--judge.prompts", "p"), "judge.by pairs compares two models, and there is one"),
        ((*ANY, "--judge.key", "k", "--also", "[a=b]"), "judge.key is for two models, and also names more"),
        ((*ANY, "--judge.prompts", "p", "--judge.by", "scores", "--judge.scores", "s", "--also", "[a=b]"),
         "judge.scores is for two models"),
        ((*ANY, "--golden", "p", "--judge.by", "scores"), "judge.by has no effect on a golden set"),
        ((*ANY, "--judge.key", "none.json"), "none.json: not the key of a blind comparison"),
        (("--judge.model", "m", "--judge.key", "k", "--judge.max_missing", "2"), "must be a share, 0 to 1"),
        ((*ANY, "--judge.key", "k", "--judge.rubric", "none.md"), "rubric none.md cannot be read"),
        (("--judge.model", "m", "--judge.key", "k", "--judge.read", "probabilities", "--judge.by", "scores"),
         "by scores has no effect"),
        (("--judge.model", "m", "--judge.key", "k", "--judge.read", "probabilities", "--judge.journal", "j"),
         "journal has no effect"),
        (("--judge.model", "m", "--judge.key", "k", "--judge.mode", "x"), "unknown option 'judge.mode'; did you mean"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_together(options, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("Hello\n")
    fixed = ["p.txt" if option == "p" else option for option in options]
    with pytest.raises((CheckpointError, ConfigError, DataError), match=line):
        run(*fixed)
