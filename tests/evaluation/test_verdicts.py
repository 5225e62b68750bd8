"""Only a verdict in the defined form counts; whatever else comes back, or does not, is named and never scored."""

import json

import pytest

from minitune.endpoint import Endpoint, Reply
from minitune.errors import ConfigError, DataError, EndpointError
from minitune.evaluation.rubric import DEFAULT, Rubric, read_rubric
from minitune.evaluation.verdicts import (
    Missing,
    ask_all,
    missing_counts,
    pairwise_question,
    read_scores,
    read_verdict,
    score_question,
)
from tests.chat_server import Answer, chat_server

WORDS = ("A", "B", "TIE")
RUBRIC = Rubric("Judge.", {"clarity": "Clear.", "truth": "True."}, (1, 10))


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("VERDICT: A", "A"),
        ("Both are fine.\n\n  VERDICT: TIE  \n\n", "TIE"),
        ("VERDICT: B\nAs I said:\nVERDICT: B", "B"),
        ("A good question! Answer A is better.", "no line with a verdict"),
        ("", "no line with a verdict"),
        ("verdict: A", "no line with a verdict"),
        ("I say VERDICT: A", "no line with a verdict"),
        ("VERDICT: A or B", "no line with a verdict"),
        ("**VERDICT: A**", "no line with a verdict"),
        ("VERDICT: C", "a verdict of another form"),
        ("VERDICT: PASS", "a verdict of another form"),
        ("VERDICT: A\nVERDICT: B", "two verdicts"),
        ("VERDICT: A\nBut B is good too.", "text after the verdict"),
    ],
)
def test_a_verdict_is_a_line_of_its_own_at_the_end(text, verdict):
    found = read_verdict(Reply(text, True), WORDS)
    assert (found.kind if isinstance(found, Missing) else found) == verdict


def test_a_reply_that_was_cut_off_is_no_verdict():
    assert read_verdict(Reply("VERDICT: A", False), WORDS) == Missing("the reply was cut off")
    assert read_scores(Reply("SCORE clarity: 1\nSCORE truth: 2", False), RUBRIC) == Missing("the reply was cut off")


@pytest.mark.parametrize(
    "text, scores",
    [
        ("Fine.\nSCORE clarity: 7\nSCORE truth: 10", {"clarity": 7, "truth": 10}),
        ("SCORE clarity: 7\nSCORE clarity: 7\nSCORE truth: 1", {"clarity": 7, "truth": 1}),
        ("SCORE clarity: 7", "no score for a criterion"),
        ("clarity: 7\ntruth: 7", "no score for a criterion"),
        ("SCORE clarity: 7/10\nSCORE truth: 7", "no score for a criterion"),
        ("SCORE clarity: 7.5\nSCORE truth: 7", "no score for a criterion"),
        ("SCORE clarity: 7\nSCORE truth: 7\nSCORE wit: 3", "a score for what is no criterion"),
        ("SCORE clarity: 0\nSCORE truth: 7", "a score off the scale"),
        ("SCORE clarity: 7\nSCORE truth: 11", "a score off the scale"),
        ("SCORE clarity: 7\nSCORE truth: 7\nSCORE truth: 8", "two scores for one criterion"),
    ],
)
def test_scores_are_lines_in_the_form_and_on_the_scale(text, scores):
    found = read_scores(Reply(text, True), RUBRIC)
    assert (found.kind if isinstance(found, Missing) else found) == scores


def test_questions_show_what_is_judged_between_marks():
    (asked,) = pairwise_question("Why?", "Because A", "Because B", RUBRIC)
    assert asked["role"] == "user" and asked["content"].startswith("Judge.\n\nCriteria:\n- clarity: Clear.")
    assert "[Answer A]\nBecause A\n[End of answer a]\n\n[Answer B]\nBecause B" in asked["content"]
    (asked,) = score_question("Why?", "Because", Rubric("Judge.", {}, (0, 5)))
    assert asked["content"].endswith("from 0 (worst) to 5 (best) for N:\nSCORE overall: N")


