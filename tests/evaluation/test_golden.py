"""Expectations one by one, what is malformed, the difference row by row, and the command from end to end."""

import json
import re
import time

import pytest

from minitune import evaluate
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError
from minitune.evaluation import golden, golden_diff
from minitune.evaluation.answers import read_answers
from minitune.evaluation.comparison import mcnemar
from minitune.evaluation.verdicts import Missing
from tests.chat_server import chat_server
from tests.kernels.proof import mutant


@pytest.fixture
def write(tmp_path):
    """Write rows, or text as it is, as golden.jsonl; return its path."""

    def writer(*rows):
        path = tmp_path / "golden.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return writer


SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "expect, holding, failing",
    [
        ({"exact": "Yes"}, ["Yes", " Yes\n"], ["yes", "Yes.", "Yes, yes"]),
        ({"exact": ["Yes", "No"]}, ["Yes", "No"], ["Yes No"]),
        ({"contains": "Paris"}, ["It is Paris."], ["paris", "London"]),
        ({"contains": ["a", "b"]}, ["b and a"], ["a", "b"]),
        ({"not_contains": "sorry"}, ["Sure", "Sorry"], ["I am sorry"]),
        ({"not_contains": ["x", "y"]}, ["a"], ["x", "y"]),
        ({"regex": "\\d{3}"}, ["call 112", "1234"], ["12"]),
        ({"regex": "^\\d+$"}, ["12"], ["12 apples"]),
        ({"regex": ["(?i)YES", "!$"]}, ["yes!"], ["yes", "no!"]),
        ({"schema": SCHEMA}, ['{"a": 1}', ' {"a": 1, "b": 2}\n'], ['{"a": "1"}', "{}", '{"a": 1', '```{"a": 1}```']),
        ({"contains": "a", "not_contains": "b"}, ["a"], ["ab", "c", "b"]),
    ],
)
def test_each_expectation(write, expect, holding, failing):
    (row,) = golden.read_golden(write({"prompt": "?", "expect": expect}))
    texts = [*holding, *failing, "", "  \n"]
    found = golden.check([row] * len(texts), [Reply(text, True) for text in texts])
    assert [one.passed for one in found] == [text in holding for text in texts]
    assert all(one.passed != bool(one.reasons) for one in found)
    assert found[-1].reasons == ("is empty",)


@pytest.mark.parametrize(
    "expect, passes",
    [({"contains": "Paris"}, True), ({"contains": "London"}, False), ({"not_contains": "London"}, False),
     ({"exact": "Paris"}, False), ({"regex": "Paris"}, False), ({"schema": {}}, False), ({"judge": "x"}, False),
     ({"contains": "Paris", "regex": "P"}, False)],
)  # fmt: skip
def test_of_an_answer_that_was_cut_off_only_what_it_contains_is_known(write, expect, passes):
    rows = golden.read_golden(write({"prompt": "?", "expect": expect}))
    (found,) = golden.check(rows, [Reply("Paris", False)], judge=lambda asked: pytest.fail("not asked"))
    assert found.passed == passes and not found.judged


def test_a_schema_from_a_file_beside_the_set(write, tmp_path):
    (tmp_path / "answer.schema.json").write_text(json.dumps(SCHEMA))
    (row,) = golden.read_golden(write({"prompt": "?", "expect": {"schema": "answer.schema.json"}}))
    assert [row.schema(text) for text in ('{"a": 1}', "{}")] == [True, False]


def test_a_judge_is_asked_only_where_the_rest_holds(write):
    asked = []

    def judge(questions):
        asked.extend(questions)
        replies = {"good": "VERDICT: PASS", "bad": "It is rude.\nVERDICT: FAIL", "odd": "PASS", "down": None}
        texts = [replies[re.search(r"\[Answer\]\n(\w+)", one[0]["content"])[1]] for one in questions]
        return [Missing("the endpoint failed") if text is None else Reply(text, True) for text in texts]

    row = {"prompt": "Greet me.", "expect": {"judge": "It is polite.", "not_contains": "wrong"}}
    rows = golden.read_golden(write(*[row] * 5))
    found = golden.check(rows, [Reply(text, True) for text in ("good", "bad", "odd", "down", "wrong")], judge)
    assert [one.passed for one in found] == [True, False, False, False, False]
    assert [one.no_verdict for one in found] == [False, False, True, True, False]
    assert [one.judged for one in found] == [True, True, True, True, False]
    assert found[1].reasons == ("judge: It is rude. VERDICT: FAIL",)
    assert len(asked) == 4 and "[Expected]\nIt is polite.\n" in asked[0][0]["content"]


