"""RMSNorm (Zhang & Sennrich 2019, equation 4):  y = (o + w) x / sqrt(mean(x^2) + eps), in fp32; o is 0, or Gemma's 1.

The backward pass keeps x and one number a row and recomputes the rest:
    n = x r,  r = 1 / sqrt(mean(x^2) + eps),  g = dy (o + w)
    dx = r (g - n mean(g n)),   dw = sum over rows of dy n
Without offset n is rounded to x's dtype and then multiplied by w, as Llama's code does; with one, y is rounded once.
Autograd over the eager expression was rejected: it keeps three fp32 tensors of the size of x.
"""

import torch

from minitune.ops.backend import kernel
from minitune.ops.precision import widen

MAX_KERNEL_WIDTH = 16384  # the kernel holds a row in registers


def _scaled(normed, weight, offset, dtype):
    """Return (offset + weight) n in fp32's rounding or, without offset, weight n in that of x's dtype."""
    return (normed * (widen(weight) + offset)).to(dtype) if offset else weight * normed.to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        wide = widen(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return _scaled(wide * scale, weight, offset, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        normed = widen(x) * scale
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g = widen(dy) * (widen(weight) + ctx.offset if ctx.offset else widen(weight))
            dx = g.addcmul_(normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (widen(dy) * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dw, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Normalise the last dimension of x (..., D) by its root mean square and scale it by offset + weight (D,)."""
    if x.is_cuda and x.shape[-1] <= MAX_KERNEL_WIDTH and (fused := kernel("norm.rms_norm", x, weight)):
        return fused(x, weight, eps, offset)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, offset)
    wide = widen(x)
    return _scaled(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), weight, offset, x.dtype)
