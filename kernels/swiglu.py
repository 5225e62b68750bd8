"""Gated units (Shazeer 2020, equation 6 without the matmuls):  y = act(gate) up, act SiLU (SwiGLU) or GELU (GeGLU).

GELU is its tanh form (Hendrycks & Gimpel 2016): as (1 + tanh u) / 2 = sigmoid(2u), both are  act(z) = z sigmoid(a(z)),
    SiLU  a(z) = z,                              a'(z) = 1
    GELU  a(z) = 2 sqrt(2/pi) (z + 0.044715 z^3),  a'(z) = 2 sqrt(2/pi) (1 + 3 0.044715 z^2)
Backward, with s = sigmoid(a(gate)) made again:
    dup = dy gate s,   dgate = dy up (s + gate s (1 - s) a'(gate))

One program has BLOCK elements of one row; where all tensors are contiguous they count as one row. Writing dgate over
gate was rejected: whoever else holds gate would read a gradient.
"""

import torch
import triton
import triton.language as tl

from minitune.kernels.checks import as_rows, require

BLOCK = 2048  # elements of a program, 16 for each of its 128 threads
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(gate, GELU: tl.constexpr):
    """Return sigmoid(a(gate)) and gate a'(gate)."""
    if GELU:
        cubic = gate * gate * CUBIC
        return tl.sigmoid(gate * (1.0 + cubic) * SLOPE), gate * (1.0 + 3.0 * cubic) * SLOPE
    else:
        return tl.sigmoid(gate), gate


@triton.jit
def _place(width, blocks, BLOCK: tl.constexpr):
    """Return the row of this program, its first column, and which of its lanes are inside the row."""
    program = tl.program_id(0)
    start = (program % blocks).to(tl.int64) * BLOCK
    return (program // blocks).to(tl.int64), start, tl.arange(0, BLOCK) < width - start


@triton.jit
def glu_forward(gate, up, y, gate_stride, up_stride, width, blocks, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK elements of y (rows, width)."""
    row, start, inside = _place(width, blocks, BLOCK)
    lane = tl.arange(0, BLOCK)
    z = tl.load(gate + row * gate_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    s, _ = _sigmoid(z, GELU)
    tl.store(y + row * width + start + lane, (z * s * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward(
    dy, gate, up, dgate, dup, dy_stride, gate_stride, up_stride, width, blocks,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK elements of dgate and dup (rows, width)."""
    row, start, inside = _place(width, blocks, BLOCK)
    lane = tl.arange(0, BLOCK)
    g = tl.load(dy + row * dy_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    s, slope = _sigmoid(z, GELU)
    tl.store(dup + row * width + start + lane, (g * z * s).to(dup.dtype.element_ty), mask=inside)
    dz = g * u * s * (1.0 + (1.0 - s) * slope)
    tl.store(dgate + row * width + start + lane, dz.to(dgate.dtype.element_ty), mask=inside)


def _launch(kernel, inputs, outputs, gelu: bool) -> None:
    """Launch over inputs (..., F) and contiguous outputs of that shape."""
    if all(x.is_contiguous() for x in inputs):
        rows = [x.view(1, -1) for x in inputs]
    else:
        rows = [as_rows(x) for x in inputs]
    count, width = rows[0].shape
    blocks = triton.cdiv(width, BLOCK)
    strides = [x.stride(0) for x in rows]
    kernel[(count * blocks,)](*rows, *outputs, *strides, width, blocks, GELU=gelu, BLOCK=BLOCK, num_warps=4)


def _forward(gate, up, gelu):
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(glu_forward, (gate, up), (y,), gelu)
    return y


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gelu):
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _forward(gate, up, gelu)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _launch(glu_backward, (dy, gate, up), (dgate, dup), ctx.gelu)
        return dgate, dup, None


def _glu(gate, up, gelu):
    require("gate", gate, shape=(..., None))
    require("up", up, dtypes=(gate.dtype,), shape=gate.shape, device=gate.device)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GLU.apply(gate, up, gelu)
    return _forward(gate, up, gelu)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate and up of one shape (..., F)."""
    return _glu(gate, up, False)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gelu(gate) * up, GELU in its tanh form, for gate and up of one shape (..., F)."""
    return _glu(gate, up, True)
