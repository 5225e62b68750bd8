"""Examples -> batches: which rows are trained together and in which order, and their tensors.

A plan is a pure function of the lengths, the seed and the epoch, so a resumed run sees the same rows. Packing
puts several documents into one row of at most `max_length` tokens by best-fit decreasing: the longest first,
each into the fullest row that still holds it, at most 11/9 of the best possible number of rows (Johnson 1974).
Open rows are found by bisecting the sizes of the gaps there are, at most `max_length` of them, so 100,000
examples of 5 to 1,004 tokens take 0.6 s in rows of 2,048 (one loaded core; tests/data/test_batching.py).
Cutting documents at the row's end ("wrapped" packing) was rejected: it fills rows completely but trains on
answers without their questions.
"""

import hashlib
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minitune.data.examples import Example
from minitune.data.preferences import Item, Judged, Pair
from minitune.errors import ConfigError

if TYPE_CHECKING:
    import torch

GRAIN = 32  # tokens
IGNORED = -100
_SORTED_WINDOW = 50  # batches whose rows are sorted together: little padding, and neighbours still change


@dataclass(frozen=True)
class Batch:
    """One batch of B rows and T tokens, each row one document or several packed ones.

    ids (B, T) int64; targets (B, T) int64: the id of the next token of the same document if that token is to be
    learned, else -100; positions (B, T) int64: the token's place in its own document, 0 for padding.
    """

    ids: "torch.Tensor"
    targets: "torch.Tensor"
    positions: "torch.Tensor"
    target_count: int
    document_count: int


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """A batch of pairs, or of judged examples, whose N documents are numbered in reading order.

    Document 2i is the chosen and 2i + 1 the rejected side of pair i. owners (B, T) int64: the document that each
    token belongs to, -1 for padding. ends (N, 2) int64: row and column of each document's last token. reference
    (N,) fp32: summed log-probability of each document's targets under the reference model, in nats; None unless
    every item has it. margins (N / 2,) fp32: by how much each chosen side is better, 0 where that is not said, so
    that a pair's loss does not depend on its neighbours; None for judged examples. desirable (N,) bool: the
    judgements; None for pairs.

    mismatched, of judged examples: their prompts with answers to others (`preferences.with_mismatches`).
    """

    owners: "torch.Tensor"
    ends: "torch.Tensor"
    reference: "torch.Tensor | None" = None
    margins: "torch.Tensor | None" = None
    desirable: "torch.Tensor | None" = None
    mismatched: "PreferenceBatch | None" = None


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Return the tensors of `rows`, each a list of documents laid end to end, padded on the right.

    The width is rounded up to a multiple of GRAIN: the CPU's matmul library keeps a plan for every shape it has
    seen, and a run of ever new widths grew by 300 MB (LoRA in bf16, 14 steps of 2 x up to 256).
    """
    import torch

    width = max(sum(len(example.ids) for example in row) for row in rows)
    width += -width % GRAIN
    ids = [_padded([i for e in row for i in e.ids], width, pad_id) for row in rows]
    targets = [_padded([t for e in row for t in shifted_targets(e)], width, IGNORED) for row in rows]
    positions = [_padded([p for e in row for p in range(len(e.ids))], width, 0) for row in rows]
    count = sum(target != IGNORED for row in targets for target in row)
    documents = sum(map(len, rows))
    return Batch(torch.tensor(ids), torch.tensor(targets), torch.tensor(positions), count, documents)


def collate_preferences(rows: Sequence[Sequence[Pair | Judged]], pad_id: int, *, packing: bool) -> PreferenceBatch:
    """Return the tensors of rows of pairs or of judged examples.

    With `packing` a row's documents lie end to end, the sides of a pair beside each other; without it every
    document has a row of its own.
    """
    import torch

    items = [item for row in rows for item in row]
    batch = collate_documents(layout(rows, packing), pad_id)
    references = [item.reference for item in items]
    scored = None not in references
    if scored:
        batch = replace(batch, reference=_column(references, slice(0, len(items[0].documents))))
    if isinstance(items[0], Pair):
        margins = [pair.margin or 0.0 for pair in items]
        return replace(batch, margins=torch.tensor(margins, dtype=torch.float32))
    laid = [[item.mismatched for item in row] for row in rows] if packing else [[item.mismatched] for item in items]
    others = collate_documents(laid, pad_id)
    others = replace(others, reference=_column(references, slice(1, 2)) if scored else None)
    return replace(batch, desirable=torch.tensor([item.desirable for item in items]), mismatched=others)


def _column(references: list[tuple[float, ...]], part: slice) -> "torch.Tensor":
    """Return a part of each item's reference sums, one after the other, fp32."""
    import torch

    return torch.tensor([value for sums in references for value in sums[part]], dtype=torch.float32)


