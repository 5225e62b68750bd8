"""What more data would bring: a law through the losses of runs on parts of the data, and how far it can be trusted.

    L(n) = a + b (n / N)^-c        a, b >= 0, c > 0; N rows are all there are (Hestness et al. 2017, equation 1)
    gain(m) = L(N) - L(m N) = b (1 - m^-c)

With K sizes and R runs of each, y_k is the mean of the R losses of size k. Its error has two parts: the luck of the
draw and of the seed, of variance s^2 / R, where s^2 pools the variance within sizes and has K (R - 1) degrees of
freedom; and that of the validation rows, of variance v^2. The rows are the same for all runs, so only what they do to
the differences between sizes counts: with l_ik the loss of row i (t_i targets) and d_ik = (l_ik - y_k t_i) / mean(t),

    v^2 = sum_k var_i(d_ik - mean_k d_ik) / (M (K - 1))        M rows        (delta method of a ratio; E of the sample
                                                                              variance of K errors of variance v^2)
    sigma^2 = s^2 / R + v^2,    df = sigma^4 / ((s^2 / R)^2 / (K (R - 1)))   (Satterthwaite 1946)

Three parameters go through three points exactly where these fall ever more slowly, and leave no degree of freedom to
tell whether the law holds. So the interval of a gain is a profile, as nothing that the points fit may be left out:

    { g : min over a, c of sum_k (y_k - L(n_k))^2, given gain g, is at most RSS_min + sigma^2 t^2 }

with t the 97.5% quantile of Student's distribution with df degrees of freedom (Bates & Watts 1988, section 6.1). The
bounds on a, b and c are what keeps it finite: the slowest end is no gain, the fastest a = 0, a loss that falls to
nothing. What is shown as the law is the best one with a floor where a = 0 is outside that set and c inside its range,
and otherwise the simpler b (n / N)^-c, of two parameters, which leaves a degree of freedom of three points.

With one run of each size s is unknown, and the interval is of the validation rows alone: too narrow, and called so. A
bootstrap over runs was rejected: of two or three runs it makes intervals that are far too narrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import Any, Literal

import numpy as np

from minitune.errors import DataError, counted

CONFIDENCE = 0.95
SLOWEST, FASTEST = 1e-3, 2.0  # the range of c
TIMES = (2.0, 3.0, 10.0)
WORTH = 0.01  # of the present loss; an error rate's own percentage point

Law = Literal["power law with floor", "power law", "constant", "none"]


@dataclass(frozen=True)
class Forecast:
    """What `times` as many rows would bring; intervals are None where no noise was measured."""

    times: float
    rows: int
    value: float
    gain: float
    gain_interval: tuple[float, float] | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the value, given the law's present one."""
        if self.gain_interval is None:
            return None
        low, high = self.gain_interval
        return self.value + self.gain - high, self.value + self.gain - low


@dataclass(frozen=True)
class Curve:
    """The law a + b (n / rows)^-c, why that one, sigma with its degrees of freedom, and what it says of more rows.

    `law` "none": the losses do not fall along any such curve, so nothing is forecast.
    """

    law: Law
    reason: str
    a: float
    b: float
    c: float
    rows: int
    sigma: float
    degrees: float
    forecasts: tuple[Forecast, ...]

    def at(self, rows: float) -> float:
        """Return the law's value at a number of rows."""
        return self.a + self.b * (rows / self.rows) ** -self.c


def fit_curve(
    sizes: Sequence[int],
    losses: Sequence[Sequence[float]],
    *,
    row_variance: float = 0.0,
    times: Sequence[float] = TIMES,
) -> Curve:
    """Return the law through measured losses (or error rates) and its forecasts.

    Args:
        sizes: (K,) numbers of rows, growing, at least three; the last is N.
        losses: (K, R) what R runs of each size came to, all on the same validation rows.
        row_variance: v^2 as above.
        times: forecasts for so many times N rows, above 1.

    Raises DataError for fewer than three sizes, sizes that do not grow, or numbers of runs that differ or are not
    finite and at least 0.
    """
    table = _checked(sizes, losses)
    scaled, means = np.array(sizes, float) / sizes[-1], table.mean(1)
    sigma2, degrees = _noise(table, row_variance)
    slack = sigma2 * student_quantile((1 + CONFIDENCE) / 2, degrees) ** 2
    law, reason, (a, b, c) = _choose(scaled, means, slack)
    forecasts = []
    for many in times if law != "none" else ():
        gain = b * (1 - many**-c)
        low, high = gain_interval(scaled, means, many, slack)
        edges = (min(low, gain), max(high, gain)) if sigma2 else None  # the law shown is one that the points allow
        forecasts.append(Forecast(many, round(many * sizes[-1]), a + b - gain, gain, edges))
    return Curve(law, reason, a, b, c, sizes[-1], math.sqrt(sigma2), degrees, tuple(forecasts))


