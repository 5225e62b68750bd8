"""What preference objectives learn from: two answers to one prompt, or one answer that was judged.

A pair says that `chosen` is better than `rejected` (Rafailov et al. 2023, section 3: x, y_w, y_l); a judged
example says that its answer is desirable or not (Ethayarajh et al. 2024, section 4). Both are made of examples
as supervised training has them, whose targets are the answer's tokens, so everything that plans, packs or splits
examples reads them by their `documents`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitune.data.examples import Example
from minitune.errors import DataError


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
    def scored(self) -> tuple[Example, ...]:
        """Return the documents that `reference` is of."""
        return self.documents

    @property
    def origin(self) -> str:
        """Return the row's file:line."""
        return self.chosen.origin


@dataclass(frozen=True)
class Judged:
    """An answer and whether it is desirable.

    `mismatched` is its prompt with the answer to another one (`with_mismatches`), from which the KL to the reference
    is estimated; `reference` is as in `Pair`, of the example and of that.
    """

    example: Example
    desirable: bool
    mismatched: Example | None = None
    reference: tuple[float, ...] | None = None

    @property
    def documents(self) -> tuple[Example, ...]:
        """Return the one example."""
        return (self.example,)

    @property
    def scored(self) -> tuple[Example, ...]:
        """Return the documents that `reference` is of."""
        return self.example, self.mismatched

    @property
    def origin(self) -> str:
        """Return the row's file:line."""
        return self.example.origin


Item = Example | Pair | Judged


def item_ids(item: Item) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each document of an item, by which equal items are told."""
    return tuple(document.ids for document in item.documents)


def with_mismatches(judged: Sequence[Judged]) -> list[Judged]:
    """Give each its prompt with the answer of the nearest row before it that has another prompt, the first the last's.

    Ethayarajh et al. 2024, section 4.1, shift the answers within a batch. Shifted once and for all, they need no batch
    of two, and their log-probabilities under the reference can be kept. Nothing is cut, so such a document may be
    longer than max_length. Raises DataError where all rows have the same prompt.
    """
    result = []
    prompts = [item.example.prompt for item in judged]
    for i, item in enumerate(judged):
        other = next((k for k in range(i - 1, i - len(judged), -1) if prompts[k] != prompts[i]), None)
        if other is None:
            raise DataError(f"{item.origin}: all rows have one prompt; kto compares with answers to others, add some")
        mismatched = replace(answer_to(prompts[i], judged[other].example), origin=item.origin)
        result.append(replace(item, mismatched=mismatched))
    return result


def answer_to(prompt: tuple[int, ...], example: Example) -> Example:
    """Return the answer of an example, with its targets, after another prompt."""
    start = len(example.prompt)
    targets = (False,) * len(prompt) + example.targets[start:]
    return replace(example, ids=prompt + example.ids[start:], targets=targets)