def layout(rows: Sequence[Sequence[Item]], packing: bool) -> list[list[Example]]:
    """Return the rows of documents that rows of items become: packed as they are, or one document a row."""
    laid = [[document for item in row for document in item.documents] for row in rows]
    return laid if packing else [[document] for row in laid for document in row]


def collate_documents(rows: list[list[Example]], pad_id: int) -> PreferenceBatch:
    """Return the tensors of rows of documents with each token's document and each document's end, as in a batch."""
    import torch

    batch = collate(rows, pad_id)
    owners, ends = [], []
    for number, row in enumerate(rows):
        owned: list[int] = []
        for document in row:
            owned += [len(ends)] * len(document.ids)
            ends.append((number, len(owned) - 1))
        owners.append(_padded(owned, batch.ids.shape[1], -1))
    return PreferenceBatch(**vars(batch), owners=torch.tensor(owners), ends=torch.tensor(ends))


def shifted_targets(example: Example) -> list[int]:
    """Return what each token of a document has to predict: the next token if it is a target, else -100."""
    following = zip(example.ids[1:], example.targets[1:], strict=True)
    return [token if learned else IGNORED for token, learned in following] + [IGNORED]


def _padded(values: list[int], width: int, filler: int) -> list[int]:
    return values + [filler] * (width - len(values))


def plan_batches(
    lengths: Sequence[int], *, batch_size: int, max_length: int, packing: bool, seed: int, epoch: int
) -> list[list[list[int]]]:
    """Return one epoch: batches of up to `batch_size` rows of example indices, every example exactly once.

    With `packing` a row holds examples of together at most `max_length` tokens, without it one example. Rows of
    like length share a batch. Raises ConfigError for a length that fits no row.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: must be at least 1")
    if lengths and max(lengths) > max_length:
        raise ConfigError(f"an example of {max(lengths)} tokens is over max_length {max_length}")
    order = shuffled(len(lengths), seed, epoch, "rows")
    rows = [[i] for i in order]
    if packing:
        rows = _best_fit(order, lengths, max_length)
        rows = [rows[i] for i in shuffled(len(rows), seed, epoch, "packed rows")]
    window = batch_size * _SORTED_WINDOW
    parts = [rows[i : i + window] for i in range(0, len(rows), window)]
    rows = [row for part in parts for row in sorted(part, key=lambda row: sum(lengths[i] for i in row))]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in shuffled(len(batches), seed, epoch, "batches")]


def plan_items(items: Sequence[Item], *, max_length: int, **options: int) -> list[list[list[int]]]:
    """Return `plan_batches` of whole items, which are never split; max_length is that of a document.

    A row has room for as many documents of that length as an item has.
    """
    room = max_length * max((len(item.documents) for item in items), default=1)
    return plan_batches([sum(len(d.ids) for d in item.documents) for item in items], max_length=room, **options)


def _best_fit(order: list[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack the longest first, each example into the row it fills best; equals go in the given order."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[list[int]]] = {}  # free tokens -> the rows that have that many
    gaps: list[int] = []  # the keys of open_rows, sorted
    for index in sorted(order, key=lengths.__getitem__, reverse=True):
        at = bisect_left(gaps, lengths[index])
        if at == len(gaps):
            row, free = [], max_length
            rows.append(row)
        else:
            free = gaps[at]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free], gaps[at]
        row.append(index)
        free -= lengths[index]
        if free:
            if free not in open_rows:
                insort(gaps, free)
            open_rows.setdefault(free, []).append(row)
    return rows


def efficiency(plan: list[list[list[int]]], lengths: Sequence[int]) -> float:
    """Return the share of a plan's token places (rows x longest row of each batch) that hold a document."""
    filled = [[sum(lengths[i] for i in row) for row in batch] for batch in plan]
    places = sum(len(batch) * max(batch) for batch in filled)
    return sum(map(sum, filled)) / places if places else 1.0


