"""Several sources in one training file, each at its share: the task's own, general rows against forgetting, safety.

    amount(role) = share(role) / (1 - the other roles' shares) x amount of the task's rows

so that a rehearsal share of 0.2 is a fifth of what is written, not a fifth on top. Amounts are rows or target tokens:
answers of general data are often ten times as long as a label, and the gradient of a batch is summed over target
tokens, so a fifth of the rows can be two thirds of what is learned. The task's files come whole or, with weights, at
their shares of the largest mixture that repeats no row. Rows are drawn by the hash of what they ask, so that a source
that grows keeps most of what was drawn; nothing is repeated unless that is asked for. Drawing anew each epoch, as the
training option `weight` does, was rejected here: what is written is then all that is learned, and can be read.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from minitune.curation.rows import Row
from minitune.data.lint import check_weights
from minitune.data.splits import hash_point, question_key
from minitune.errors import ConfigError, DataError

Shortage = Literal["error", "less", "repeat"]


@dataclass(frozen=True)
class Portion:
    """What was drawn of one source: its rows, of how many, and its share of all that is written (0 to 1)."""

    role: str
    path: str
    rows: list[Row]
    available: int
    amount: int
    share: float = 0.0


def check_shares(shares: dict[str, float]) -> None:
    """Raise ConfigError unless each share is above 0 and something is left beside them."""
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"{name} is {share:g}; it must be above 0 and below 1, the share of all rows written")
    if sum(shares.values()) >= 1:
        given = " and ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ConfigError(f"{given} leave nothing for the task's own rows; lower them")


def draw(
    rows: Sequence[Row], amount: float, measure: Callable[[Row], int], seed: int, *, shortage: Shortage, what: str
) -> list[Row]:
    """Return the rows, in their order, whose measures sum to as near `amount` as whole rows allow.

    Raises DataError where there are too few and `shortage` is error, or where no row is near enough.
    """
    order = sorted(range(len(rows)), key=lambda i: (hash_point(f"mixture {question_key(rows[i].record)}", seed), i))
    sums = list(itertools.accumulate(measure(rows[i]) for i in order))
    total = sums[-1] if sums else 0
    passes, rest = 0, amount
    if total < amount - 0.5 * (total / max(len(rows), 1)):
        if shortage == "error" or not total:
            remedy = "give more rows, lower the share, or choose --shortage less or repeat"
            raise DataError(f"{what}: it needs {amount:,.0f} and has {total:,}; {remedy}")
        passes, rest = divmod(amount, total) if shortage == "repeat" else (1, 0)
    count = bisect.bisect_left(sums, rest)
    if count < len(sums) and abs(sums[count] - rest) <= abs(rest - (sums[count - 1] if count else 0)):
        count += 1
    drawn = [rows[i] for i in sorted(order[:count])]
    result = [row for _ in range(int(passes)) for row in rows] + drawn
    if not result:
        raise DataError(f"{what}: {amount:.2g} is no row; raise the share, or leave it out")
    return result


def mixture(
    task: Sequence[tuple[str, Sequence[Row]]],
    weights: Sequence[float] | None,
    extra: Sequence[tuple[str, str, Sequence[Row], float]],
    measure: Callable[[Row], int],
    seed: int,
    shortage: Shortage = "error",
) -> list[Portion]:
    """Return what is drawn of the task's sources (path, rows) and the others (role, path, rows, share).

    Several sources of one role share its amount by how much each has. Raises ConfigError for impossible weights or
    shares, DataError for a source that is too small.
    """
    sizes = [sum(map(measure, rows)) for _, rows in task]
    portions = [
        Portion("training", path, list(rows), len(rows), size) for (path, rows), size in zip(task, sizes, strict=True)
    ]
    if weights is not None:
        check_weights(weights, len(task))
        scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        for i, (path, rows) in enumerate(task):
            drawn = draw(rows, scale * weights[i], measure, seed, shortage="error", what=f"{path} by its weight")
            portions[i] = Portion("training", path, drawn, len(rows), sum(map(measure, drawn)))
    given = {role: share for role, _, _, share in extra}
    check_shares({f"{role}_share": share for role, share in given.items()})
    whole = sum(portion.amount for portion in portions) / (1 - sum(given.values()))
    for role, path, rows, share in extra:
        drawn = draw(rows, whole * share, measure, seed, shortage=shortage, what=f"{path} for {role}_share {share:g}")
        portions.append(Portion(role, path, drawn, len(rows), sum(map(measure, drawn))))
    total = sum(portion.amount for portion in portions)
    return [Portion(p.role, p.path, p.rows, p.available, p.amount, p.amount / max(total, 1)) for p in portions]
