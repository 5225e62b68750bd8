"""Intervals by resampling rows: the percentile bootstrap (Efron & Tibshirani 1993, chapter 13), seeded.

    theta*_b = f(sum_i w_bi s_i),  w_b ~ Multinomial(N, 1/N),  b = 1..B;  interval = quantiles of theta*

Each row i has a vector of statistics s_i, and a score f is a function of their sum: for a mean s = (x, 1) and
f = s_0 / s_1, for BLEU the counts of matching n-grams. So a resample is a row of weights, and all resamples are one
matrix product. Calling the metric again for every resample was rejected: it reads every text a thousand times.

Two models' scores on the same rows are compared with the same weights (paired), so that what makes a row hard for
both cancels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from minitune.errors import ConfigError, DataError

RESAMPLES = 1000
ENTRIES = 1 << 22  # weights in memory at once, 32 MB


@dataclass(frozen=True)
class Statistics:
    """A metric over rows: what each row adds, `rows` (N, K) fp64, and `score`, which maps sums (..., K) to (...)."""

    rows: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]

    @property
    def value(self) -> float:
        """The metric on all rows."""
        return self.score(self.rows.sum(0)).item()

    @property
    def alike(self) -> bool:
        """Whether all rows add the same: every resample agrees then, and an interval would claim certainty."""
        return bool((self.rows == self.rows[0]).all())


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Statistics:
    """Return the statistics of sum(numerators) / sum(denominators), a number of each for every row; 0 for 0 / 0."""
    return Statistics(torch.tensor([list(numerators), list(denominators)], dtype=torch.float64).T, ratio)


def ratio(sums: torch.Tensor) -> torch.Tensor:
    """Return s_0 / s_1 of sums (..., 2); 0 where s_1 is 0."""
    return sums[..., 0] / sums[..., 1].where(sums[..., 1] != 0, 1)


def mean_of(values: Sequence[float]) -> Statistics:
    """Return the statistics of a mean over rows."""
    return ratio_of(values, [1.0] * len(values))


def interval(
    statistics: Statistics, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the bootstrap interval (low, high) of a metric; of one row it is that row's score twice.

    Raises DataError without rows, ConfigError for a confidence outside (0, 1) or no resamples.
    """
    sums = [weights @ statistics.rows for weights in _weights(len(statistics.rows), resamples, seed)]
    return _percentiles(statistics.score(torch.cat(sums)), confidence)


def paired_difference(
    ours: Statistics, theirs: Statistics, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (difference, low, high) of ours minus theirs, both on the same rows in the same order.

    Every resample draws the same rows for both. Errors as in `interval`, and DataError for different numbers of rows.
    """
    if len(ours.rows) != len(theirs.rows):
        found = f"there are {len(ours.rows)} rows of one model and {len(theirs.rows)} of the other"
        raise DataError(f"{found}; a paired comparison needs the same rows")
    found = []
    for weights in _weights(len(ours.rows), resamples, seed):
        found.append(ours.score(weights @ ours.rows) - theirs.score(weights @ theirs.rows))
    return ours.value - theirs.value, *_percentiles(torch.cat(found), confidence)


def _weights(rows: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield how often each row is drawn, (some resamples, rows) at a time, the same for the same three numbers."""
    if not rows:
        raise DataError("there are no rows to resample; give at least one")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    size = max(1, ENTRIES // rows)
    for start in range(0, resamples, size):
        drawn = torch.randint(rows, (min(size, resamples - start), rows), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def _percentiles(scores: torch.Tensor, confidence: float) -> tuple[float, float]:
    """Return the quantiles that leave (1 - confidence) / 2 on each side, interpolated as numpy does."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; it must be between 0 and 1, as 0.95")
    edges = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(scores, edges).tolist()
    return low, high
