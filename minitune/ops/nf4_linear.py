"""A linear map over a 4-bit weight, with an optional low-rank term (Dettmers et al. 2023, equation 5).

    y = x W^T + s u B^T,   W dequantised to x's dtype,   u = drop(x) A^T
    dx = dy W,   du = s dy B,   dB = s dy^T u

u is an input, so that dropout and A's gradient are the caller's. On a GPU the kernels decode W in both passes and keep
nothing of it; here it is dequantised by autograd's rules, which is what they are compared with.
"""

import torch
import torch.nn.functional as F

from minitune.ops.backend import kernel
from minitune.ops.nf4 import QuantizedTensor


def nf4_linear(
    x: torch.Tensor,
    weight: QuantizedTensor,
    u: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Return x W^T + scaling u B^T (..., out) for x (..., in), W (out, in), u (..., R) and B (out, R) in x's dtype."""
    if run := kernel("nf4_matmul.nf4_linear", x):
        return run(x, weight, u, B, scaling)
    y = F.linear(x, weight.dequantize(x.dtype))
    return y if u is None else y + scaling * F.linear(u, B)
