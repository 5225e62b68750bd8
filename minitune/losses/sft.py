"""Supervised fine-tuning: the summed negative log-likelihood of the target tokens, and how many there are.

    L = - sum over targets t of log p(t | tokens before)
The sum, not a mean: the loop divides once, by all target tokens of the accumulation window. A mean per
micro-batch was rejected: it weights tokens by how few neighbours they had.
"""

import torch

from minitune.ops.cross_entropy import linear_cross_entropy


def sft_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, int]:
    """Return (summed loss in nats, number of target tokens).

    Args:
        hidden: (B, T, D) final hidden states.
        head: (V, D).
        targets: (B, T) int64, the token to predict at each position, -100 where there is none.
        softcap: what logits are bent to stay within (Gemma 2); None: they are not.
    """
    chosen = targets >= 0
    losses = linear_cross_entropy(hidden[chosen], head, targets[chosen], softcap=softcap)
    return losses.sum(), len(losses)
