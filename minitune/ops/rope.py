"""Rotary position embedding (Su et al. 2021, equation 34), in the half-split layout of Llama checkpoints.

Element i of the first half of a head and element i of the second half are one pair, turned by the angle
position / theta^(2i/d):   (a, b) -> (a cos - b sin, b cos + a sin).
A turn is orthogonal, so the gradient is turned back by the same angle: the backward pass is the forward
pass with -sin, and nothing but the tables is kept.
"""

import torch

from minitune.ops.backend import kernel
from minitune.ops.precision import widen


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each (B, T, 1, d/2) in fp32, for positions (B, T); frequencies are fp64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None].double() / theta**exponents  # (B, T, d/2)
    return angles.cos().float().unsqueeze(2), angles.sin().float().unsqueeze(2)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Turn x (B, T, H, d) by +-angle; products are fp32, rounded once. The result lies as (B, H, T, d) in memory."""
    batch, length, heads, width = x.shape
    first, second = widen(x).split(width // 2, dim=-1)
    out = torch.empty(batch, heads, length, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    out[..., : width // 2] = (first * cos).addcmul_(second, sin, value=-sign)
    out[..., width // 2 :] = (second * cos).addcmul_(first, sin, value=sign)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        return _turn(dy, *ctx.saved_tensors, -1), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads of x (B, T, H, d) by the tables of `rope_tables`; returns a new (B, T, H, d).

    The result's memory is laid out heads first, as attention reads it.
    """
    if x.is_cuda and (turn := kernel("rope.apply_rope", x, cos, sin)):
        return turn(x, cos, sin)
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _turn(x, cos, sin, 1)
