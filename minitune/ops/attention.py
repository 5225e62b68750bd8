"""Causal attention inside documents: softmax(Q K^T / sqrt(d) + mask) V  (Vaswani et al. 2017, equation 1).

Which keys a token sees is an interval: token i sees itself and the `positions[i]` tokens before it. That one
rule is the causal mask, the block-diagonal mask of packed rows (positions restart at 0 in each document),
and the mask of padding (a padding token has position 0, sees only itself and is seen by nobody).
"""

import torch
import torch.nn.functional as F


def visibility(positions: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the mask (B, 1, T, offset + T), True where a query may look.

    Args:
        positions: (B, T) int64, the position of each token in its own document.
        offset: tokens that are already in the cache, before these.
    """
    length = positions.shape[1]
    query = torch.arange(offset, offset + length, device=positions.device)[None, :, None]  # (1, T, 1)
    key = torch.arange(offset + length, device=positions.device)  # (S,)
    return ((key <= query) & (key >= query - positions[:, :, None]))[:, None]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Attend from q (B, H, T, d) to k and v (B, K, S, d), H a multiple of K; returns (B, H, T, d).

    `mask` (B, 1, T, S) bool, or None with `causal` saying whether each query sees only itself and earlier.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
