"""Rows far longer or shorter than the others.

    z = 0.6745 (log n - median) / MAD          MAD: the median of |log n - median| (Iglewicz & Hoaglin 1993)

Lengths spread over magnitudes, so their logarithms are compared; medians, as an outlier would move a mean and hide
itself. 0.6745 makes the MAD of a normal distribution its standard deviation. Where most lengths are equal (labels) the
MAD is 0, so a row must be several times as long or short, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitune.curation.findings import Finding, answers_of, finding, texts_of
from minitune.data.splits import row_parts

OUTLYING = 5.0  # standard deviations of log n
TIMES = 4.0  # and so many times the median, or that part of it
FEWEST = 20  # rows that have a usual length


def lint_lengths(rows: Sequence[Any], tokenizer: Any = None) -> list[Finding]:
    """Return findings on rows whose whole or whose answers are outliers, in tokens or else in characters."""
    measure, unit = (len, "characters") if tokenizer is None else (_tokens(tokenizer), "tokens")
    whole = [sum(map(measure, texts_of(row))) for row in rows]
    findings = _outliers(rows, whole, f"{unit} in all")
    asking = [row for row in rows if len(row_parts(row)) > 1]
    return findings + _outliers(asking, [sum(map(measure, answers_of(row))) for row in asking], f"{unit} of the answer")


def _tokens(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text))


def outliers(lengths: Sequence[int]) -> np.ndarray:
    """Return for each length how many standard deviations its logarithm is off, 0 where it is usual."""
    logs = np.log(np.maximum(np.asarray(lengths, dtype=float), 1))
    off = logs - np.median(logs)
    spread = max(float(np.median(np.abs(off))) / 0.6745, 1e-9)
    scores = off / spread
    return np.where((np.abs(scores) > OUTLYING) & (np.abs(off) >= np.log(TIMES)), scores, 0.0)


def _outliers(rows: Sequence[Any], lengths: list[int], what: str) -> list[Finding]:
    if len(rows) < FEWEST:
        return []
    scores = outliers(lengths)
    odd = [i for i in np.argsort(-np.abs(scores), kind="stable") if scores[i]]
    if not odd:
        return []
    middle = int(np.median(lengths))
    message = f"rows of unusual length: {lengths[odd[0]]:,} {what} where the median is {middle:,}"
    remedy = "read them: cut off, joined, or of another kind"
    return [finding("length_outlier", "warning", [rows[i] for i in odd], message, remedy, median=middle)]
