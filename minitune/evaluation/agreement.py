"""Agreement beyond chance: how far two judges of the same rows say the same (Cohen 1960; with weights, 1968).

    kappa = 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij,    E_ij = (sum_j O_ij) (sum_i O_ij) / N

O counts the rows that the first judge gives label i and the second label j, and E what judges with the same habits
would share by chance. Plain kappa has w_ij = 1 for i != j; where labels have an order, |i - j| (linear) or (i - j)^2
(quadratic) makes a near miss cost less. 1 is full agreement, 0 that of chance. The share of equal verdicts alone was
rejected: two judges who both nearly always say "tie" agree nearly always, and tell nothing.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from minitune.errors import DataError
from minitune.evaluation.bootstrap import RESAMPLES, Statistics, interval

Weights = Literal["none", "linear", "quadratic"]


@dataclass(frozen=True)
class Agreement:
    """`share` of the `rows` on which both say the same, `kappa` with its 95% bootstrap interval.

    Where both said one and the same thing on all rows, chance alone would make them agree, and kappa is None. Where one
    of them always says the same it is 0, in every resample too, so the interval would claim certainty: it is None.
    """

    rows: int
    share: float
    kappa: float | None
    kappa_interval: tuple[float, float] | None
    weights: Weights
    interval_by: str = f"bootstrap, {RESAMPLES:,} resamples of rows"


def kappa_statistics(
    first: Sequence[Hashable], second: Sequence[Hashable], labels: Sequence[Hashable], weights: Weights = "none"
) -> Statistics:
    """Return Cohen's kappa of two judges' labels, -1 to 1, for resampling rows.

    `labels` are all there are, in their order. A resample in which nobody varies shows no agreement beyond chance: 0.
    Raises DataError where the judges have not the same number of rows, or one gives a label that is none.
    """
    if len(first) != len(second):
        raise DataError(f"there are {len(first)} labels of one judge and {len(second)} of the other; give one a row")
    place = {label: i for i, label in enumerate(labels)}
    strange = next((label for label in (*first, *second) if label not in place), None)
    if strange is not None:
        raise DataError(f"the label {strange!r} is none of {', '.join(map(str, labels))}; correct the row")
    cells = [place[one] * len(labels) + place[other] for one, other in zip(first, second, strict=True)]
    rows = torch.zeros(len(cells), len(labels) ** 2, dtype=torch.float64)
    rows[torch.arange(len(cells)), cells] = 1
    steps = torch.arange(len(labels), dtype=torch.float64)
    apart = (steps[:, None] - steps).abs()
    cost = {"none": (apart > 0).double(), "linear": apart, "quadratic": apart**2}[weights]

    def kappa(sums: torch.Tensor) -> torch.Tensor:
        observed = sums.unflatten(-1, cost.shape)  # (..., L, L)
        chance = observed.sum(-1, keepdim=True) * observed.sum(-2, keepdim=True)
        chance = chance / observed.sum((-1, -2), keepdim=True)
        expected = (cost * chance).sum((-1, -2))
        ratio = (cost * observed).sum((-1, -2)) / expected.where(expected > 0, 1)
        return (1 - ratio).where(expected > 0, 0)

    return Statistics(rows, kappa)


def agreement(
    first: Sequence[Hashable], second: Sequence[Hashable], labels: Sequence[Hashable], weights: Weights = "none"
) -> Agreement:
    """Return the agreement of two judges on at least one row; arguments and errors as in `kappa_statistics`."""
    found = kappa_statistics(first, second, labels, weights)
    if not first:
        raise DataError("there is no row that both judges have judged; give at least one")
    share = sum(one == other for one, other in zip(first, second, strict=True)) / len(first)
    if len({*first, *second}) == 1:
        return Agreement(len(first), share, None, None, weights)
    edges = interval(found) if len({*first}) > 1 and len({*second}) > 1 else None
    return Agreement(len(first), share, found.value, edges, weights)
