"""Laws through learning curves: against scipy, on planted curves, and how often the interval holds the truth."""

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from minitune.curation import learning_curve
from minitune.curation.learning_curve import advice, fit_curve, gain_interval, least_squares, row_variance
from minitune.errors import DataError

SIZES = [100, 300, 1000]
SCALED = np.array(SIZES) / 1000


def planted(a, b, c, sizes=SIZES):
    return a + b * (np.array(sizes) / sizes[-1]) ** -c


@pytest.mark.parametrize("a, b, c", [(1.2, 0.3, 0.5), (0.0, 0.4, 0.2), (0.4, 0.05, 1.1), (2.0, 0.5, 0.05)])
def test_a_curve_without_noise_is_found_again(a, b, c):
    curve = fit_curve(SIZES, [[value] for value in planted(a, b, c)])
    assert (curve.a, curve.b, curve.c) == pytest.approx((a, b, c), rel=1e-3, abs=1e-4)
    assert curve.law == ("power law with floor" if a else "power law")
    for forecast, times in zip(curve.forecasts, (2, 3, 10), strict=True):
        assert forecast.rows == times * 1000 and forecast.gain_interval is forecast.interval is None
        assert forecast.gain == pytest.approx(b * (1 - times**-c), rel=1e-3)
        assert forecast.value == pytest.approx(a + b * times**-c, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_scipys(seed):
    draw = np.random.default_rng(seed)
    sizes = np.array([50, 100, 200, 400, 800])
    scaled, means = sizes / 800, planted(1.0, 0.3, 0.6, sizes) + draw.normal(0, 0.02, 5)
    a, b, c, rss = least_squares(scaled, means)
    found = [
        optimize.least_squares(lambda p: p[0] + p[1] * scaled ** -p[2] - means, start, bounds=([0, 0, 1e-3], [9, 9, 2]),
                               xtol=1e-14, ftol=1e-14, gtol=1e-14)
        for start in ([0.5, 0.5, 0.3], [1.0, 0.1, 1.0], [0.1, 1.0, 0.05])
    ]  # fmt: skip
    best = min(found, key=lambda one: one.cost)
    assert rss == pytest.approx(2 * best.cost, rel=1e-6) and (a, b, c) == pytest.approx(best.x, rel=1e-3, abs=1e-4)
    a, b, c, rss = least_squares(scaled, means, floor=False)
    simple = optimize.least_squares(lambda p: p[0] * scaled ** -p[1] - means, [1.0, 0.2], xtol=1e-14, ftol=1e-14)
    assert a == 0 and rss == pytest.approx(2 * simple.cost, rel=1e-6) and (b, c) == pytest.approx(simple.x, rel=1e-3)


def test_the_profile_is_that_of_a_general_optimiser():
    means, slack = planted(1.0, 0.3, 0.6) + np.array([0.004, -0.006, 0.003]), 2e-4
    low, high = gain_interval(SCALED, means, 2.0, slack)

    def least(gain):
        def rss(p):
            return ((np.maximum(p[0], 0) + gain / (1 - 2.0 ** -p[1]) * SCALED ** -p[1] - means) ** 2).sum()

        starts = [(a, c) for a in (0.0, 0.5, 1.0, 1.2) for c in (0.05, 0.3, 1.0, 1.8)]
        found = [optimize.minimize(rss, start, bounds=[(0, 9), (1e-3, 2)], method="L-BFGS-B").fun for start in starts]
        return min(found)

    allowed = least_squares(SCALED, means)[3] + slack
    for edge, outward in ((low, -1), (high, 1)):
        assert least(edge * (1 - outward * 0.02)) < allowed < least(edge * (1 + outward * 0.02))


@pytest.mark.parametrize(
    "runs, sigma, rows_sigma",
    [(2, 0.01, 0.0), (1, 0.0, 0.01), (3, 0.008, 0.005)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(runs, sigma, rows_sigma, trials=200):
    draw, held = np.random.default_rng(runs), 0
    for _ in range(trials):
        a, b, c = draw.uniform(0, 1.5), draw.uniform(0.02, 0.6), draw.uniform(0.1, 0.9)
        noisy = planted(a, b, c)[:, None] + draw.normal(0, rows_sigma, (3, 1)) + draw.normal(0, sigma, (3, runs))
        curve = fit_curve(SIZES, noisy.clip(0).tolist(), row_variance=rows_sigma**2, times=(2.0,))
        for forecast in curve.forecasts:  # none where the noise makes a curve of no law: that is not held either
            low, high = forecast.gain_interval
            assert low <= forecast.gain <= high
            held += low <= b * (1 - 2.0**-c) <= high
    assert held >= 0.9 * trials  # 95% nominal: 190 of 200, of standard deviation 3.1


def test_an_interval_of_half_the_noise_would_not(monkeypatch):
    monkeypatch.setattr(learning_curve, "student_quantile", lambda *_: 0.5)
    with pytest.raises(AssertionError):
        test_the_interval_holds_the_truth_as_often_as_it_says(2, 0.01, 0.0, trials=40)


def test_noise_of_runs_and_rows():
    losses = [[1.0, 1.2], [0.8, 0.9], [0.7, 0.7]]  # variances 0.02, 0.005, 0
    curve = fit_curve(SIZES, losses)
    assert curve.sigma**2 == pytest.approx(0.025 / 3 / 2) and curve.degrees == pytest.approx(3)
    both = fit_curve(SIZES, losses, row_variance=0.01)
    own = 0.025 / 6
    assert both.sigma**2 == pytest.approx(own + 0.01) and both.degrees == pytest.approx((own + 0.01) ** 2 * 3 / own**2)
    assert fit_curve(SIZES, [[1.0], [0.8], [0.7]], row_variance=0.01).degrees == math.inf


@pytest.mark.parametrize("degrees", [2, 3, 4, 6, 12.5, 100])
def test_student_quantiles_are_scipys(degrees):
    assert learning_curve.student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-2)


def test_row_variance_is_that_of_resampled_rows():
    draw = np.random.default_rng(0)
    count, targets = 400, draw.integers(1, 9, 400).astype(float)
    hard = draw.gamma(2.0, 0.5, count)  # what makes a row hard is the same for all sizes, and cancels
    losses = np.stack([targets * (hard * 3 + level + draw.normal(0, 0.3, count)) for level in (1.0, 0.7, 0.6)])
    found = row_variance([list(zip(one, targets, strict=True)) for one in losses])
    picks = draw.integers(0, count, (4000, count))
    means = losses[:, picks].sum(-1) / targets[picks].sum(-1)  # (K, resamples)
    assert found == pytest.approx((means - means.mean(0)).var(1).sum() / 2, rel=0.1)
    assert found < 0.05 * means.var(1).mean()  # rows drawn anew for each size would be much worse
    assert row_variance([[(1.0, 1)]] * 3) == 0.0


def test_laws_that_say_why():
    floor = fit_curve(SIZES, [[v, v + 0.001] for v in planted(1.0, 0.1, 1.0)])
    assert floor.law == "power law with floor"
    simple = fit_curve(SIZES, [[v, v + 0.1] for v in planted(1.0, 0.1, 1.0)])
    assert simple.law == "power law" and "simpler law" in simple.reason and simple.a == 0
    flat = fit_curve(SIZES, [[0.95, 1.05], [0.98, 1.08], [1.0, 1.1]])
    assert flat.law == "constant" and flat.forecasts[0].gain == 0 and flat.forecasts[0].gain_interval[1] > 0
    rising = fit_curve(SIZES, [[1.0, 1.01], [1.2, 1.21], [1.4, 1.41]])
    assert rising.law == "none" and "they rise" in rising.reason and rising.forecasts == ()


def test_advice_follows_the_interval():
    def said(a, b, c, noise, runs=3, **options):
        values = [[v - noise, v, v + noise][:runs] for v in planted(a, b, c)]
        return advice(fit_curve(SIZES, values, row_variance=1e-8 if runs == 1 else 0.0), runs=runs, **options)

    assert "Collect more data: it pays." in said(0.5, 0.3, 0.5, 0.001)
    assert "is not what limits" in said(1.0, 0.0001, 1.9, 0.0005)
    assert "leaves open" in said(1.0, 0.05, 0.5, 0.05)
    assert "luck of the validation rows alone" in said(0.5, 0.3, 0.5, 0.001, runs=1)
    assert "lower the error rate" in said(0.1, 0.1, 0.5, 0.001, error_rate=True)
    assert "no noise was measured" in advice(fit_curve(SIZES, [[v] for v in planted(0.5, 0.3, 0.5)]), runs=1)
    assert "Nothing can be said" in advice(fit_curve(SIZES, [[1.0, 1.01], [1.2, 1.21], [1.4, 1.41]]), runs=2)


def test_json_has_no_infinity():
    found = learning_curve.as_json(fit_curve(SIZES, [[1.0], [0.8], [0.7]], row_variance=1e-4))
    assert found["degrees_of_freedom"] is None and json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "sizes, losses, expected",
    [
        ([1, 2], [[1.0], [1.0]], "three or more that grow"),
        ([1, 2, 2], [[1.0]] * 3, "three or more that grow"),
        ([1, 2, 3], [[1.0]] * 2, "as many runs"),
        ([1, 2, 3], [[1.0], [1.0], [1.0, 2.0]], "as many runs"),
        ([1, 2, 3], [[], [], []], "as many runs"),
        ([1, 2, 3], [[1.0], [math.nan], [1.0]], "not all finite"),
        ([1, 2, 3], [[1.0], [-0.1], [1.0]], "not all finite"),
    ],
)
def test_points_of_which_there_is_no_curve(sizes, losses, expected):
    with pytest.raises(DataError, match=expected):
        fit_curve(sizes, losses)