def test_a_pattern_that_runs_for_ever_is_named(write, monkeypatch):
    monkeypatch.setattr("minitune.evaluation.patterns.SECONDS", 0.5)
    rows = [{"prompt": "?", "expect": {"regex": "a"}}, {"prompt": "?", "expect": {"regex": "(a+)+$"}}]
    rows = golden.read_golden(write(*rows))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"golden.jsonl:2: the pattern '\(a\+\)\+\$' ran for more than 1 s"):
        golden.check(rows, [Reply("a" * 40 + "b", True)] * 2)
    assert time.monotonic() - began < 10


ROW = {"prompt": "?", "expect": {"contains": "x"}}


@pytest.mark.parametrize(
    "row, line",
    [
        ({"prompt": "?"}, "1: 'expect' is null"),
        ({"prompt": "?", "expect": {}}, "1: 'expect' is empty"),
        ({"prompt": "?", "expect": "x"}, "1: 'expect' is a str"),
        ({"prompt": "?", "expect": {"contain": "x"}}, "unknown expectation 'contain'; did you mean 'contains'"),
        ({"prompt": "?", "expect": {"contains": 3}}, "'contains' is neither a text nor a list of texts"),
        ({"prompt": "?", "expect": {"contains": []}}, "'contains' is an empty list"),
        ({"prompt": "?", "expect": {"contains": ""}}, "none of them empty"),
        ({"prompt": "?", "expect": {"regex": "("}}, "the pattern '\\(' is broken"),
        ({"prompt": "?", "expect": {"schema": {"type": "objekt"}}}, "no JSON schema"),
        ({"prompt": "?", "expect": {"schema": []}}, "the schema is a list"),
        ({"prompt": "?", "expect": {"schema": "none.json"}}, "none.json"),
        ({"prompt": "?", "expect": {"judge": " "}}, "'judge' is no text"),
        (ROW | {"tag": "a"}, "unknown key 'tag'; did you mean 'tags'"),
        (ROW | {"tags": [1]}, "'tags' is neither"),
        (ROW | {"id": True}, "the id is True"),
        (ROW | {"messages": []}, "one of 'prompt' and 'messages'"),
        ({"expect": {"contains": "x"}}, "one of 'prompt' and 'messages'"),
        (ROW | {"prompt": ""}, "a row without a question"),
        ({"messages": [{"role": "assistant", "content": "x"}], "expect": {"exact": "x"}}, "is the assistant's"),
        ({"messages": [{"role": "robot", "content": "x"}], "expect": {"exact": "x"}}, "unknown role 'robot'"),
        ("{broken", "broken JSON"),
        ('{"prompt": "a", "prompt": "b", "expect": {"exact": "x"}}', "'prompt' is given twice"),
    ],
)
def test_a_malformed_row_is_one_line(write, row, line):
    with pytest.raises(DataError, match=line) as error:
        golden.read_golden(write(row))
    assert "golden.jsonl:1" in str(error.value) and "\n" not in str(error.value)


def test_an_id_given_twice_and_the_number_of_other_errors(write):
    with pytest.raises(DataError, match="golden.jsonl:2: the id 'a' is that of .*golden.jsonl:1 too"):
        golden.read_golden(write(ROW | {"id": "a"}, ROW | {"id": "a"}))
    with pytest.raises(DataError, match=r"\(2 more such rows\)"):
        golden.read_golden(write(*[{"prompt": "?"}] * 3))


@pytest.fixture
def two(write):
    """Four rows and two models: broken, fixed, same-fail, same-pass."""
    names = ("b1", "f1", "s1", "s2")
    rows = [{"id": one, "prompt": f"{one}?", "expect": {"contains": "x"}, "tags": [one[0]]} for one in names]
    rows = golden.read_golden(write(*rows))
    tuned, base = ([Reply(text, True) for text in texts] for texts in (("a", "x", "b", "x"), ("x", "c", "d", "x <b>")))
    return rows, (tuned, golden.check(rows, tuned)), (base, golden.check(rows, base))


