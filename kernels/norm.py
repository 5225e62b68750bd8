"""RMSNorm (Zhang & Sennrich 2019, equation 4):  y = w x / sqrt(mean(x^2) + eps), or (o + w) in place of w.

Backward, from what the forward pass keeps, x and r = 1 / sqrt(mean(x^2) + eps), one number a row:
    n = x r,  g = dy (o + w)
    dn_j / dx_i = r ([i = j] - n_i n_j / D), hence  dx = r (g - n mean(g n)),   dw = sum over rows of dy n

A tile of whole rows lies in registers: x is read once, y written once, and a program has one row of 4,096 or many
narrow ones. Where w is trained, a fixed number of programs walk over the tiles, each with its own sum of dy n in
registers, and (programs, D) sums are added at the end; adding atomically into dw was rejected, since its last bits
would change from run to run. A walking program asks for its next tile before it works on the one it has.

Without offset y is w times n rounded to x's dtype, as Llama's code has it; with one, as Gemma's has it, rounded once.
"""

import functools

import torch
import triton
import triton.language as tl

from minitune.errors import ConfigError
from minitune.kernels.checks import as_rows, require

MAX_WIDTH = 16384  # a wider row would not fit in the registers of one program,
MAX_SUMMED_WIDTH = 8192  # nor would a wider one with its sum of dy n
TILE = 4096  # elements that a program has at least, rows permitting


@triton.jit
def _load(pointer, row, stride, rows, column, width):
    """Load rows (ROWS,) of columns (BLOCK,); zero outside."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, row, rows, column, width):
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(pointer + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def rms_norm_forward(
    x, weight, y, scale, x_stride, rows, width, eps,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y (rows, width) and r (rows,) of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    narrow = _load(x, row, x_stride, rows, column, width)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    wide = narrow.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normed = wide * r[:, None]
    if OFFSET == 0.0:
        normed = normed.to(narrow.dtype).to(tl.float32)
    else:
        w += OFFSET
    _store(y, (normed * w[None, :]).to(y.dtype.element_ty), row, rows, column, width)
    tl.store(scale + row, r, mask=row < rows)


@triton.jit
def rms_norm_backward(
    dy, x, weight, scale, dx, sums, dy_stride, x_stride, rows, width,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write dx (rows, width) of a tile of ROWS rows or, if SUM, of every num_programs-th, and the sum of its dy n."""
    column = tl.arange(0, BLOCK)
    lane = tl.arange(0, ROWS)
    w = tl.load(weight + column, mask=column < width, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    first = tl.program_id(0) * ROWS
    next_x = _load(x, first + lane, x_stride, rows, column, width)
    next_dy = _load(dy, first + lane, dy_stride, rows, column, width)
    next_r = tl.load(scale + first + lane, mask=first + lane < rows, other=0.0)
    for start in range(first, rows, step):
        row = start + lane
        upstream, normed = next_dy.to(tl.float32), next_x.to(tl.float32) * next_r[:, None]
        r = next_r[:, None]
        if SUM:
            w = tl.load(weight + column, mask=column < width, other=0.0)  # again: registers are short, L1 is near
            next_x = _load(x, row + step, x_stride, rows, column, width)
            next_dy = _load(dy, row + step, dy_stride, rows, column, width)
            next_r = tl.load(scale + row + step, mask=row + step < rows, other=0.0)
        g = upstream * (w.to(tl.float32) + OFFSET)[None, :]
        mean = tl.sum(g * normed, axis=1) / width
        _store(dx, (r * (g - normed * mean[:, None])).to(dx.dtype.element_ty), row, rows, column, width)
        if SUM:
            total += upstream * normed
    if SUM:
        tl.store(sums + tl.program_id(0) * width + column, tl.sum(total, axis=0), mask=column < width)


def tiling(width: int, elements: int) -> dict[str, int]:
    """Return ROWS, BLOCK and num_warps for rows of `width`, with `elements` for each thread."""
    block = max(triton.next_power_of_2(width), 16)
    rows = max(TILE // block, 1)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // (32 * elements), 4), 16)}


@functools.cache
def _walkers(device: torch.device) -> int:
    """Return how many programs share the rows where w is trained: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _forward(x, weight, eps, offset):
    rows = as_rows(x)
    count, width = rows.shape
    dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
    y, scale = torch.empty(x.shape, dtype=dtype, device=x.device), torch.empty(count, device=x.device)
    plan = tiling(width, 64 // x.element_size())
    grid = (triton.cdiv(count, plan["ROWS"]),)
    rms_norm_forward[grid](rows, weight, y, scale, rows.stride(0), count, width, eps, OFFSET=offset, **plan)
    return y, scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        y, scale = _forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        rows, upstream = as_rows(x), as_rows(dy)
        count, width = rows.shape
        plan, train = tiling(width, 16), ctx.needs_input_grad[1]
        summed = train and width <= MAX_SUMMED_WIDTH
        tiles = triton.cdiv(count, plan["ROWS"])
        programs = min(tiles, _walkers(x.device)) if summed else tiles
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty(programs if summed else 0, width, device=x.device)
        rms_norm_backward[(programs,)](
            upstream, rows, weight, scale, dx, sums, upstream.stride(0), rows.stride(0), count, width,
            OFFSET=ctx.offset, SUM=summed, **plan,
        )  # fmt: skip
        if train and not summed:
            sums = upstream.float() * rows.float() * scale[:, None]
        return dx, sums.sum(0).to(weight.dtype) if train else None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Normalise the last dimension of x (..., D) by its root mean square and scale it by offset + weight (D,)."""
    require("x", x, shape=(..., None))
    require("weight", weight, shape=x.shape[-1:], device=x.device, contiguous=True)
    if x.shape[-1] > MAX_WIDTH:
        raise ConfigError(
            f"x has rows of {x.shape[-1]}, but the kernel takes at most {MAX_WIDTH}; use backend reference"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, offset)
    return _forward(x, weight, eps, offset)[0]
