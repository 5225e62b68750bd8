"""How far two models' next-token distributions are apart:  KL(p || q) = sum_v p_v (log p_v - log q_v), in nats a token.

It is what an adapter's merge did to the model that was trained: 0 says that the two answer alike. A difference of
weights would not say it, since most of them hardly matter.
"""

from collections.abc import Sequence

import torch

from minitune.model.transformer import Transformer


@torch.inference_mode()
def next_token_log_probabilities(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """Return log p of every next token, (T, V) fp64 on the CPU, after each of `ids` (T of them)."""
    logits = model(torch.tensor([list(ids)], device=model.head_weight.device))[0]
    return torch.log_softmax(logits.double(), dim=-1).cpu()


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Return the mean over positions of KL(p || q) for log-probabilities (T, V), in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
