"""Simulated judges, whose bias is known: an honest one, those that take a place or length, one of nonsense."""

import random
import re

import pytest

from minitune.endpoint import Reply
from minitune.evaluation import judge as judge_module
from minitune.evaluation import judging
from minitune.evaluation.answers import Duel
from minitune.evaluation.rubric import Rubric
from minitune.evaluation.verdicts import Missing
from tests.kernels.proof import mutant

RUBRIC = Rubric("Judge.", {"clarity": "Clear.", "truth": "True."})


def duel(tuned: str, base: str) -> Duel:
    return Duel("How good?", Reply(tuned, True), Reply(base, True))


def shown(conversation) -> tuple[str, str]:
    """The two answers that a judge is shown."""
    return tuple(re.findall(r"\[Answer [AB]\]\n(.*?)\n\[End", conversation[-1]["content"], re.DOTALL))


def says(choose):
    """A responder whose verdict is a function of the two answers."""
    return lambda conversations: [Reply(f"Hm.\nVERDICT: {choose(*shown(one))}", True) for one in conversations]


def quality(text: str) -> int:
    return int(text.split()[0])


def honest(first, second):
    return "A" if quality(first) > quality(second) else "B" if quality(first) < quality(second) else "TIE"


DUELS = [duel("3 good", "1 bad"), duel("1 bad", "2 fair and long"), duel("5 as", "5 so"), duel("same", "same "),
         duel("9 x", "8 y and more")]  # fmt: skip


def result(choose, duels=DUELS, votes=None):
    return judging.pairwise_result(duels, judging.pairwise_verdicts(duels, RUBRIC, says(choose)), votes)


def test_an_honest_judge_has_no_bias_of_place():
    found = result(honest)
    assert found["outcomes"] == ["tuned", "base", "tie", "tie", "tuned"]
    assert (found["duels"], found["identical"], found["judged"], found["without_verdict"]) == (5, 1, 4, 0)
    assert (found["position_bias"]["value"], found["position_bias"]["rows"]) == (0.0, 4)
    assert (found["wins"]["wins"], found["wins"]["ties"], found["wins"]["losses"]) == (2, 2, 1)
    assert found["longer"]["count"] == 2 and found["longer"]["rows"] == 3


@pytest.mark.parametrize("place, first", [("A", 1.0), ("B", 0.0)])
def test_a_judge_that_takes_a_place_decides_nothing(place, first):
    found = result(lambda *_: place)
    assert set(found["outcomes"]) == {"tie"}
    assert found["position_bias"]["value"] == 1.0 and found["first_place"]["value"] == first
    assert found["wins"]["verdict"] == "undecided"


def test_a_bias_is_estimated():
    """A judge that follows the place in 3 of 10 duels, by lot, and is honest in the others."""
    lots = random.Random(0)
    duels = [duel(f"{lots.randrange(2) * 2} t{i}", f"1 b{i}") for i in range(300)]
    biased = {f"t{i}" for i in range(300) if lots.random() < 0.3}

    def choose(first, second):
        return "A" if biased & {first.split()[1], second.split()[1]} else honest(first, second)

    found = result(choose, duels)
    low, high = found["position_bias"]["interval"]
    assert found["position_bias"]["count"] == len(biased) and low < 0.3 < high
    assert found["first_place"]["value"] == 1.0


def test_a_judge_of_length_shows():
    found = result(lambda first, second: "A" if len(first) > len(second) else "B")
    assert found["longer"]["value"] == 1.0 and found["longer"]["rows"] == 3  # of one length the place decides: a tie


def test_a_tie_in_one_order_is_a_tie():
    found = result(lambda first, second: "A" if quality(first) > quality(second) else "TIE")
    assert set(found["outcomes"]) == {"tie"} and found["position_bias"]["value"] == 0.0


def test_nonsense_is_counted_and_scores_nothing():
    """One duel's verdict is lost in one order, another's in both."""

    def reply(conversation):
        first, second = shown(conversation)
        if first.startswith("3"):
            return Reply("A is fine", True)
        return Reply(f"VERDICT: {honest(first, second)}", "5" not in first)

    verdicts = judging.pairwise_verdicts(DUELS, RUBRIC, lambda conversations: list(map(reply, conversations)))
    found = judging.pairwise_result(DUELS, verdicts)
    assert found["outcomes"] == [None, "base", None, "tie", "tuned"]
    assert found["missing"] == {"no line with a verdict": 1, "the reply was cut off": 2}
    assert (found["judged"], found["without_verdict"]) == (2, 2)
    assert found["wins"]["win_rate"]["rows"] == 3
    assert any("no verdict: the reply was cut off, 2" in line for line in judging.lines(found))


