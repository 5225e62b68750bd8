"""RMSNorm (Zhang & Sennrich 2019, equation 4):  y = w * x / sqrt(mean(x^2) + eps), in fp32.

The backward pass keeps x and one number a row and recomputes the rest:
    n = x r,  r = 1 / sqrt(mean(x^2) + eps),  g = dy w
    dx = r (g - n mean(g n)),   dw = sum over rows of dy n
Autograd over the eager expression was rejected: it keeps three fp32 tensors of the size of x.
"""

import torch

from minitune.ops.precision import widen


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = widen(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        normed = widen(x) * scale
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g = widen(dy) * widen(weight)
            dx = g.addcmul_(normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (widen(dy) * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dw, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension of x (..., D) by its root mean square and scale it by weight (D,)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    wide = widen(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
