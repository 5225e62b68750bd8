"""Gated units (Shazeer 2020, equation 6 without the matmuls):  y = act(gate) up, SiLU in SwiGLU, tanh-GELU in GeGLU.

    dup = dy act(gate);  dgate = dy up act'(gate);  for SiLU, with s = sigmoid(gate), act' = s (1 + gate (1 - s))
The backward pass makes act(gate) again: it costs one sigmoid and saves a tensor of the widest shape.
"""

import torch
import torch.nn.functional as F

from minitune.ops.backend import kernel


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        return dgate, F.gelu(gate, approximate="tanh").mul_(dy)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate and up of one shape (..., F)."""
    if gate.is_cuda and (fused := kernel("swiglu.swiglu", gate, up)):
        return fused(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate).mul_(up)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gelu(gate) * up, GELU in its tanh form, for gate and up of one shape (..., F)."""
    if gate.is_cuda and (fused := kernel("swiglu.geglu", gate, up)):
        return fused(gate, up)
    return _GeGLU.apply(gate, up)
