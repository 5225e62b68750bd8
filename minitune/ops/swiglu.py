"""Gated units (Shazeer 2020, equation 6 without the matmuls):  y = act(gate) up, SiLU in SwiGLU, tanh-GELU in GeGLU.

    dup = dy act(gate);  dgate = dy up act'(gate);  for SiLU, with s = sigmoid(gate), act' = s (1 + gate (1 - s))
The backward pass makes act(gate) again: it costs one sigmoid and saves a tensor of the widest shape.
"""

import torch
import torch.nn.functional as F

from minitune.ops.backend import kernel


def _activated(gate, gelu: bool):
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gelu):
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activated(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        if ctx.gelu:
            dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        else:
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, _activated(gate, ctx.gelu).mul_(dy), None


def _glu(gate, up, gelu: bool):
    if gate.is_cuda and (fused := kernel("swiglu.geglu" if gelu else "swiglu.swiglu", gate, up)):
        return fused(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GLU.apply(gate, up, gelu)
    return _activated(gate, gelu).mul_(up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate and up of one shape (..., F)."""
    return _glu(gate, up, gelu=False)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gelu(gate) * up, GELU in its tanh form, for gate and up of one shape (..., F)."""
    return _glu(gate, up, gelu=True)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x times the normal distribution function of x (Hendrycks & Gimpel 2016)."""
    return F.gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


GATED_UNITS = {"silu": swiglu, "gelu_tanh": geglu}
ACTIVATIONS = {"silu": F.silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
