"""Kappa against scikit-learn and by hand; wins and their intervals against scipy."""

import random

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from minitune.endpoint import Reply
from minitune.errors import DataError
from minitune.evaluation import agreement as agreement_module
from minitune.evaluation import wins as wins_module
from minitune.evaluation.agreement import agreement, kappa_statistics
from minitune.evaluation.answers import Duel
from minitune.evaluation.wins import OUTCOMES, Share, count_wins, longer_wins
from tests.kernels.proof import mutant

WEIGHTS = ("none", "linear", "quadratic")


def judged(rows: int, labels: int, seed: int) -> tuple[list[int], list[int]]:
    """Two judges who agree on about half of the rows."""
    lots = random.Random(seed)
    first = [lots.randrange(labels) for _ in range(rows)]
    return first, [one if lots.random() < 0.5 else lots.randrange(labels) for one in first]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows, labels, seed", [(5, 2, 0), (40, 3, 1), (300, 10, 2)])
def test_kappa_equals_scikit_learn(rows, labels, seed, weights):
    first, second = judged(rows, labels, seed)
    expected = cohen_kappa_score(first, second, labels=range(labels), weights=None if weights == "none" else weights)
    found = kappa_statistics(first, second, range(labels), weights)
    assert found.value == pytest.approx(expected, abs=1e-12)


def test_kappa_by_hand():
    """Of 10 rows: both yes 4, both no 3. Observed 0.7, chance 0.5 x 0.6 + 0.5 x 0.4 = 0.5; (0.7 - 0.5) / 0.5 = 0.4."""
    first, second = list("yyyyynnnnn"), list("yyyynyynnn")
    found = agreement(first, second, ("y", "n"))
    assert (found.rows, found.share) == (10, 0.7)
    assert found.kappa == pytest.approx(0.4)


def test_a_near_miss_costs_less_with_weights():
    near, far = ["tuned", "tie", "base"] * 4, ["tie", "tie", "base"] * 4
    other = ["base", "tie", "base"] * 4
    assert agreement(near, far, OUTCOMES, "linear").kappa > agreement(near, other, OUTCOMES, "linear").kappa


def test_interval_is_that_of_a_bootstrap_written_out():
    first, second = judged(60, 3, 7)
    lots = np.random.default_rng(0)
    draws = [lots.integers(0, 60, 60) for _ in range(400)]
    scores = [cohen_kappa_score(np.array(first)[rows], np.array(second)[rows], labels=[0, 1, 2]) for rows in draws]
    found = agreement(first, second, (0, 1, 2)).kappa_interval
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.05)


def test_no_certainty_is_claimed_where_a_judge_never_varies():
    both = agreement("yyy", "yyy", ("y", "n"))
    assert (both.share, both.kappa, both.kappa_interval) == (1.0, None, None)
    one = agreement("yyyy", "ynyn", ("y", "n"))
    assert (one.share, one.kappa, one.kappa_interval) == (0.5, 0.0, None)


@pytest.mark.parametrize(
    "first, second, line",
    [("yn", "y", "2 labels of one judge and 1"), ("y?", "yn", "the label '\\?' is none of y, n"), ("", "", "no row")],
)
def test_rows_that_do_not_fit_are_refused(first, second, line):
    with pytest.raises(DataError, match=line):
        agreement(first, second, ("y", "n"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("observed.sum(-1, keepdim=True) * observed.sum(-2, keepdim=True)", "observed * observed"),
        ("place[one] * len(labels) + place[other]", "place[one] * len(labels) + place[one]"),
        ('"quadratic": apart**2', '"quadratic": apart'),
    ],
)
def test_a_mutant_of_kappa_is_caught(tmp_path, old, new):
    first, second = judged(40, 3, 1)
    found = mutant(agreement_module, tmp_path, old, new).kappa_statistics(first, second, range(3), "quadratic").value
    assert abs(found - cohen_kappa_score(first, second, weights="quadratic")) > 1e-3


@pytest.mark.parametrize("wins, ties, losses", [(7, 0, 2), (30, 11, 12), (1, 5, 9), (0, 0, 3)])
def test_wins_by_scipy(wins, ties, losses):
    outcomes = ["tuned"] * wins + ["tie"] * ties + ["base"] * losses
    found = count_wins(outcomes).numbers()
    test = binomtest(wins, wins + losses, 0.5)
    assert found["p"] == pytest.approx(test.pvalue, abs=1e-12)
    assert found["verdict"] == ("undecided" if test.pvalue >= 0.05 else "wins" if wins > losses else "loses")
    edges = test.proportion_ci(0.95, method="wilson")
    assert found["decided"]["interval"] == pytest.approx([edges.low, edges.high], abs=1e-12)
    assert found["win_rate"]["value"] == (wins + ties / 2) / len(outcomes)
    if not ties:
        assert found["win_rate"]["interval"] == found["decided"]["interval"]


def test_a_tie_counted_as_a_win_is_caught(tmp_path):
    found = mutant(wins_module, tmp_path, "self.wins + self.ties / 2,", "self.wins + self.ties,")
    assert found.count_wins(["tuned", "tie", "base"]).numbers()["win_rate"]["value"] != 0.5


def test_the_interval_with_ties_holds_in_repeated_samples():
    """Outcomes with a true win rate of 0.6 (wins 0.4, ties 0.4): at least 95 of 100 intervals hold it."""
    lots, held = random.Random(0), 0
    for _ in range(400):
        outcomes = lots.choices(OUTCOMES, (0.4, 0.4, 0.2), k=40)
        low, high = count_wins(outcomes).numbers()["win_rate"]["interval"]
        held += low <= 0.6 <= high
    assert held >= 0.95 * 400


def test_the_longer_answer():
    def duel(tuned: str, base: str) -> Duel:
        return Duel("?", Reply(tuned, True), Reply(base, True))

    rows = [
        ("tuned", duel("long one", "short")), ("base", duel("long one", "short")), ("base", duel("no", "yes")),
        ("tie", duel("aaaa", "b")), ("tuned", duel("same", "size")), ("tuned", duel("  a ", "b")),
    ]  # fmt: skip
    assert longer_wins(rows) == Share(2, 3)  # ties, and answers of one length but for space, tell nothing
    assert longer_wins([]).numbers() == {"value": None, "interval": None, "count": 0, "rows": 0}


def test_nothing_judged_is_refused():
    with pytest.raises(DataError, match="nothing was judged"):
        count_wins([])