def test_the_difference_row_by_row(two):
    found = golden_diff.report(*two)
    assert [one["change"] for one in found["answers"]] == ["broken", "fixed", "same-fail", "same-pass"]
    assert found["changes"] == {"broken": 1, "fixed": 1, "same-fail": 1, "same-pass": 1, "no-verdict": 0}
    assert [found[side]["pass_rate"]["passed"] for side in ("tuned", "base")] == [2, 2]
    assert found["tuned"]["tags"]["s"]["passed"] == 1 and found["base"]["tags"]["b"]["value"] == 1.0
    compared = found["comparison"]
    assert (compared["gained"], compared["lost"], compared["p"]) == (1, 1, mcnemar(1, 1))
    assert compared["test"] == "McNemar's exact test" and compared["verdict"] == "undecided"
    lines = golden_diff.lines(found)
    text = "\n".join(lines)
    assert text.index("BROKEN b1") < text.index("FIXED f1") and "same-fail" in text
    beside = next(line for line in lines if line.startswith("x ") and "|" in line)
    assert beside.split("|")[1].strip() == "a"  # the base's answer, then the tuned model's


def test_a_row_without_a_verdict_is_no_gain(two):
    rows, tuned, (replies, checked) = two
    checked = [golden.Checked(False, ("no verdict",), judged=True, no_verdict=True), checked[1], *checked[2:]]
    found = golden_diff.report(rows[1:], (tuned[0][1:], tuned[1][1:]), (replies[1:], [checked[0], *checked[2:]]))
    assert [one["change"] for one in found["answers"]] == ["no-verdict", "same-fail", "same-pass"]  # not "fixed"
    assert (found["comparison"]["gained"], found["comparison"]["p"]) == (0, 1.0)
    assert "no-verdict: 1" in golden_diff.page_of(found, {"tuned": "a", "base": "b"})
    none = golden_diff.report(rows[:1], (tuned[0][:1], tuned[1][:1]), (replies[:1], checked[:1]))
    assert none["comparison"] is None and "not compared" in "\n".join(golden_diff.lines(none))


def test_a_swapped_change_is_caught(two, tmp_path):
    wrong = mutant(golden_diff, tmp_path, '"fixed" if tuned["passed"]', '"fixed" if base["passed"]')
    assert wrong.report(*two)["answers"] != golden_diff.report(*two)["answers"]


def test_the_page_holds_every_row_and_escapes_it(two):
    names = {"tuned": "mine", "base": "theirs"}
    page = golden_diff.page_of(golden_diff.report(*two), names)
    assert "mine" in page and "theirs" in page
    assert "x &lt;b&gt;" in page and "<b>" not in page and "http" not in page.split("<body>")[1]
    assert page.index("broken: 1") < page.index("fixed: 1") < page.index("same-fail: 1") < page.index("same-pass: 1")
    assert all(f"{name}?" in page for name in ("b1", "f1", "s1", "s2"))
    alone = golden_diff.page_of(golden_diff.report(*two[:2]), names)
    assert "FAIL: 2" in alone and "pass: 2" in alone


def test_control_characters_do_not_reach_the_terminal(write):
    rows = golden.read_golden(write({"prompt": "?\x1b[2J", "expect": {"contains": "x"}}))
    replies = [Reply("\x1b[31mred\u202e", True)]
    lines = golden_diff.lines(golden_diff.report(rows, (replies, golden.check(rows, replies))))
    assert not [line for line in lines if re.search("[\x00-\x08\x0b-\x1f\u202e]", line)]


def run(*options, code=0) -> None:
    assert evaluate.main([str(option) for option in options]) == code


def answers(path, *texts):
    path.write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts))
    return path


def test_from_answers_by_the_command(write, tmp_path, capsys):
    rows = write(*[{"prompt": f"{i}?", "expect": {"exact": "yes"}} for i in range(12)])
    tuned, base = answers(tmp_path / "t.jsonl", *["yes"] * 12), answers(tmp_path / "b.jsonl", *["no"] * 12)
    page, output = tmp_path / "page.html", tmp_path / "out.json"
    run("--golden", rows, "--answers", f"[{tuned},{base}]", "--golden_page", page, "--output", output)
    printed = capsys.readouterr().out
    assert "the tuned model passes more rows: +100.0%" in printed and "12 fixed" in printed
    assert "(2 more rows changed; --golden_page shows all)" in printed
    assert json.loads(output.read_text())["golden"]["comparison"]["p"] == pytest.approx(2 / 2**12)
    assert page.read_text().count('<section class="row">') == 12
    with pytest.raises(ConfigError, match="page.html is there already"):
        run("--golden", rows, "--answers", tuned, "--golden_page", page)
    run("--golden", rows, "--answers", base)
    assert "0 of 12 pass, 0.0%" in capsys.readouterr().out