def shuffled(count: int, *key: int | str) -> list[int]:
    """Return 0..count-1 in an order that `key` alone decides, the same on every machine and Python.

    Sorting by `random.random` is used because Python promises that sequence, and not that of `shuffle`.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    marks = [draw() for _ in range(count)]
    return sorted(range(count), key=marks.__getitem__)


def mix(
    sources: Sequence[tuple[Sequence[Item], float | None]],
    *,
    seed: int,
    epoch: int = 0,
    shares: Sequence[float | None] = (),
) -> list[Item]:
    """Return one epoch's examples: as many as there are in all, shared among the sources by weight.

    Weights are relative; without any (all None) every example comes once. A source whose share is under its
    size gives a part of its rows, one whose share is over gives rows repeatedly; over the epochs all rows of a
    source come equally often (to within one), as each epoch goes on where the one before stopped. Raises
    ConfigError for a weight that is not above 0, or weights on some sources only.
    """
    counts = mixed_counts([len(examples) for examples, _ in sources], [weight for _, weight in sources], shares)
    mixed = []
    for number, ((examples, _), count) in enumerate(zip(sources, counts, strict=True)):
        passes = range(epoch * count // len(examples), -(-(epoch + 1) * count // len(examples)))
        stream = [i for turn in passes for i in shuffled(len(examples), seed, number, turn, "mix")]
        start = epoch * count - passes.start * len(examples)
        mixed += [examples[i] for i in stream[start : start + count]]
    return mixed


def mixed_counts(
    sizes: Sequence[int], weights: Sequence[float | None], shares: Sequence[float | None] = ()
) -> list[int]:
    """Return how many rows an epoch takes of each source: `sum(sizes)` by weight, the largest remainders up.

    A source with a share, where there are any, has that share of all rows, and the others have theirs as if it were
    not there.
    """
    if any(share is not None for share in shares):
        return _shared_counts(sizes, weights, shares)
    if all(weight is None for weight in weights):
        return list(sizes)
    for number, weight in enumerate(weights, 1):
        if weight is None or not 0 < weight < float("inf"):
            raise ConfigError(f"weight {weight} of data source {number}: must be a number above 0")
    return apportion(sum(sizes), weights)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Return `total` in whole parts by weight: rounded down, then the largest remainders up (Hamilton's method)."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _shared_counts(sizes: Sequence[int], weights: Sequence[float | None], shares: Sequence[float | None]) -> list[int]:
    """Return the rows of each source where some have a share f: n rows of the others make n / (1 - sum f) in all."""
    taken = sum(share or 0 for share in shares)
    for number, (weight, share) in enumerate(zip(weights, shares, strict=True), 1):
        if share is not None and (weight is not None or not 0 < share < 1 or taken >= 1 or None not in shares):
            raise ConfigError(
                f"share {share} of data source {number}: it must be above 0, without a weight, all shares together "
                "below 1, and one source must have none"
            )
    rest = [i for i, share in enumerate(shares) if share is None]
    counts = dict(zip(rest, mixed_counts([sizes[i] for i in rest], [weights[i] for i in rest]), strict=True))
    whole = sum(counts.values()) / (1 - taken)
    return [counts[i] if share is None else max(1, round(share * whole)) for i, share in enumerate(shares)]
