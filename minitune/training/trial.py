"""A few real steps on random rows: how long they take here, before there is any data.

The rows are full, and the loop is the project's own, so that what is measured is what a run will do. A hand-made step
was rejected: it would measure something that nobody runs.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.data.batching import Batch, collate, collate_preferences
from minitune.data.examples import Example
from minitune.data.preferences import Judged, Pair
from minitune.model.transformer import Transformer
from minitune.training.config import TrainConfig
from minitune.training.loop import Job, fit
from minitune.training.objectives import supervised
from minitune.training.optimizer import Optimizer
from minitune.training.preference import preference_objective
from minitune.training.run import choose_parameters
from minitune.training.state import Progress


class _Done(Exception):
    """As many steps as were wanted."""


class _Journal:
    """Notes when steps end, and ends the loop after some."""

    def __init__(self, steps: int):
        self.steps, self.seconds = steps, [0.0]

    def step(self, line: dict[str, Any]) -> None:
        self.seconds.append(line["seconds"])
        if len(self.seconds) > self.steps:
            raise _Done

    def say(self, line: str) -> None:
        """Random rows are no data to say anything about."""


def trial(model: Transformer, config: TrainConfig, steps: int, *, documents: int = 1) -> list[float]:
    """Train a model, in place, and return the seconds of each step; the first is slower, as plans are made in it.

    Args:
        model: a base in the run's dtype, quantised for qlora.
        config: a resolved one; `data` is not read.
        steps: how many.
        documents: that share a row of `max_length` tokens, packed.
    """
    model.gradient_checkpointing = config.gradient_checkpointing
    parameters, journal = choose_parameters(model, config), _Journal(steps)
    supervision = config.objective == "sft"
    job = Job(
        config=config, model=model, parameters=parameters,
        optimizer=Optimizer(parameters, config.optimizer, fused_backward=config.fused_backward),
        objective=supervised if supervision else preference_objective(config.objective, config.preference),
        stream=lambda start: _batches(config, model.config.vocab_size, documents), total_batches=10**9,
        validation=None, sample=list, checkpoints=Path("never"), fingerprint={}, progress=Progress(), journal=journal,
    )  # fmt: skip
    try:
        fit(job)
    except _Done:
        pass
    return [after - before for before, after in zip(journal.seconds, journal.seconds[1:], strict=False)]


def _batches(config: TrainConfig, vocabulary: int, documents: int) -> Iterator[Batch]:
    """Yield batches of random rows without end, all of one shape."""
    draw, size, scored = random.Random(0), config.max_length // documents, config.precomputes

    def document() -> Example:
        return Example(tuple(draw.randrange(vocabulary) for _ in range(size)), (False, *[True] * (size - 1)), "")

    while True:
        if config.objective == "sft":
            yield collate([[document() for _ in range(documents)] for _ in range(config.batch_size)], pad_id=0)
            continue
        reference = (0.0, 0.0) if scored else None
        if config.objective == "kto":
            items = [Judged(document(), bool(n % 2), document(), reference) for n in range(config.batch_size)]
        else:
            items = [Pair(document(), document(), reference=reference) for _ in range(config.batch_size)]
        yield collate_preferences([[item] for item in items], 0, packing=config.packing)