def test_a_model_answers_by_the_command(write, tiny_folder, tmp_path, capsys):
    tiny = tiny_folder(tmp_path / "model")
    rows = write({"prompt": "Hi", "expect": {"not_contains": "x"}}, {"messages": [{"role": "user", "content": "Ho"}],
                                                                     "expect": {"regex": "."}})  # fmt: skip
    output = tmp_path / "out.json"
    run("--model", tiny, "--dtype", "float32", "--base", tiny, "--golden", rows, "--max_new_tokens", 4,
        "--output", output)  # fmt: skip
    found = json.loads(output.read_text())["golden"]
    assert found["changes"]["broken"] == found["changes"]["fixed"] == 0  # a model against itself
    assert [one["tuned"]["answer"] for one in found["answers"]] == [one["base"]["answer"] for one in found["answers"]]
    assert "McNemar's exact test, p = 1" in capsys.readouterr().out


def test_a_judge_behind_an_endpoint_by_the_command(write, tmp_path, capsys):
    rows = write(*[{"prompt": f"{i}?", "expect": {"judge": "It says yes."}} for i in range(3)])
    given = answers(tmp_path / "t.jsonl", "yes", "no", "hm")

    def says(request):
        text = re.search(r"\[Answer\]\n(\w+)", request["messages"][-1]["content"])[1]
        return {"yes": "VERDICT: PASS", "no": "VERDICT: FAIL", "hm": "Who knows?"}[text]

    with chat_server(says) as server:
        judge = ("--judge.model", "any", "--judge.endpoint", server.url)
        run("--golden", rows, "--answers", given, *judge, code=1)
        captured = capsys.readouterr()
        assert "1 of 3 pass" in captured.out
        assert "1 of 3 rows that a judge was asked about have no verdict" in captured.out
        assert "error: 1 of 3 have no verdict, more than judge.max_missing 0.1" in captured.err
        run("--golden", rows, "--answers", given, *judge, "--judge.max_missing", "0.4", code=0)


@pytest.mark.parametrize(
    "options, line",
    [
        (("--golden_page", "p.html", "--perplexity", "x.txt"), "golden_page is set without golden"),
        (("--answers", "a.jsonl", "--perplexity", "x.txt"), "answers is set without golden or blind or judge"),
        (("--golden", "g.jsonl", "--answers", "a", "--adapter", "b"), "adapter has no effect on answers"),
        (("--golden", "g.jsonl", "--answers", "a", "--max_new_tokens", "9"), "max_new_tokens has no effect on answers"),
        (("--judge.model", "m", "--perplexity", "x.txt"), "judge.model has nothing to judge"),
        (("--golden", "g.jsonl", "--golden_page", "p", "--also", "[a=b]"), "golden_page is for two models"),
    ],
)
def test_options_that_make_no_sense_together(options, line):
    with pytest.raises(ConfigError, match=line):
        run(*options)


def test_a_judge_that_is_missing_or_idle_is_named(write, tmp_path):
    given = answers(tmp_path / "t.jsonl", "yes")
    with pytest.raises(ConfigError, match="golden.jsonl:1 expects a judge's verdict"):
        run("--golden", write({"prompt": "?", "expect": {"judge": "x"}}), "--answers", given)
    with pytest.raises(ConfigError, match="no row of .*golden.jsonl expects a judge's verdict"):
        run("--golden", write(ROW), "--answers", given, "--judge.model", "m")
    with pytest.raises(ConfigError, match="answers names 3 files"):
        run("--golden", write(ROW), "--answers", f"[{given},{given},{given}]")


def test_answers_are_those_of_the_same_prompts(write, tmp_path):
    rows = golden.read_golden(write(ROW | {"system": "Be brief."}, {"prompt": "Two?", "expect": {"contains": "x"}}))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "?", "answer": "x"}\n{"messages": [{"role": "user", "content": "Two?"}], "answer": "y",'
                    ' "finished": false}\n')  # fmt: skip
    assert read_answers(path, [row.record for row in rows]) == [Reply("x", True), Reply("y", False)]


def test_a_gate_holds_the_command_to_the_golden_set(write, tmp_path, capsys):
    rows = write(*[{"prompt": f"{i}?", "expect": {"exact": "yes"}, "tags": ["facts"]} for i in range(4)])
    tuned, base = answers(tmp_path / "t.jsonl", *["yes"] * 3, "no"), answers(tmp_path / "b.jsonl", *["no"] * 4)
    given = f"[{tuned},{base}]"
    run("--golden", rows, "--answers", given, "--require", "pass_rate>=0.75", "--require", "facts>=0.75")
    run("--golden", rows, "--answers", given, "--require", "pass_rate.low>=0.75", code=3)
    assert "gate FAILED: pass_rate.low>=0.75 (golden.tuned.pass_rate.low is" in capsys.readouterr().out
