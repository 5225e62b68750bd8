"""What preference objectives learn from: two answers to one prompt, or one answer that was judged.

A pair says that `chosen` is better than `rejected` (Rafailov et al. 2023, section 3: x, y_w, y_l); a judged
example says that its answer is desirable or not (Ethayarajh et al. 2024, section 4). Both are made of examples
as supervised training has them, whose targets are the answer's tokens, so everything that plans, packs or splits
examples reads them by their `documents`.
"""

from dataclasses import dataclass, replace

from minitune.data.examples import Example


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `margin` is by how much the chosen one is better, in the judge's own scale.

    `reference` holds the log-probabilities of the answers under the reference model, in nats, one sum over the
    targets of each document.
    """

    chosen: Example
    rejected: Example
    margin: float | None = None
    reference: tuple[float, ...] | None = None

    @property
    def documents(self) -> tuple[Example, ...]:
        """Return the chosen and the rejected side."""
        return self.chosen, self.rejected

    @property
    def origin(self) -> str:
        """Return the row's file:line."""
        return self.chosen.origin


@dataclass(frozen=True)
class Judged:
    """An answer and whether it is desirable; `reference` as in `Pair`, with one sum."""

    example: Example
    desirable: bool
    reference: tuple[float, ...] | None = None

    @property
    def documents(self) -> tuple[Example, ...]:
        """Return the one example."""
        return (self.example,)

    @property
    def origin(self) -> str:
        """Return the row's file:line."""
        return self.example.origin


Item = Example | Pair | Judged


def mismatch(prompted: Example, answering: Example) -> Example:
    """Return the prompt of one example with the answer, and the targets, of another.

    Nothing is cut, so it may have up to the tokens of both. Not a row of the data: see `PreferenceBatch`.
    """
    start, at = prompted.targets.index(True), answering.targets.index(True)
    return replace(
        prompted,
        ids=prompted.ids[:start] + answering.ids[at:],
        targets=prompted.targets[:start] + answering.targets[at:],
    )
