"""Rotary position embedding (Su et al. 2021, equation 34), in the half-split layout of Llama checkpoints.

Element i of the first half of a head and element i of the second half are one pair, turned by the angle
position / theta^(2i/d):   (a, b) -> (a cos - b sin, b cos + a sin).
The gradient is turned back by the same angle: the backward pass is the forward pass with -sin, and nothing but the
tables is kept. (A factor on both tables is carried along: the transpose of s R is s R^T.)
"""

import torch

from minitune.ops.backend import kernel
from minitune.ops.precision import widen


def inverse_frequencies(width: int, theta: float, device: torch.device | str | None = None) -> torch.Tensor:
    """Return theta^(-2i/r) for the r/2 pairs of `width` r elements, fp64: radians a position."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def angle_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale cos and scale sin of position x frequency, each (B, T, 1, r/2) in fp32.

    Args:
        positions: (B, T).
        frequencies: (r/2,), or (B, T, r/2) where tokens have their own; fp64, since an angle is many turns.
        scale: of YaRN and LongRoPE, which sharpen attention with it.
    """
    angles = positions[..., None].double() * frequencies  # (B, T, r/2)
    return (angles.cos() * scale).float().unsqueeze(2), (angles.sin() * scale).float().unsqueeze(2)


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables of the plain rotary embedding, each (B, T, 1, d/2), for positions (B, T)."""
    return angle_tables(positions, inverse_frequencies(head_dim, theta, positions.device))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Turn x (B, T, H, d) by +-angle; products are fp32, rounded once."""
    first, second = (wide := widen(x)).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        return _turn(dy, *ctx.saved_tensors, -1), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first r elements of the heads of x (B, T, H, d) by tables (B, T, 1, r/2); returns a new (B, T, H, d)."""
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:  # partial rotary embedding: the rest of the head carries no position
        return torch.cat((apply_rope(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    if x.is_cuda and (turn := kernel("rope.apply_rope", x, cos, sin)):
        return turn(x, cos, sin)
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _turn(x, cos, sin, 1)
