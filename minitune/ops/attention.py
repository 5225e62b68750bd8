"""Causal attention inside documents: softmax(s Q K^T + mask) V, s = 1 / sqrt(d)  (Vaswani et al. 2017, equation 1).

Which keys a token sees is an interval: token i sees itself and the `positions[i]` tokens before it, or at most
`window - 1` of them. That one rule is the causal mask, the block-diagonal mask of packed rows (positions restart at 0
in each document), the sliding window, and the mask of padding (a padding token has position 0, sees only itself and is
seen by nobody).

Forward is torch's fused kernel. So is the backward pass on a GPU; on a CPU it is made here, a block of queries at a
time over the keys that block can see:
    P = softmax(s Q K^T),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(dP P)),  dQ = s dS K,  dK = s dS^T Q
With Gemma 2's soft-cap c the scores are c tanh(s Q K^T / c), which torch's kernel does not know, so both passes are
made that way; dS is then also multiplied by 1 - tanh^2.
Torch's backward pass was rejected there: on two threads of an AMX processor a layer of 9 heads of 64 takes it (in
brackets: this one) 15 ms (3) in bf16 at 8 x 128, 11 (5) at 4 x 256, 23 (18) at 1 x 1024, and in fp32 5.2 (4.5), 8.1
(7.2), 28 (28); at 2 x 512 15 (12). Keeping P from the forward pass is 141 MB over 30 layers at 4 x 256.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 64  # queries whose scores exist at a time in the backward pass in fp32, twice as many in 16 bits
GRAIN = 32  # keys; the matmul library keeps a plan for every shape, so there are to be few shapes


@dataclass(frozen=True)
class Visibility:
    """What each query may see; built once for a forward pass and shared by its layers."""

    mask: torch.Tensor | None
    """(B, 1, T, S) bool, True where a query may look; None where `causal` says it all."""
    causal: bool
    """With no mask: True, a query sees itself and earlier; False, it sees all keys."""
    block_starts: tuple[int, ...] = ()
    """First key that any of each BLOCK queries sees, rounded down; empty: 0 for all."""


def visibility(positions: torch.Tensor, offset: int = 0, window: int | None = None) -> Visibility:
    """Turn positions into a mask.

    Args:
        positions: (B, T) int64, the position of each token in its own document.
        offset: tokens that are already in the cache, before these.
        window: how many tokens, itself among them, one sees at most; None: its whole document so far.
    """
    length = positions.shape[1]
    query = torch.arange(offset, offset + length, device=positions.device)[:, None]  # (T, 1)
    key = torch.arange(offset + length, device=positions.device)  # (S,)
    reach = positions if window is None else positions.clamp(max=window - 1)
    first = query[None] - reach[:, :, None]  # (B, T, 1)
    mask = ((key <= query) & (key >= first))[:, None]
    starts = first.amin(0).flatten()  # (T,)
    blocks = tuple(int(part.min()) // GRAIN * GRAIN for part in starts.split(BLOCK)) if offset == 0 else ()
    return Visibility(mask, causal=False, block_starts=blocks)


@dataclass(frozen=True)
class _Block:
    """Queries start..end of a sequence and the keys first..last that any of them may see."""

    start: int
    end: int
    first: int
    last: int
    barrier: torch.Tensor | None
    """What is added to the scores of the last keys, (B or 1, 1, n, keys): -inf where a query may not look, else 0."""


def block_size(dtype: torch.dtype) -> int:
    """Return how many queries' scores exist at a time."""
    return BLOCK * max(1, 4 // dtype.itemsize)


def _barrier(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return -inf where `hidden`, in like's dtype; adding it takes a quarter of the time of filling by a mask."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _blocks(queries: int, keys: int, seen: Visibility, like: torch.Tensor) -> Iterator[_Block]:
    """Cut the queries into blocks; those of a cache come after `keys - queries` earlier tokens."""
    size = block_size(like.dtype)
    for start in range(0, queries, size):
        end = min(start + size, queries)
        first = min(seen.block_starts[start // BLOCK : -(-end // BLOCK)], default=0)
        last = end if seen.causal or seen.block_starts else keys
        barrier = None
        if seen.mask is not None:
            barrier = _barrier(~seen.mask[:, :, start:end, first:last], like)
        elif seen.causal:  # among themselves only: all of them see every earlier key
            among = torch.ones(1, 1, end - start, end - start, dtype=torch.bool, device=like.device)
            barrier = _barrier(among.triu_(1), like)
        yield _Block(start, end, first, last, barrier)


def _probabilities(q, keys, block: _Block, scale: float, softcap: float | None):
    """Return a block's queries (B K, G n, d), its probabilities (B K, G n, S) and, with a cap, tanh of its scores."""
    batch, heads = q.shape[:2]
    query = q[:, :, block.start : block.end].reshape(len(keys), -1, q.shape[-1])
    scores, bent = torch.bmm(query, keys.transpose(1, 2)).mul_(scale), None
    if softcap is not None:
        bent = scores.div_(softcap).tanh_()
        scores = bent * softcap
    shape = batch, heads, block.end - block.start, block.last - block.first
    if block.barrier is not None:
        scores.view(shape)[..., -block.barrier.shape[-1] :].add_(block.barrier)
    return query, torch.softmax(scores, dim=-1), bent


def _grouped(k, v):
    """Return keys and values as (B K, S, d): a key/value head and its G query heads are one matmul."""
    return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])


def _blocked_output(q, k, v, seen: Visibility, scale: float, softcap: float | None):
    """Return attention's output (B, H, T, d), made a block of queries at a time."""
    keys, values = _grouped(k, v)
    out = torch.empty_like(q)
    for block in _blocks(q.shape[2], k.shape[2], seen, q):
        part = slice(block.first, block.last)
        _, probabilities, _ = _probabilities(q, keys[:, part], block, scale, softcap)
        mixed = torch.bmm(probabilities, values[:, part])
        out[:, :, block.start : block.end] = mixed.view(*q.shape[:2], -1, q.shape[-1])
    return out


def _blocked_gradients(q, k, v, dout, seen: Visibility, scale: float, softcap: float | None):
    """Return dQ, dK, dV of attention in the inputs' shapes and dtype."""
    keys, values = _grouped(k, v)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(q.shape[2], k.shape[2], seen, q):
        part = slice(block.first, block.last)
        shares = dk[:, part], dv[:, part]
        mine = _block_gradients(q, keys[:, part], values[:, part], dout, block, scale, softcap, *shares)
        dq[:, :, block.start : block.end] = mine.view(*q.shape[:2], -1, q.shape[-1])
    return dq, dk.view(k.shape), dv.view(v.shape)


def _block_gradients(q, keys, values, dout, block: _Block, scale: float, softcap: float | None, dkeys, dvalues):
    """Return a block's dQ (B K, G n, d) and add what it gives to the keys and values it sees (B K, S, d).

    A function of its own so that a block's scores are dropped before the next block makes its own.
    """
    query, probabilities, bent = _probabilities(q, keys, block, scale, softcap)
    dblock = dout[:, :, block.start : block.end].reshape(query.shape)
    dprobabilities = torch.bmm(dblock, values.transpose(1, 2))
    dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, q.dtype).mul_(scale)
    if bent is not None:
        dscores.addcmul_(dscores, bent.square_(), value=-1)
    dkeys += torch.bmm(dscores.transpose(1, 2), query)
    dvalues += torch.bmm(probabilities.transpose(1, 2), dblock)
    return torch.bmm(dscores, keys)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen, scale, softcap):
        ctx.save_for_backward(q, k, v)
        ctx.settings = seen, scale, softcap
        return _fused(q, k, v, seen, scale) if softcap is None else _blocked_output(q, k, v, *ctx.settings)

    @staticmethod
    def backward(ctx, dout):
        return *_blocked_gradients(*ctx.saved_tensors, dout, *ctx.settings), None, None, None


def _fused(q, k, v, seen: Visibility, scale: float) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.mask, is_causal=seen.causal, scale=scale, enable_gqa=grouped
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend from q (B, H, T, d) to k and v (B, K, S, d), H a multiple of K; returns (B, H, T, d).

    Args:
        q: queries.
        k: keys.
        v: values.
        seen: which keys each query may see.
        scale: s, 1 / sqrt(d) by default.
        softcap: scores are bent to stay within plus and minus this; None: they are not.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole = q.shape[2] == k.shape[2] and (seen.causal or seen.mask is not None)
    tracked = torch.is_grad_enabled() and q.requires_grad
    if softcap is not None or tracked and whole and q.device.type == "cpu":
        return _BlockedAttention.apply(q, k, v, seen, scale, softcap)
    return _fused(q, k, v, seen, scale)
