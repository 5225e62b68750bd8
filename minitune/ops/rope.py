"""Rotary position embedding (Su et al. 2021, equation 34), in the half-split layout of Llama checkpoints.

Element i of the first half of a head and element i of the second half are one pair, turned by the angle
position / theta^(2i/d). A turn is orthogonal, so the gradient is turned back by the same angle: the
backward pass is the forward pass with -sin, and nothing but the tables is kept.
"""

import torch


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each (B, T, 1, d/2) in fp32, for positions (B, T); frequencies are fp64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None].double() / theta**exponents  # (B, T, d/2)
    return angles.cos().float().unsqueeze(2), angles.sin().float().unsqueeze(2)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (B, T, H, d); the product is fp32 and rounded once to x's dtype."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads of x (B, T, H, d) by the tables of `rope_tables`; returns a new (B, T, H, d)."""
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _turn(x, cos, sin)
