"""Objectives: what the loop minimises. Each maps a batch to (summed loss, weight, metrics).

The loop divides the sum of the losses by the sum of the weights over a whole accumulation window, so an
objective never takes a mean: a mean per micro-batch weights tokens by how few neighbours they had.
"""

from collections.abc import Callable

import torch

from minitune.data.batching import Batch
from minitune.losses.sft import sft_loss
from minitune.model.transformer import Transformer

Objective = Callable[[Transformer, Batch], tuple[torch.Tensor, int, dict[str, float]]]


def supervised(model: Transformer, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return the summed cross-entropy of the target tokens in nats, their number, and no further metrics."""
    hidden = model.hidden(batch.ids, positions=batch.positions)  # (B, T, D)
    loss_sum, count = sft_loss(hidden, model.head_weight, batch.targets)
    return loss_sum, count, {}