def test_without_a_verdict_there_is_no_win_rate():
    found = judging.pairwise_result(
        DUELS, judging.pairwise_verdicts(DUELS, RUBRIC, lambda asked: [Reply("", True)] * len(asked))
    )
    assert "wins" not in found and found["without_verdict"] == 4


def test_identical_answers_are_not_asked_about():
    asked = []

    def judge(conversations):
        asked.extend(conversations)
        return says(honest)(conversations)

    judging.pairwise_verdicts(DUELS, RUBRIC, judge)
    assert len(asked) == 2 * 4 and {shown(one) for one in asked} >= {("3 good", "1 bad"), ("1 bad", "3 good")}


def test_agreement_is_with_votes_on_the_same_duels():
    votes = {0: "tuned", 1: "tuned", 2: "tie", 4: "tuned"}
    found = result(honest, votes=votes)["agreement"]
    from sklearn.metrics import cohen_kappa_score

    pair = ["tuned", "base", "tie", "tuned"], ["tuned", "tuned", "tie", "tuned"]
    assert (found["rows"], found["share"]) == (4, 0.75)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*pair))
    labels = ["tuned", "tie", "base"]
    assert found["linear_kappa"] == pytest.approx(cohen_kappa_score(*pair, labels=labels, weights="linear"))
    unknown = judging.pairwise_result(DUELS[:1], [("A", Missing("x"))], {0: "tuned"})
    assert unknown["agreement"] is None and "not known" in judging.agreement_text(unknown["agreement"])


def test_scores_compare_on_rows_where_both_have_them():
    def judge(conversations):
        replies = []
        for one in conversations:
            level = quality(re.search(r"\[Answer\]\n(.*?)\n", one[-1]["content"])[1])
            replies.append(Reply(f"SCORE clarity: {level}\nSCORE truth: 5" if level != 2 else "Splendid!", True))
        return replies

    duels = [DUELS[0], DUELS[1], DUELS[2], DUELS[4]]
    sides = [[getattr(one, side).text for one in duels] for side in ("tuned", "base")]
    scored = [judging.score_answers(["?"] * 4, texts, RUBRIC, judge) for texts in sides]
    found = judging.scored_result(*scored, duels=duels, votes={0: "tuned", 2: "tie", 3: "base"})
    assert (found["judged"], found["without_verdict"]) == (3, 1)
    assert found["missing"] == {"no score for a criterion": 1}
    assert found["scores"]["clarity"]["value"] == pytest.approx((3 + 5 + 9) / 3)
    assert found["base"]["clarity"]["value"] == pytest.approx((1 + 5 + 8) / 3)
    assert found["scores"]["all criteria"]["value"] == pytest.approx((4 + 5 + 7) / 3)
    assert found["agreement"]["share"] == pytest.approx(2 / 3)  # the judge: tuned, tie, tuned
    alone = judging.scored_result(scored[0])
    assert alone["scores"]["truth"]["value"] == 5 and "comparison" not in alone
    assert any("clarity" in line for line in judging.lines(found))


@pytest.mark.parametrize(
    "old, new",
    [
        ('{("A", "B"): "tuned", ("B", "A"): "base"}', '{("A", "A"): "tuned", ("B", "B"): "base"}'),
        ("((ours, theirs), (theirs, ours))", "((ours, theirs), (ours, theirs))"),  # one order twice
        ('{("A", "B"): "tuned", ("B", "A"): "base"}', '{("A", "B"): "base", ("B", "A"): "tuned"}'),
    ],
)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(judging, tmp_path, old, new)
    found = wrong.pairwise_result(DUELS, wrong.pairwise_verdicts(DUELS, RUBRIC, says(honest)))
    assert found["outcomes"] != ["tuned", "base", "tie", "tie", "tuned"]


def test_differences_are_what_rank_stands_on(monkeypatch):
    """`rank` is tested against transformers; here that it reads the same d in both orders."""
    monkeypatch.setattr(
        judge_module, "differences", lambda *_: [{(0, 1): 2.0, (1, 0): -1.0}, {(0, 1): 2.0, (1, 0): 1.0}]
    )
    assert judge_module.rank(None, None, ["?", "?"], [["a", "b"], ["c", "d"]]) == [[1.0, 0.0], [0.5, 0.5]]
