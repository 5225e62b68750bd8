"""Causal attention inside documents: softmax(Q K^T / sqrt(d) + mask) V  (Vaswani et al. 2017, equation 1).

Which keys a token sees is an interval: token i sees itself and the `positions[i]` tokens before it. That one
rule is the causal mask, the block-diagonal mask of packed rows (positions restart at 0 in each document),
and the mask of padding (a padding token has position 0, sees only itself and is seen by nobody).

Forward is torch's fused kernel. So is the backward pass, but for one case: in bf16 on a CPU torch's is up
to 5x slower than matmuls on short rows (forward and backward of 16 rows of 64: 15.5 ms against 3.3; 4 of 256:
13 against 10), so there it is made here, a block of queries at a time over the keys that block can see:
    P = softmax(s Q K^T),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(dP P)),  dQ = s dS K,  dK = s dS^T Q
Keeping P from the forward pass was rejected: it is 141 MB over 30 layers at 4 x 256.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 128  # queries whose scores exist at a time in the backward pass
GRAIN = 32  # keys; the matmul library keeps a plan for every shape, so there are to be few shapes


@dataclass(frozen=True)
class Visibility:
    """What each query may see; built once for a forward pass and shared by its layers."""

    mask: torch.Tensor | None
    """(B, 1, T, S) bool, True where a query may look; None where `causal` says it all."""
    causal: bool
    """With no mask: True, a query sees itself and earlier; False, it sees all keys."""
    block_starts: tuple[int, ...] = ()
    """First key that any query of each block of BLOCK queries sees, rounded down; empty: 0 for all."""


def visibility(positions: torch.Tensor, offset: int = 0) -> Visibility:
    """Turn positions into a mask.

    Args:
        positions: (B, T) int64, the position of each token in its own document.
        offset: tokens that are already in the cache, before these.
    """
    length = positions.shape[1]
    query = torch.arange(offset, offset + length, device=positions.device)[:, None]  # (T, 1)
    key = torch.arange(offset + length, device=positions.device)  # (S,)
    first = query[None] - positions[:, :, None]  # (B, T, 1)
    mask = ((key <= query) & (key >= first))[:, None]
    starts = first.amin(0).flatten()  # (T,)
    blocks = tuple(int(part.min()) // GRAIN * GRAIN for part in starts.split(BLOCK)) if offset == 0 else ()
    return Visibility(mask, causal=False, block_starts=blocks)


def _blocked_gradients(q, k, v, dout, seen: Visibility):
    """Return dQ, dK, dV of attention over a whole sequence (no cache), in the inputs' shapes and dtype."""
    batch, heads, length, width = q.shape
    groups = batch * k.shape[1]  # a key/value head and its G query heads are one matmul
    scale = width**-0.5
    keys, values = k.reshape(groups, length, width), v.reshape(groups, length, width)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for block, start in enumerate(range(0, length, BLOCK)):
        end = min(start + BLOCK, length)
        first = seen.block_starts[block] if seen.block_starts else 0
        query = q[:, :, start:end].reshape(groups, -1, width)  # (B K, G n, d)
        dblock = dout[:, :, start:end].reshape(groups, -1, width)
        key, value = keys[:, first:end], values[:, first:end]
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)  # (B K, G n, S)
        hidden = _hidden_keys(seen, start, end, first, q.device)
        scores.view(batch, heads, end - start, end - first).masked_fill_(hidden, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        dprobabilities = torch.bmm(dblock, value.transpose(1, 2))
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, q.dtype).mul_(scale)
        dq[:, :, start:end] = torch.bmm(dscores, key).view(batch, heads, -1, width)
        dk[:, first:end] += torch.bmm(dscores.transpose(1, 2), query)
        dv[:, first:end] += torch.bmm(probabilities.transpose(1, 2), dblock)
    return dq, dk.view(k.shape), dv.view(v.shape)


def _hidden_keys(seen: Visibility, start: int, end: int, first: int, device) -> torch.Tensor:
    """Return the mask of keys first..end that queries start..end must not see, (B or 1, 1, n, S)."""
    if seen.mask is not None:
        return ~seen.mask[:, :, start:end, first:end]
    query = torch.arange(start, end, device=device)[:, None]
    return (torch.arange(first, end, device=device) > query)[None, None]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen):
        ctx.save_for_backward(q, k, v)
        ctx.seen = seen
        return _fused(q, k, v, seen)

    @staticmethod
    def backward(ctx, dout):
        return *_blocked_gradients(*ctx.saved_tensors, dout, ctx.seen), None


def _fused(q, k, v, seen: Visibility) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, is_causal=seen.causal, enable_gqa=grouped)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Visibility) -> torch.Tensor:
    """Attend from q (B, H, T, d) to k and v (B, K, S, d), H a multiple of K; returns (B, H, T, d)."""
    whole = q.shape[2] == k.shape[2] and (seen.causal or seen.mask is not None)
    if torch.is_grad_enabled() and q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and whole:
        return _BlockedAttention.apply(q, k, v, seen)
    return _fused(q, k, v, seen)
