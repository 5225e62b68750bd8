"""SwiGLU (Shazeer 2020, equation 6 without the matmuls):  y = silu(gate) * up.

    s = sigmoid(gate);  dup = dy gate s;  dgate = dy up s (1 + gate (1 - s))
The backward pass recomputes s from gate: it costs one sigmoid and saves a tensor of the widest shape.
"""

import torch
import torch.nn.functional as F


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


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate and up of one shape (..., F)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate).mul_(up)
