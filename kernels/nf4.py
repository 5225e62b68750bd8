"""NF4 and FP4 (Dettmers et al. 2023, section 3) packed and unpacked, bit for bit as `ops/nf4.py` does it.

    q_i = argmin_j |code_j - w_i / absmax_b|,   w_i ~ round(code[q_i] absmax_b),   b = floor(i / block_size)
    double-quantised:  absmax_b = map[c_b] nested[floor(b / 256)] + offset, two roundings

Element 2i is in the high nibble of byte i, and blocks are flat: one may span two rows. Neither way has a gradient.
The scales are decoded beside the weights: a launch of its own would write and read them once more. What must come out
bit-equal is compiled without fusing multiply and add, which would leave one of the two roundings out.
"""

import torch
import triton
import triton.language as tl

from minitune.codebooks import ascending, codebook, dynamic_map, midpoints
from minitune.errors import ConfigError
from minitune.kernels.checks import FLOATS, require

BLOCK = 4096  # elements of a program
TINY = tl.constexpr(1e-38)  # a block of zeros is divided by this


@triton.jit
def load_absmax(block, inside, absmax, nested, offset, scale_map, NESTED: tl.constexpr):
    """Return fp32 absmax of the blocks, 0 where not inside; `absmax` holds codes into the map if NESTED."""
    if NESTED:
        value = tl.load(scale_map + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        value = value * tl.load(nested + block // 256, mask=inside, other=0.0) + tl.load(offset)
        return tl.where(inside, value, 0.0)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def unpack(pair, table, ROWS: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr):
    """Return the code values of pair (ROWS * BYTES bytes of two codes) as (ROWS, BYTES * 2 / GROUP, GROUP)."""
    codes = tl.reshape(tl.join(pair >> 4, pair & 15), (ROWS * BYTES * 2,)).to(tl.int32)
    return tl.reshape(tl.gather(table, codes, 0), (ROWS, BYTES * 2 // GROUP, GROUP))


@triton.jit
def row_absmax(value):
    """Return the largest magnitude in each row, NaN where there is one: tl.max passes over it."""
    largest = tl.max(tl.abs(value), axis=1)
    bad = tl.sum((value != value).to(tl.int32), axis=1)
    return tl.where(bad > 0, float("nan"), largest)


@triton.jit
def reciprocal(absmax):
    """Return 1 / absmax, that of TINY for a block of zeros; Triton 3.6 takes TINY, which is subnormal, for fp64."""
    return tl.div_rn(1.0, tl.maximum(absmax, TINY).to(tl.float32))


@triton.jit
def nf4_dequantize(
    packed, absmax, nested, offset, scale_map, codes, out, n,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK elements of out (n,)."""
    GROUP: tl.constexpr = min(BLOCK_SIZE, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 2)
    pair = tl.load(packed + start // 2 + byte, mask=byte * 2 < n - start, other=0)
    group = tl.arange(0, BLOCK // GROUP) * GROUP
    scale = load_absmax((start + group) // BLOCK_SIZE, group < n - start, absmax, nested, offset, scale_map, NESTED)
    value = unpack(pair, tl.load(codes + tl.arange(0, 16)), 1, BLOCK // 2, GROUP)
    value = tl.reshape(value * scale[None, :, None], (BLOCK,)).to(out.dtype.element_ty)
    lane = tl.arange(0, BLOCK)
    tl.store(out + start + lane, value, mask=lane < n - start)


@triton.jit
def nf4_quantize(x, middle, order, packed, absmax, n, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Write the bytes and absmax of BLOCKS blocks of x (n,)."""
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    value = tl.load(x + start + place, mask=place < n - start, other=0.0).to(tl.float32)
    largest = row_absmax(value)
    tl.store(absmax + start // BLOCK_SIZE + block, largest, mask=block * BLOCK_SIZE < n - start)
    scaled = value * reciprocal(largest)[:, None]
    rank = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        rank += (scaled > tl.load(middle + i)).to(tl.int32)
    code = tl.load(order + rank)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed + start // 2 + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < n - start)


def _check(kind: str, block_size: int, packed: torch.Tensor, n: int) -> None:
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"kind is '{kind}', but the kernels take nf4 and fp4; use backend reference")
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ConfigError(f"block_size is {block_size}; it must be a power of two from 32 to 4096")
    require("packed", packed, dtypes=(torch.uint8,), shape=((n + 1) // 2,), contiguous=True)


def scale_arguments(weight) -> tuple:
    """Return what `load_absmax` takes of a QuantizedTensor: absmax or its codes, nested, offset, map, NESTED."""
    blocks, device = -(-weight.shape.numel() // weight.block_size), weight.packed.device
    _check(weight.kind, weight.block_size, weight.packed, weight.shape.numel())
    like = {"device": device, "contiguous": True}
    if weight.absmax is not None:
        require("absmax", weight.absmax, dtypes=FLOATS[:1], shape=(blocks,), **like)
        return *(weight.absmax,) * 4, False
    require("absmax_codes", weight.absmax_codes, dtypes=(torch.uint8,), shape=(blocks,), **like)
    require("nested_absmax", weight.nested_absmax, dtypes=FLOATS[:1], shape=(-(-blocks // 256),), **like)
    require("offset", weight.offset, dtypes=FLOATS[:1], shape=(), **like)
    return weight.absmax_codes, weight.nested_absmax, weight.offset, dynamic_map(True, device), True


def dequantize(weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a QuantizedTensor of kind nf4 or fp4 in `dtype` (None: its own), or written to `out` of its shape."""
    packed, (*pointers, nested) = weight.packed, scale_arguments(weight)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=packed.device)
    require("out", out, shape=weight.shape, device=packed.device, contiguous=True)
    nf4_dequantize[(triton.cdiv(out.numel(), BLOCK),)](
        packed, *pointers, codebook(weight.kind, packed.device), out, out.numel(),
        NESTED=nested, BLOCK_SIZE=weight.block_size, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def quantize_4bit(flat: torch.Tensor, block_size: int, kind: str = "nf4") -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes, uint8 (ceil(n / 2),), and absmax, fp32 (ceil(n / block_size),), of flat (n,)."""
    require("flat", flat, shape=(None,), contiguous=True)
    n, device = flat.numel(), flat.device
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    _check(kind, block_size, packed, n)
    absmax = torch.empty(-(-n // block_size), device=device)
    blocks = max(BLOCK // 4 // block_size, 1)
    values, order = ascending(kind, device)
    nf4_quantize[(triton.cdiv(n, blocks * block_size),)](
        flat, midpoints(values), order.int(), packed, absmax, n, BLOCK_SIZE=block_size, BLOCKS=blocks, num_warps=4
    )
    return packed, absmax
