"""Metrics of classification: pure functions of counts, small enough to check by hand.

With k of n answers right, p = k / n and z the normal quantile, Wilson's interval (1927) is

    (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)

which stays inside [0, 1] and is right near 0 and 1, where p +- z sqrt(p (1 - p) / n), rejected, is not.
"""

from collections.abc import Sequence
from statistics import NormalDist

import torch

from minitune.evaluation.bootstrap import Statistics

OTHER = "other"


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval (low, high) for a share of `successes` in `total` > 0 trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / total, z * z / total
    centre = share + spread / 2
    half = z * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    low = (centre - half) / (1 + spread) if successes else 0.0  # exactly: rounding would leave 6e-18
    return low, (centre + half) / (1 + spread) if successes < total else 1.0


def confusion_matrix(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count answers: row = expected label, column = predicted label; the last column is whatever is none.

    Args:
        expected: the right labels, each one of `labels`.
        predicted: the answers, any strings.
        labels: the L labels, in the order of rows and columns.

    Returns:
        L rows of L + 1 counts.
    """
    place = {label: i for i, label in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for right, answer in zip(expected, predicted, strict=True):
        counts[place[right]][place.get(answer, len(labels))] += 1
    return counts


def accuracy(confusion: Sequence[Sequence[int]]) -> float:
    """Return the share of right answers in a confusion matrix."""
    return sum(row[i] for i, row in enumerate(confusion)) / sum(map(sum, confusion))


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Return the mean over labels of F1 = 2 TP / (2 TP + FP + FN); 0 for a label never expected nor answered."""
    scores = []
    for i, row in enumerate(confusion):
        expected, answered = sum(row), sum(other[i] for other in confusion)
        scores.append(2 * row[i] / (expected + answered) if expected + answered else 0.0)
    return sum(scores) / len(scores)


def micro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Return F1 = 2 TP / (2 TP + FP + FN) of counts summed over labels; an answer that is no label is no FP."""
    right, rows = sum(row[i] for i, row in enumerate(confusion)), sum(map(sum, confusion))
    answered = rows - sum(row[-1] for row in confusion)
    return 2 * right / (rows + answered)


def f1_statistics(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Statistics]:
    """Return {"macro", "micro"}: F1 as above from (TP, expected, answered) of each label, for resampling rows."""
    place = {label: i for i, label in enumerate(labels)}
    rows = torch.zeros(len(expected), len(labels), 3, dtype=torch.float64)
    for row, (right, answer) in enumerate(zip(expected, predicted, strict=True)):
        rows[row, place[right], 1] = 1
        if answer in place:
            rows[row, place[answer], 2] = 1
            rows[row, place[answer], 0] = answer == right

    def macro(sums: torch.Tensor) -> torch.Tensor:
        return _f1(sums.unflatten(-1, (-1, 3))).mean(-1)

    def micro(sums: torch.Tensor) -> torch.Tensor:
        return _f1(sums.unflatten(-1, (-1, 3)).sum(-2))

    return {"macro": Statistics(rows.flatten(1), macro), "micro": Statistics(rows.flatten(1), micro)}


def _f1(counts: torch.Tensor) -> torch.Tensor:
    """Map (..., [TP, expected, answered]) to F1 (...); 0 where a label was neither expected nor answered."""
    right, expected, answered = counts.unbind(-1)
    return 2 * right / (expected + answered).clamp(min=1)
