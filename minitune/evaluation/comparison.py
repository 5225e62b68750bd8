"""Two models on the same rows: the difference with its interval, a test that is named, and a plain verdict.

Right or wrong answers are tested by McNemar's exact test (1947; the binomial form): of the rows that just one model
has right, b one way and c the other, each is a coin's toss if the models are equally good,

    p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c))

The interval of the difference (c - b) / n is that of Agresti & Min (2005), with half a row more in each of four cells:

    b' = b + 1/2,  c' = c + 1/2,  n' = n + 2:   ((c' - b') +- z sqrt(b' + c' - (c' - b')^2 / n')) / n'

Resampling was rejected for it: of two models that are right on the same rows it would claim, however few the rows
are, that they do not differ at all.

Every other score is tested by the paired bootstrap: the models differ where the interval of the difference leaves out
0. Comparing two intervals by whether they overlap was rejected: it forgets that the rows are the same, and misses
differences that are there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from minitune.errors import DataError
from minitune.evaluation.bootstrap import Statistics, paired_difference

FEWEST = 10  # rows; of fewer the bootstrap's interval is too narrow to believe
SURE = 0.05
BOOTSTRAP, MCNEMAR = "paired bootstrap", "McNemar's exact test"
Verdict = Literal["wins", "loses", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """`difference` is the tuned model's score minus the base's, with its 95% `interval`.

    `test` names what `verdict` rests on ("wins", "loses" or "undecided" is the tuned model); `p` is McNemar's, with
    `gained` and `lost` rows. `verdict` is None where more is neither better nor worse.
    """

    difference: float
    interval: tuple[float, float]
    test: str
    verdict: Verdict | None
    p: float | None = None
    gained: int | None = None
    lost: int | None = None


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of McNemar's test for rows that just one of two models has right."""
    total = gained + lost
    tail = sum(math.comb(total, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(
    tuned: Statistics, base: Statistics, *, better: Literal["higher", "lower"] | None = "higher", seed: int = 0
) -> Comparison:
    """Compare a metric of two models on the same rows by the paired bootstrap; `better` says what a gain is."""
    difference, low, high = paired_difference(tuned, base, seed=seed)
    sure = len(tuned.rows) >= FEWEST and (low > 0 or high < 0)
    verdict = None if better is None else _verdict(sure, difference, better)
    return Comparison(difference, (low, high), BOOTSTRAP, verdict)


def matched_interval(gained: int, lost: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval (low, high) of (gained - lost) / rows, between -1 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    size, changed, net = rows + 2, gained + lost + 1, gained - lost
    half = z * math.sqrt(changed - net**2 / size)
    return max(-1.0, (net - half) / size), min(1.0, (net + half) / size)


def compare_right(tuned: Sequence[bool], base: Sequence[bool]) -> Comparison:
    """Compare right and wrong answers of two models to the same rows by McNemar's exact test."""
    if len(tuned) != len(base) or not tuned:
        raise DataError(f"there are {len(tuned)} answers of one model and {len(base)} of the other; give one a row")
    gained = sum(ours and not theirs for ours, theirs in zip(tuned, base, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(tuned, base, strict=True))
    difference, p = (gained - lost) / len(tuned), mcnemar(gained, lost)
    verdict, edges = _verdict(p < SURE, difference, "higher"), matched_interval(gained, lost, len(tuned))
    return Comparison(difference, edges, MCNEMAR, verdict, p=p, gained=gained, lost=lost)


def _verdict(sure: bool, difference: float, better: str) -> Verdict:
    if not sure or difference == 0:
        return "undecided"
    return "wins" if (difference > 0) == (better == "higher") else "loses"
