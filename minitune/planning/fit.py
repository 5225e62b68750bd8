"""What fits into a memory: the largest batch and length by bisection over the ledger, and what to change, least harm
first.

Bytes grow with batch and length, so the largest that fits is found by doubling and halving. The remedies are tried one
after the other, each on top of those before it, in the order of what they cost: nothing, time, a little accuracy of the
optimiser, freedom of the weights, and at last the text itself. The best of all combinations was rejected: it would not
say which change is needed and which is not.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minitune.planning.run import Run

LARGEST_BATCH = 1 << 16


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to `most` that fits, 0 where none does; all below one that fits do.

    Args:
        fits: whether a number fits.
        most: what is not exceeded.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Capacity:
    """What one method can do in a memory."""

    method: str
    """And what else it uses."""
    needed: int
    """Bytes of the run as asked for, by this method."""
    batch: int
    """The largest micro-batch at the run's length, in items; 0: none fits."""
    length: int
    """The longest row at the run's micro-batch, in tokens; 0: none fits."""


_CHECKPOINTS = {"gradient_checkpointing": True}
_VARIANTS = {
    "full": {"method": "full"},
    "full, checkpointing": {"method": "full", **_CHECKPOINTS},
    "full, all that saves": {
        "method": "full", **_CHECKPOINTS, "fused_backward": True, "accumulation_steps": 1, "optimizer": "adamw8bit",
        "paged": True,
    },
    "last_layers": {"method": "last_layers"},
    "lora": {"method": "lora"},
    "lora, checkpointing": {"method": "lora", **_CHECKPOINTS},
    "qlora": {"method": "qlora"},
    "qlora, checkpointing": {"method": "qlora", **_CHECKPOINTS},
}  # fmt: skip


def capacities(run: Run, memory: float, *, cpu: bool) -> list[Capacity]:
    """Return what each method can do in `memory` bytes, all that it does not say being as in `run`."""
    plain = {"gradient_checkpointing": False, "fused_backward": False}
    runs = {name: dataclasses.replace(run, **{**plain, **changes}) for name, changes in _VARIANTS.items()}
    return [_capacity(name, one, memory, cpu) for name, one in runs.items()]


def _capacity(name: str, run: Run, memory: float, cpu: bool) -> Capacity:
    def fits(**changes: int) -> bool:
        return dataclasses.replace(run, **changes).needed(cpu) <= memory

    batch = largest(lambda count: fits(batch_size=count), LARGEST_BATCH)
    length = largest(lambda tokens: fits(length=tokens), run.config.longest)
    return Capacity(name, run.needed(cpu), batch, length)


@dataclass(frozen=True)
class Remedy:
    """A change, what it costs, and the bytes of the run with it and all changes before it."""

    change: str
    cost: str
    needed: int


def remedies(run: Run, memory: float, *, cpu: bool) -> list[Remedy]:
    """Return the changes, in order of least harm, until the run fits into `memory` bytes, or all of them.

    None are returned where it fits as it is. One that saves nothing is left out.
    """
    needed, found = run.needed(cpu), []
    for change, cost, changed in _changes(run, cpu):
        if needed <= memory:
            break
        tried = dataclasses.replace(run, **changed(run))
        after = tried.needed(cpu)
        if after < needed:
            run, needed = tried, after
            found.append(Remedy(change(run), cost, needed))
    return found


def _changes(run: Run, cpu: bool) -> Iterator[tuple[Callable[[Run], str], str, Callable[[Run], dict]]]:
    """Yield each change: its option, its cost, and the fields that it makes."""
    yield (
        lambda now: f"--batch_size {now.batch_size} --accumulation_steps {now.accumulation_steps}",
        "nothing: the same gradient in more passes",
        lambda now: {"batch_size": 1, "accumulation_steps": now.accumulation_steps * now.batch_size},
    )
    yield (
        lambda now: "--gradient_checkpointing", "the same numbers, a quarter to a third more time",
        lambda now: {"gradient_checkpointing": True},
    )  # fmt: skip
    if not cpu:
        yield (
            lambda now: "--optimizer.paged true", "the same numbers; each step waits for its moments",
            lambda now: {"paged": now.optimizer != "sgd"},
        )  # fmt: skip
    yield (
        lambda now: "--dtype bfloat16", "rounding; weights are rounded stochastically",
        lambda now: {"dtype": "bfloat16"},
    )  # fmt: skip
    if run.method == "full":
        yield (
            lambda now: "--optimizer adamw8bit", "moments in 8 bits: hardly to be seen in the loss",
            lambda now: {"optimizer": "adamw8bit"} if now.optimizer == "adamw" else {},
        )  # fmt: skip
        yield (
            lambda now: "--fused_backward --accumulation_steps 1 --optimizer.max_grad_norm null",
            "no accumulation, so smaller steps, and no clipping",
            lambda now: {"fused_backward": True, "accumulation_steps": 1},
        )  # fmt: skip
        yield (
            lambda now: "--method lora", "adapters in place of all weights: enough for most tasks",
            lambda now: {"method": "lora", "fused_backward": False},
        )  # fmt: skip
    if run.method in ("full", "lora"):
        yield (
            lambda now: "--method qlora", "the base in 4 bits: close to lora, and slower",
            lambda now: {"method": "qlora"},
        )  # fmt: skip
    length = run.length
    while length > 128:
        length //= 2
        yield (
            lambda now: f"--max_length {now.length}", "longer rows are split, cut or left out",
            lambda now, length=length: {"length": length},
        )  # fmt: skip
