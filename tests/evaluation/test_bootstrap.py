"""The bootstrap against numpy's, the normal interval and scipy; McNemar's test against scipy's binomial test."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from minitune.errors import ConfigError, DataError
from minitune.evaluation import bootstrap
from minitune.evaluation.bootstrap import interval, mean_of, paired_difference, ratio_of
from minitune.evaluation.comparison import BOOTSTRAP, MCNEMAR, compare, compare_right, mcnemar


def values(rows: int, seed: int = 0) -> list[float]:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def test_of_two_rows_the_interval_is_derived():
    # Resamples of (0, 1) have mean 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so the 2.5% and 97.5% quantiles are 0 and 1,
    # and of the middle 40% both are 1/2.
    assert interval(mean_of([0, 1])) == (0.0, 1.0)
    assert interval(mean_of([0, 1]), confidence=0.4) == (0.5, 0.5)
    assert interval(mean_of([3.0])) == (3.0, 3.0)


def test_the_interval_of_a_mean_is_near_scipys_and_the_normal_one():
    found = values(400)
    low, high = interval(mean_of(found), resamples=20_000)
    half = 1.96 * np.std(found) / 20
    assert (low, high) == pytest.approx((np.mean(found) - half, np.mean(found) + half), abs=0.004)
    peer = stats.bootstrap((found,), np.mean, n_resamples=5000, method="percentile", rng=1, batch=500)
    assert (low, high) == pytest.approx(tuple(peer.confidence_interval), abs=0.006)


def test_a_ratio_resamples_rows_not_its_parts():
    # Rows (1, 2) and (3, 1): sums of two draws give 2/4, 4/3, 6/2.
    found = ratio_of([1, 3], [2, 1])
    assert found.value == pytest.approx(4 / 3)
    assert interval(found) == pytest.approx((1 / 2, 3))
    assert ratio_of([0], [0]).value == 0


def test_it_covers_the_truth_about_as_often_as_it_says():
    hits = sum(low <= 0 <= high for low, high in (interval(mean_of(values(60, s)), resamples=300) for s in range(300)))
    assert 0.90 <= hits / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_another_seed_another(monkeypatch):
    found = mean_of(values(50))
    assert interval(found) == interval(found) != interval(found, seed=1)
    monkeypatch.setattr(bootstrap, "ENTRIES", 50 * 7)  # resamples in groups of 7: still all of them
    assert sum(len(part) for part in bootstrap._weights(50, 100, 0)) == 100


def test_pairing_cancels_what_is_hard_for_both():
    hard = [10 * value for value in values(200)]
    ours, theirs = mean_of([value + 0.1 for value in hard]), mean_of(hard)
    difference, low, high = paired_difference(ours, theirs)
    assert (difference, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert interval(theirs)[1] > interval(ours)[0]  # the two intervals overlap widely
    found = compare(ours, theirs)
    assert (found.verdict, found.test) == ("wins", BOOTSTRAP)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (3, 3), (10, 2), (2, 10), (40, 61), (500, 400)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "tuned, base, verdict",
    [
        ([1] * 6 + [0] * 14, [0] * 20, "wins"),  # 6 to 0: p = 2/64
        ([1] * 5 + [0] * 15, [0] * 20, "undecided"),  # 5 to 0: p = 2/32, though the bootstrap leaves 0 out
        ([0] * 20, [1] * 6 + [0] * 14, "loses"),
        ([1] * 20, [1] * 20, "undecided"),
    ],
)
def test_right_and_wrong_are_judged_by_mcnemar(tuned, base, verdict):
    found = compare_right(tuned, base)
    assert (found.verdict, found.test) == (verdict, MCNEMAR)
    assert found.difference == pytest.approx((sum(tuned) - sum(base)) / 20)
    assert (found.gained, found.lost) == (max(0, sum(tuned) - sum(base)), max(0, sum(base) - sum(tuned)))


def test_the_interval_of_right_and_wrong_holds_the_true_difference_and_is_wide_of_few_rows():
    found = compare_right([True] * 98, [True] * 98)
    assert found.interval == pytest.approx((-0.0196, 0.0196), abs=1e-5)  # 1.96 sqrt(1/2 + 1/2) / 100
    assert compare_right([True] * 2, [True] * 2).interval == pytest.approx((-0.49, 0.49), abs=1e-3)
    draw, held, (gains, losses) = random.Random(0), 0, (0.15, 0.05)
    for _ in range(2000):
        seen = [draw.random() for _ in range(60)]
        ours = [one < gains or one > 0.5 for one in seen]
        theirs = [gains <= one < gains + losses or one > 0.5 for one in seen]
        low, high = compare_right(ours, theirs).interval
        held += low <= gains - losses <= high
    assert 0.94 <= held / 2000 <= 0.97  # 0.95 and three times the spread of 2,000 draws


def test_the_verdict_knows_what_is_better_and_when_rows_are_too_few():
    more, less = mean_of([2.0 + value for value in values(30)]), mean_of(values(30, 1))
    assert compare(more, less).verdict == "wins"
    assert compare(less, more).verdict == "loses"
    assert compare(less, more, better="lower").verdict == "wins"
    assert compare(more, less, better=None).verdict is None
    assert compare(more, more).verdict == "undecided"
    assert compare(mean_of([2.0] * 9), mean_of([1.0] * 9)).verdict == "undecided"
    assert compare(mean_of([2.0] * 10), mean_of([1.0] * 10)).verdict == "wins"


def test_no_difference_is_called_one_about_as_seldom_as_promised():
    draw, false = random.Random(0), 0
    for _ in range(200):
        rows = [(draw.random() < 0.6, draw.random() < 0.6) for _ in range(60)]
        false += compare_right(*zip(*rows, strict=True)).verdict != "undecided"
    assert false / 200 <= 0.05


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(DataError, match="no rows to resample"):
        interval(ratio_of([], []))
    with pytest.raises(DataError, match="3 rows of one model and 2 of the other"):
        paired_difference(mean_of([1, 2, 3]), mean_of([1, 2]))
    with pytest.raises(DataError, match="3 answers of one model and 2 of the other"):
        compare_right([1, 1, 0], [1, 0])
    with pytest.raises(ConfigError, match="confidence is 95"):
        interval(mean_of([1, 2]), confidence=95)
    with pytest.raises(ConfigError, match="resamples is 0"):
        interval(mean_of([1, 2]), resamples=0)
    assert not math.isnan(interval(mean_of([1, 2]), resamples=1)[0])