def questions(count: int) -> list:
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


class Judge:
    """Answers with the question's own last word; fails for those in `failing`, and counts what it is asked."""

    def __init__(self, failing=()):
        self.failing, self.asked = set(failing), []

    def __call__(self, conversations):
        words = [conversation[-1]["content"].split()[-1] for conversation in conversations]
        self.asked += words
        if self.failing & set(words):
            raise EndpointError("HTTP 500")
        return [Reply(word, True) for word in words]


def test_a_failure_costs_one_reply():
    judge, steps = Judge({"2"}), []
    found = ask_all(judge, questions(6), at_once=3, on_batch=steps.append)
    assert [one.text if isinstance(one, Reply) else one.kind for one in found] == [
        "0", "1", "the endpoint failed", "3", "4", "5",
    ]  # fmt: skip
    assert missing_counts(found) == {"the endpoint failed": 1}
    assert sum(steps) == 6


def test_an_endpoint_that_is_down_is_not_asked_on():
    judge = Judge(map(str, range(2, 100)))
    found = ask_all(judge, questions(100), at_once=2)
    assert missing_counts(found) == {"the endpoint failed": 4, "not asked, as the endpoint failed before": 94}
    assert len(judge.asked) == 2 + 2 * (2 + 2)  # a good batch, two that fail, and each one of these alone
    judge = Judge({"1", "3", "4", "6", "7", "8"})
    found = ask_all(judge, questions(10), at_once=1)
    assert missing_counts(found) == {"the endpoint failed": 6, "not asked, as the endpoint failed before": 1}


def test_a_question_too_long_for_the_judge_costs_itself_alone():
    class Small(Judge):
        def __call__(self, conversations):
            if any(one[-1]["content"][-1] in "1234" for one in conversations):
                raise DataError("prompt 1 has 9,999 tokens")
            return super().__call__(conversations)

    found = ask_all(Small(), questions(6), at_once=6)
    assert missing_counts(found) == {"too long for the model": 4} and "9,999" in found[1].details
    assert [found[0].text, found[5].text] == ["0", "5"]  # and nothing is taken to be down


def test_a_question_that_comes_twice_is_asked_once():
    judge = Judge()
    found = ask_all(judge, questions(2) * 2)
    assert judge.asked == ["0", "1"] and [one.text for one in found] == ["0", "1", "0", "1"]


def test_a_journal_is_gone_on_with(tmp_path):
    journal = tmp_path / "deep" / "journal.jsonl"
    first = ask_all(Judge({"1", "3"}), questions(4), judge="J", journal=journal, at_once=2)
    assert missing_counts(first) == {"the endpoint failed": 2}
    whole = journal.read_text()
    journal.write_text(whole + whole.splitlines()[0][:25])  # killed in the middle of a line
    again = Judge()
    found = ask_all(again, questions(4), judge="J", journal=journal)
    assert again.asked == ["1", "3"] and [one.text for one in found] == ["0", "1", "2", "3"]
    last = Judge()
    assert ask_all(last, questions(4), judge="J", journal=journal) == found and not last.asked
    other = Judge()
    ask_all(other, questions(4), judge="another", journal=journal)
    assert len(other.asked) == 4  # another judge's replies are not this one's


@pytest.mark.parametrize(
    "line", ['{"prompt": "my data"}', "[1]", "plain text", '{"request": 1, "text": "", "finished": true}']
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match="data.jsonl:1: not a line of a judge's journal"):
        ask_all(Judge(), questions(1), journal=path)
    assert path.read_text() == line


