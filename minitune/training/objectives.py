"""Objectives: what the loop minimises. Each maps a batch to (summed loss, weight, metrics).

The loop divides the sum of the losses by the sum of the weights over a whole accumulation window, so an
objective never takes a mean: a mean per micro-batch weights tokens by how few neighbours they had.
"""

import dataclasses
from collections.abc import Callable

import torch

from minitune.data.batching import Batch
from minitune.losses.sft import sft_loss
from minitune.model.transformer import Transformer

Objective = Callable[[Transformer, Batch], tuple[torch.Tensor, int, dict[str, float]]]


def supervised(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return the summed cross-entropy of the target tokens in nats, their number, and no further metrics.

    Rows of one document need no mask but the causal one: padding lies to their right, where no target looks.
    """
    packed = batch.document_count > len(batch.ids)
    hidden = model.hidden(batch.ids, positions=batch.positions if packed else None)  # (B, T, D)
    loss_sum, count = sft_loss(hidden, model.head_weight, batch.targets)
    return loss_sum, count, {}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device) for name in ("ids", "targets", "positions")}
    return dataclasses.replace(batch, **moved)
