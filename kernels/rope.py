"""Rotary position embedding (Su et al. 2021, equation 34): each pair (a, b) -> (a cos - b sin, b cos + a sin).

Element i of the first half of a head and element i of the second are one pair. A turn is orthogonal, so the backward
pass is the same kernel with -sin. It reads both halves of a pair before it writes either, so it can turn x in place.

One program turns all heads of one token (some of them, where there are many), so each angle is read once. The result
lies heads first, as attention reads it; its gradient is written tokens first, as the projections' gradient reads it.
Turning dy in place was rejected: autograd hands one dy to all summands of a sum, so another's gradient would turn.
"""

import torch
import triton
import triton.language as tl

from minitune.errors import ConfigError
from minitune.kernels.checks import require

TILE = 4096  # pairs of one program at most


@triton.jit
def rope_turn(
    x, cos, sin, y, x_batch, x_time, x_head, y_batch, y_time, y_head, length, heads,
    HALF: tl.constexpr, SIGN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write HEADS heads of one token of y, the heads of x turned by SIGN times the token's angles."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    time = (tl.program_id(0) % length).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    turned = pair < HALF
    angle = tl.program_id(0).to(tl.int64) * HALF + pair
    c = tl.load(cos + angle, mask=turned, other=0.0)
    s = tl.load(sin + angle, mask=turned, other=0.0) * SIGN
    inside = (head < heads) & turned
    source = x + batch * x_batch + time * x_time + head.to(tl.int64) * x_head + pair
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = y + batch * y_batch + time * y_time + head.to(tl.int64) * y_head + pair
    tl.store(target, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


def tiling(heads: int, width: int) -> dict[str, int]:
    """Return HALF, HEADS, BLOCK and num_warps for H heads of width d."""
    block = triton.next_power_of_2(width // 2)
    count = max(min(triton.next_power_of_2(heads), TILE // block), 1)
    return {"HALF": width // 2, "HEADS": count, "BLOCK": block, "num_warps": min(max(count * block // 512, 1), 8)}


def _turn(x, cos, sin, y, sign):
    """Turn x (B, T, H, d) by +-angle into y, any strides but that of d."""
    batch, length, heads, width = x.shape
    plan = tiling(heads, width)
    rope_turn[(batch * length, triton.cdiv(heads, plan["HEADS"]))](
        x, cos, sin, y, *x.stride()[:3], *y.stride()[:3], length, heads, SIGN=sign, **plan
    )
    return y


def _forward(x, cos, sin, inplace):
    batch, length, heads, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = x if inplace else torch.empty(batch, heads, length, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    return _turn(x, cos, sin, y, 1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, inplace):
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
        return _forward(x, cos, sin, inplace)

    @staticmethod
    def backward(ctx, dy):
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        return _turn(dy, *ctx.saved_tensors, dx, -1), None, None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """Turn the heads of x (B, T, H, d) by cos and sin (B or 1, T, 1, d/2) in fp32.

    Returns a new (B, T, H, d) whose memory is laid out heads first or, with `inplace`, x itself; autograd refuses that
    for a leaf and for a view of a joint projection.
    """
    require("x", x, shape=(None, None, None, None))
    batch, length, _, width = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        shape = (1 if len(table) == 1 else batch, length, 1, width // 2)
        require(name, table, dtypes=(torch.float32,), shape=shape, device=x.device)
    if width % 2 or (inplace and x.stride(3) != 1):
        raise ConfigError(
            f"x has the shape {tuple(x.shape)} and the strides {x.stride()}, but the kernel needs an even last"
            " dimension and, in place, one of stride 1; call .contiguous()"
        )
    cos, sin = (table.expand(batch, -1, -1, -1).contiguous() for table in (cos, sin))
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin, inplace)
    return _forward(x, cos, sin, inplace)
