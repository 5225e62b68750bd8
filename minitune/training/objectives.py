"""Objectives: what the loop minimises. Each maps a batch to (summed loss, weight, metrics).

The loop divides the sum of the losses by the sum of the weights over a whole accumulation window, so an
objective never takes a mean: a mean per micro-batch weights tokens by how few neighbours they had. A metric is a sum
and the number that it is over, for the same reason.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from minitune.data.batching import Batch
from minitune.losses.sft import sft_loss
from minitune.model.transformer import Transformer
from minitune.ops.cross_entropy import linear_cross_entropy

Metrics = dict[str, tuple[float, float]]
Objective = Callable[[Transformer, Batch], tuple[torch.Tensor, int, Metrics]]
AnyBatch = TypeVar("AnyBatch", bound=Batch)


def final_hidden(model: Transformer, batch: Batch) -> torch.Tensor:
    """Return the final hidden states (B, T, D) of a batch.

    Rows of one document need no mask but the causal one: padding lies to their right, where no target looks.
    """
    needed = batch.document_count > len(batch.ids) or model.config.by_length
    return model.hidden(batch.ids, positions=batch.positions if needed else None)


def supervised(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int, Metrics]:
    """Return the summed cross-entropy of the target tokens in nats, their number, and no further metrics."""
    loss_sum, count = sft_loss(
        final_hidden(model, batch), model.head_weight, batch.targets, model.config.logits_softcap
    )
    return loss_sum, count, {}


def document_losses(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each document's summed cross-entropy in nats (N,) fp64 and its target tokens (N,), in reading order."""
    chosen = batch.targets >= 0  # (B, T)
    losses = linear_cross_entropy(
        final_hidden(model, batch)[chosen],
        model.head_weight,
        batch.targets[chosen],
        softcap=model.config.logits_softcap,
    )
    owners = (batch.positions == 0).flatten().cumsum(0).view_as(chosen)[chosen] - 1  # padding owns no target
    _, owners, counts = owners.unique_consecutive(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, owners.cpu(), losses.double().cpu()), counts


def add_metrics(sums: dict[str, list[float]], metrics: Metrics) -> None:
    """Add a batch's metrics to sums of the same names, in place."""
    for name, (total, count) in metrics.items():
        known = sums.setdefault(name, [0.0, 0])
        sums[name] = [known[0] + total, known[1] + count]


def mean_metrics(sums: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean of each metric that is over anything."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return the batch, and one inside it, with all tensors on `device`."""
    moved = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(device)
        elif isinstance(value, Batch):
            moved[field.name] = to_device(value, device)
    return dataclasses.replace(batch, **moved)