def _checked(sizes: Sequence[int], losses: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the losses as (K, R)."""
    if len(sizes) < 3 or any(later <= earlier for earlier, later in zip(sizes, sizes[1:], strict=False)):
        raise DataError(f"the parts have {', '.join(map(str, sizes))} rows; a curve needs three or more that grow")
    if len(losses) != len(sizes) or len({len(runs) for runs in losses}) != 1 or not losses[0]:
        raise DataError("every part of the data needs as many runs as the others, and at least one")
    table = np.array(losses, float)
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise DataError(f"the losses {table.tolist()} are not all finite and at least 0; a run went wrong")
    return table


def _noise(table: np.ndarray, row_variance: float) -> tuple[float, float]:
    """Return (sigma^2, degrees of freedom) of the means over R runs of K sizes (K, R)."""
    sizes, runs = table.shape
    if runs == 1:
        return row_variance, math.inf
    own = fmean(variance(row) for row in table.tolist()) / runs
    total = own + row_variance
    return total, total**2 / (own**2 / (sizes * (runs - 1))) if own else math.inf


def row_variance(rows: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return v^2 from (summed loss, targets) of each of M validation rows (K, M, 2), the same rows in one order.

    0 where there is but one row, whose luck cannot be known.
    """
    table = np.array(rows, float)  # (K, M, 2)
    sizes, count, _ = table.shape
    if count < 2:
        return 0.0
    losses, targets = table[..., 0], table[..., 1]
    share = losses.sum(1, keepdims=True) / targets.sum(1, keepdims=True)
    errors = (losses - share * targets) / targets.mean(1, keepdims=True)  # (K, M)
    contrasts = errors - errors.mean(0)
    return float(contrasts.var(1, ddof=1).sum() / (count * (sizes - 1)))


def student_quantile(probability: float, degrees: float) -> float:
    """Return a quantile of Student's distribution, at least 2 degrees of freedom (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def least_squares(scaled: np.ndarray, means: np.ndarray, floor: bool = True) -> tuple[float, float, float, float]:
    """Return (a, b, c, RSS) of the best law with a, b >= 0, with `floor` False that of a = 0; points (K,).

    The best a and b of an exponent are inside, or on an edge; the best exponent is looked for ever closer.
    """
    low, high = math.log(SLOWEST), math.log(FASTEST)
    for _ in range(5):
        exponents = np.exp(np.linspace(low, high, 201))
        x = scaled ** -exponents[:, None]  # (C, K)
        fits = [(np.zeros(len(x)), x @ means / (x**2).sum(1))]
        if floor:
            centred = x - x.mean(1, keepdims=True)
            slopes = centred @ means / (centred**2).sum(1)
            fits += [(np.full(len(x), means.mean()), np.zeros(len(x))), (means.mean() - slopes * x.mean(1), slopes)]
        a, b = (np.stack(parts) for parts in zip(*fits, strict=True))  # (fits, C)
        rss = ((means - a[..., None] - b[..., None] * x) ** 2).sum(-1)
        rss[(a < 0) | (b < 0)] = math.inf
        kind, place = np.unravel_index(rss.argmin(), rss.shape)
        step, centre = (high - low) / 100, math.log(exponents[place])
        low, high = max(centre - step, math.log(SLOWEST)), min(centre + step, math.log(FASTEST))
    return float(a[kind, place]), float(b[kind, place]), float(exponents[place]), float(rss[kind, place])


def _choose(scaled: np.ndarray, means: np.ndarray, slack: float) -> tuple[Law, str, tuple[float, float, float]]:
    """Return the law to show, why, and its (a, b, c)."""
    *full, rss = least_squares(scaled, means)
    *simple, simple_rss = least_squares(scaled, means, floor=False)
    tiny = 1e-12 * float(means @ means)
    if slack and rss > max(1, len(means) - 3) * slack + tiny:
        worst = "they rise" if means[-1] > means[0] else "they fall and rise, or ever faster"
        return "none", f"no curve that falls ever more slowly passes near the measured values: {worst}", (*full,)
    if full[1] * (1 - 10 ** -full[2]) <= 1e-9 * float(means.mean()):
        return "constant", "the values do not fall with more rows", (*full,)
    inside = SLOWEST * 1.01 < full[2] < FASTEST * 0.99 and full[0] > 0
    if inside and simple_rss - rss > slack + tiny:
        return "power law with floor", f"{counted(len(means), 'size')} tell the floor from none", (*full,)
    return "power law", "the values fit without a floor too, and the simpler law has a parameter fewer", (*simple,)


def gain_interval(scaled: np.ndarray, means: np.ndarray, times: float, slack: float) -> tuple[float, float]:
    """Return the least and the largest gain of `times` as many rows that the points allow.

    A gain is allowed where some law that has it, with 0 <= a and c in its range, is within `slack` of the best RSS.
    """
    _, b, c, rss = least_squares(scaled, means)
    allowed = rss + slack

    def fits(gains: np.ndarray) -> np.ndarray:
        """Tell for each gain (G,) whether some exponent allows it."""
        return _least_rss(scaled, means, times, gains) <= allowed * (1 + 1e-9) + 1e-15

    top = 2 * float(means.max()) + 3 * math.sqrt(slack)
    centre = _nearest_gain(scaled, means, times)
    return _edge(fits, centre, 0.0), _edge(fits, centre, top)


def _least_rss(scaled: np.ndarray, means: np.ndarray, times: float, gains: np.ndarray) -> np.ndarray:
    """Return the least RSS of the laws that have each gain (G,): over exponents by ever finer grids, a in the open."""
    low = np.full((len(gains), 1), math.log(SLOWEST))
    high = np.full((len(gains), 1), math.log(FASTEST))
    for points in (129, 17, 17, 17):
        exponents = np.exp(low + (high - low) * np.linspace(0, 1, points))  # (G, C)
        slopes = gains[:, None] / (1 - times**-exponents)
        curves = slopes[..., None] * scaled ** -exponents[..., None]  # (G, C, K)
        floors = (means - curves).mean(-1).clip(min=0)
        rss = ((means - floors[..., None] - curves) ** 2).sum(-1)
        centre = np.log(np.take_along_axis(exponents, rss.argmin(1)[:, None], 1))
        step = (high - low) / (points - 1)
        low, high = (centre - step).clip(min=math.log(SLOWEST)), (centre + step).clip(max=math.log(FASTEST))
    return rss.min(1)


def _nearest_gain(scaled: np.ndarray, means: np.ndarray, times: float) -> float:
    """Return the gain of the best law."""
    _, b, c, _ = least_squares(scaled, means)
    return b * (1 - times**-c)


def _edge(fits: Callable[[np.ndarray], np.ndarray], inside: float, outside: float) -> float:
    """Return the gain farthest from `inside`, toward `outside`, that is allowed: by a grid, then ever finer ones."""
    best = inside
    for _ in range(3):
        gains = np.linspace(best, outside, 41)
        allowed = np.flatnonzero(fits(gains))
        if not len(allowed):
            return best
        last = int(allowed[-1])
        best, outside = float(gains[last]), float(gains[min(last + 1, 40)])
    return best


def advice(curve: Curve, *, runs: int, error_rate: bool = False) -> str:
    """Say in a sentence or two what the curve means for collecting data."""
    if curve.law == "none":
        return f"Nothing can be said of more data: {curve.reason}. Look at the runs, and repeat them with other seeds."
    double = next((one for one in curve.forecasts if one.times == 2), curve.forecasts[0])
    what = "error rate" if error_rate else "loss"
    worth = WORTH if error_rate else WORTH * curve.at(curve.rows)
    said = f"{double.times:g} times the data is expected to lower the {what} by {double.gain:.4f}"
    if double.gain_interval is None:
        return f"{said}; no noise was measured, so how sure that is cannot be said. Repeat the runs (--repeats 3)."
    low, high = double.gain_interval
    said += f" (95% interval {low:.4f} to {high:.4f})"
    if runs == 1:
        return (
            f"{said}. That interval holds the luck of the validation rows alone, not that of the seed and the draw: "
            "repeat the runs (--repeats 3) before acting on it."
        )
    if low >= worth:
        return f"{said}. Collect more data: it pays."
    if high < worth:
        return f"{said}. The amount of data is not what limits: look at the model, the recipe and the rows' quality."
    return f"{said}. That leaves open whether more data pays: repeat the runs more often, or hold out more rows."


def as_json(curve: Curve) -> dict[str, Any]:
    """Return the curve for JSON; endless degrees of freedom are null."""
    forecasts = [
        {"times": one.times, "rows": one.rows, "value": one.value, "interval": one.interval, "gain": one.gain,
         "gain_interval": one.gain_interval}
        for one in curve.forecasts
    ]  # fmt: skip
    degrees = curve.degrees if math.isfinite(curve.degrees) else None
    law = {name: getattr(curve, name) for name in ("law", "reason", "a", "b", "c", "rows", "sigma")}
    return law | {"degrees_of_freedom": degrees, "forecasts": forecasts}