@pytest.mark.parametrize(
    "answer, kind",
    [
        (Answer("VERDICT: A"), None),
        (Answer("VERDICT: A", finish_reason="length"), "the reply was cut off"),
        (Answer(None), "the reply was cut off"),
        (Answer("no"), "no line with a verdict"),
        (Answer(status=500, body={"error": {"message": "boom"}}), "the endpoint failed"),
        (Answer("VERDICT: A", missing=50), "the endpoint failed"),
        (Answer(body={"choices": []}), "the endpoint failed"),
        (Answer(body=b"<html>"), "the endpoint failed"),
        (Answer("VERDICT: A", wait=5), "the endpoint failed"),
    ],
)
def test_what_an_endpoint_can_do_wrong(answer, kind):
    with chat_server(lambda request: answer) as server:
        judge = Endpoint(server.url, "judge", timeout=0.3, retries=0)
        found = ask_all(judge, questions(1))
    read = [one if isinstance(one, Missing) else read_verdict(one, WORDS) for one in found]
    assert (missing_counts(read) or read) == ({kind: 1} if kind else ["A"])


def test_an_endpoint_that_is_not_there():
    with chat_server(lambda request: "") as server:
        url = server.url
    (found,) = ask_all(Endpoint(url, "judge", retries=0), questions(1))
    assert found.kind == "the endpoint failed" and "refused" in found.details


YAML = "instructions: Be fair.\ncriteria:\n  truth: It is true.\n  form: It is short.\nscale: [1, 5]\n"
MARKDOWN = "Be fair.\n\n## Criteria\n\n- truth: It is true.\n- **form**: It is short.\n\n# Scale\n1 to 5\n"


@pytest.mark.parametrize("name, text", [("r.yaml", YAML), ("r.yml", YAML), ("r.md", MARKDOWN)])
def test_a_rubric_as_yaml_and_as_markdown(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    expected = Rubric("Be fair.", {"truth": "It is true.", "form": "It is short."}, (1, 5))
    assert read_rubric(tmp_path / name) == expected


def test_the_default_rubric_ships():
    found = read_rubric()
    assert DEFAULT.is_file() and list(found.criteria) == ["correctness", "relevance", "clarity"]
    assert found.scale == (1, 10)


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("r.yaml", "", "holds null"),
        ("r.yaml", "- a", "holds a list"),
        ("r.yaml", "criteria: {a: b}", "there are no instructions"),
        ("r.yaml", "instructions: x\ninstructions: y", "r.yaml:2: instructions is given twice"),
        ("r.yaml", "instructions: x\ncriterion: {a: b}", "unknown key 'criterion'; did you mean 'criteria'"),
        ("r.yaml", "instructions: x\ncriteria: {a: 1}", "criteria must be names"),
        ("r.yaml", "instructions: x\ncriteria: {'a:b': c}", "criteria must be names"),
        ("r.yaml", "instructions: x\nscale: [5, 1]", "the scale is \\[5, 1\\]"),
        ("r.yaml", "instructions: x\nscale: [1, 2.5]", "the scale is"),
        ("r.yaml", "instructions: [", "broken YAML"),
        ("r.yaml", "instructions: 2020-99-99", "broken YAML"),
        ("r.md", "## Criteria\n- a: b", "there are no instructions"),
        ("r.md", "x\n## Criteria\nprose", "each line is '- name: text'"),
        ("r.md", "x\n## Scale\nmany", "the scale is many"),
        ("r.md", "x\n## Scale\n1 to 5\n## Scale\n1 to 6", "'scale' is given twice"),
        ("r.txt", "x", "unknown kind of file '.txt'"),
    ],
)
def test_a_malformed_rubric_is_one_line(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=line):
        read_rubric(tmp_path / name)


def test_rubrics_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rubric(tmp_path / "none.yaml")
    (tmp_path / "latin.md").write_bytes("Sch\xf6n".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rubric(tmp_path / "latin.md")


def test_a_journal_holds_what_was_said(tmp_path):
    ask_all(Judge(), questions(1), journal=tmp_path / "j.jsonl")
    (line,) = (json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines() if line)
    assert (line["text"], line["finished"], len(line["request"])) == ("0", True, 16)
