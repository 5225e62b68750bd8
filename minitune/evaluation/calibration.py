"""Calibration: of what a model says with confidence c, is the share c right?

    ECE = sum_b n_b / N |right_b / n_b - confidence_b / n_b| = 1/N sum_b |right_b - confidence_b|

over M bins ((m - 1)/M, m/M] of equal width (Naeini et al. 2015; Guo et al. 2017, equation 3), right_b and confidence_b
being sums over the n_b rows of a bin. The second form needs sums over rows only, which is what the bootstrap resamples.
The estimate is biased upwards where bins hold few rows: a resample's more so than the sample's own, so the interval
can lie above the value.
"""

from collections.abc import Sequence

import torch

from minitune.errors import ConfigError, DataError
from minitune.evaluation.bootstrap import Statistics


def calibration_statistics(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> Statistics:
    """Return the expected calibration error, 0 to 1, of answers with a probability each.

    Raises:
        ConfigError: bins is below 1. DataError: a confidence is outside [0, 1] or none, or the numbers differ.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}; it must be at least 1")
    if len(confidences) != len(right):
        raise DataError(f"there are {len(confidences)} confidences for {len(right)} answers; give one each")
    for row, confidence in enumerate(confidences, 1):
        if not 0 <= confidence <= 1:
            raise DataError(f"row {row}: the confidence is {confidence}; a probability is 0 to 1")
    sure = torch.tensor(list(confidences), dtype=torch.float64)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    rows = torch.zeros(len(sure), bins + 1, dtype=torch.float64)
    rows[torch.arange(len(sure)), torch.bucketize(sure, edges)] = torch.tensor(list(right)).double() - sure
    rows[:, -1] = 1
    return Statistics(rows, calibration_error)


def calibration_error(sums: torch.Tensor) -> torch.Tensor:
    """Map sums (..., bins of right minus confidence, then N) to the error (...)."""
    return sums[..., :-1].abs().sum(-1) / sums[..., -1].clamp(min=1)
