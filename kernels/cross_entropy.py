"""Cross-entropy of a linear head without the logits:  l_i = log sum_v exp(z_iv) - z_it.

Here z is a = h W^T or, with Gemma 2's soft-cap c, z = c tanh(a / c). The logits a exist for a chunk of rows at a time.
One pass over a row finds its maximum m of z and the sum of exp(z - m), rescaling the sum where m grows (Milakov &
Gimelshein 2018, algorithm 3). A second pass writes over each logit its derivative
    dl/da_v = (exp(z_v - m) / sum - [v = t]) (1 - tanh^2(a_v / c))
from which two matmuls make dh and dW. A row of target -100 has loss 0 and derivative 0; the loss of a row whose target
is no token is NaN, which stops a run.

l_i depends on h_i alone, so row i of dh is scaled by the incoming gradient of l_i afterwards. dW sums over rows: it is
made for the gradient of a sum, and made again where rows turn out to be weighted differently, as in the reference.
Making the matmul part of the kernel was rejected: it would have to reach cuBLAS's rate to save one passage of a chunk
through memory.
"""

import torch
import triton
import triton.language as tl

from minitune.errors import ConfigError
from minitune.kernels.checks import require

CHUNK_BYTES = 256 << 20  # of logits; few chunks, since each adds a pass over dW, (V, D) in fp32
GRAIN = 128  # rows
ALIGNMENT = 16  # elements; a row of logits starts at a multiple, so that an odd V is read in full vectors too
IGNORED = tl.constexpr(-100)


@triton.jit
def _cap(logit, cap, CAP: tl.constexpr):
    """Return the capped logit; tanh u for u < 2 as Lambert's continued fraction, cut after 7, which is right to 1e-8.

    1 - exp(-2u) would lose the last bits of a small u.
    """
    if CAP:
        u = tl.abs(logit / cap)
        q = u * u
        near = u * (135135 + q * (17325 + q * (378 + q))) / (135135 + q * (62370 + q * (3150 + q * 28)))
        shrunk = tl.exp(-2.0 * u)
        u = cap * tl.where(u < 2, near, (1.0 - shrunk) / (1.0 + shrunk))
        logit = tl.where(logit < 0, -u, u)
    return logit


@triton.jit
def cross_entropy_rows(
    logits, targets, losses, stride, vocabulary, cap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss of one row and, if GRADIENT, the derivative over its logits (stride,), of which V are tokens."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    picked = _cap(tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32), cap, CAP)
    lane = tl.arange(0, BLOCK)
    top, total = float("-inf"), 0.0
    for start in range(0, stride, BLOCK):
        column = start + lane
        logit = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
        z = tl.where(column < vocabulary, _cap(logit, cap, CAP), float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
    kept = target != IGNORED
    tl.store(losses + row, tl.where(kept, tl.log(total) + top - picked, 0.0))
    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, stride, BLOCK):
            column = start + lane
            logit = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
            z = _cap(logit, cap, CAP)
            derivative = tl.exp(z - top) * scale - tl.where(column == target, 1.0, 0.0)
            if CAP:
                derivative *= 1.0 - (z / cap) * (z / cap)
            derivative = tl.where(kept & (column < vocabulary), derivative, 0.0)
            tl.store(logits + column, derivative.to(logits.dtype.element_ty), mask=column < stride)


def tiling(vocabulary: int) -> dict[str, int]:
    """Return BLOCK and num_warps for rows of V logits."""
    block = min(max(triton.next_power_of_2(vocabulary), 1024), 8192)
    return {"BLOCK": block, "num_warps": max(block // 512, 4)}


def _room(hidden, weight):
    """Return memory for one chunk's logits, (rows, V) of rows that start at multiples of ALIGNMENT."""
    stride = triton.cdiv(len(weight), ALIGNMENT) * ALIGNMENT
    rows = max(CHUNK_BYTES // (stride * hidden.element_size()) // GRAIN, 1) * GRAIN
    rows = max(min(rows, len(hidden)), 1)
    return torch.empty(rows, stride, dtype=hidden.dtype, device=hidden.device)[:, : len(weight)]


def _chunks(hidden, weight, targets, cap, losses, gradient: bool):
    """Yield each chunk's rows and, in the same memory, their logits or d(sum of losses)/d(logits); fill losses (N,)."""
    room = _room(hidden, weight)
    for start in range(0, len(targets), len(room)):
        part = slice(start, min(start + len(room), len(targets)))
        logits = room[: part.stop - start]
        torch.mm(hidden[part], weight.T, out=logits)
        cross_entropy_rows[(len(logits),)](
            logits, targets[part], losses[part], room.stride(0), len(weight), cap or 0.0,
            CAP=cap is not None, GRADIENT=gradient, **tiling(len(weight)),
        )  # fmt: skip
        yield part, logits


def _weight_gradient(hidden, weight, targets, cap, scale):
    """Return sum over rows of scale_i (dl_i/da_i)^T h_i, (V, D) in fp32."""
    total = torch.zeros(weight.shape, device=weight.device)
    losses = torch.empty(len(targets), device=hidden.device)
    for part, gradient in _chunks(hidden, weight, targets, cap, losses, True):
        total += gradient.mul_(scale[part, None]).T @ hidden[part]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cap):
        losses = torch.empty(len(targets), device=hidden.device)
        dhidden = torch.empty_like(hidden)
        train_head, ctx.cap = ctx.needs_input_grad[1], cap
        dweight = torch.zeros(weight.shape, device=weight.device) if train_head else None
        for part, gradient in _chunks(hidden, weight, targets, cap, losses, True):
            torch.mm(gradient, weight, out=dhidden[part])
            if train_head:
                dweight += gradient.T @ hidden[part]
        ctx.save_for_backward(dhidden, dweight, *((hidden, weight, targets) if train_head else ()))
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        dhidden, dweight, *again = ctx.saved_tensors
        if dweight is not None:
            if not (dlosses == dlosses[0]).all():
                dweight = _weight_gradient(*again, ctx.cap, dlosses)
            elif dlosses[0] != 1:  # 1 is a plain sum, the loop's case: no copy then
                dweight = dweight * dlosses[0]
            dweight = dweight.to(again[1].dtype)
        return dhidden * dlosses[:, None].to(dhidden.dtype), dweight, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, softcap: float | None = None
) -> torch.Tensor:
    """Return the loss of each row in nats, (N,) fp32.

    Args:
        hidden: (N, D), the final hidden states at target positions only.
        weight: (V, D), the head, in hidden's dtype.
        targets: (N,) int64 in [0, V), or -100 for a row whose loss is 0.
        softcap: c where the logits are capped to c tanh(logits / c).
    """
    require("hidden", hidden, shape=(None, None))
    require("weight", weight, dtypes=(hidden.dtype,), shape=(None, hidden.shape[1]), device=hidden.device)
    require("targets", targets, dtypes=(torch.int64,), shape=hidden.shape[:1], device=hidden.device, contiguous=True)
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"softcap is {softcap}; it must be above 0, or None for no cap")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, softcap)
    losses = torch.empty(len(targets), device=hidden.device)
    for _ in _chunks(hidden, weight, targets, softcap, losses, False):
        pass
    return losses
