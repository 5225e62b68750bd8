"""Linear maps over NF4 or FP4 weights W (out, in), with an optional low-rank term (Dettmers et al. 2023, equation 5).

    y = x W^T + s u B^T,   W = round(code absmax) in x's dtype, u (M, R) the input times A^T, s the adapter's scaling
    dx = dy W,   du = s dy B,   dB = s dy^T u          (W is frozen; A's gradient and its part of dx flow through u)

Neither pass keeps W: backward decodes it again, at half a byte an element. Three ways, chosen by `plan`:
matvec    one row, as in decoding. Reading W is all the time there is: at 70% of an H200's copy bandwidth its 132 x 128
          lanes issue about five instructions a value. The loop has 5.5 (sm_90, BN 16, counted in the machine code):
          a thread takes 32-bit words of eight values, each a shift, a mask, a lookup in 16 words of shared memory
          (in 16 banks, so without conflicts) and a multiply-add; the scale is multiplied in once a block. A table
          of 256 pairs was rejected for its bank conflicts, one in global memory for its 64-bit addresses.
tiles     few rows. Tiles of W are decoded in registers and multiplied on the tensor cores, each once per block of
          rows. W is the left factor, so that its out dimension fills the wide side of the instruction. Where W is
          too small to fill the GPU, programs share the contraction and their fp32 sums are added after.
dequantize  many rows, rows that are not whole blocks, or fp32, which has no tensor cores to keep busy: decode W once,
          then cuBLAS. Decoding moves 2.5 bytes an element once, cuBLAS does 2 M operations on it: at M = 2048
          decoding is about an eighth of its time (arithmetic for an H100, not measured).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minitune.codebooks import codebook
from minitune.errors import ConfigError
from minitune.kernels import nf4
from minitune.kernels.checks import as_rows, require
from minitune.kernels.nf4 import load_absmax, scale_arguments, unpack


@triton.jit
def nf4_matvec(
    x, packed, absmax, nested, offset, scale_map, codes, u, b, y, n, row_words, rank, scaling,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write BN elements of y (n,); a row of W has row_words words of eight values."""
    GROUP: tl.constexpr = min(BLOCK_SIZE // 8, WORDS)  # words under one scale
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    word, group = tl.arange(0, WORDS), tl.arange(0, WORDS // GROUP) * GROUP
    first = row.to(tl.int64) * row_words
    address = packed.to(tl.pointer_type(tl.uint32)) + first[:, None] + word[None, :]
    table = tl.load(codes + tl.arange(0, 16))
    total = tl.zeros((BN, WORDS // GROUP), tl.float32)
    for start in range(0, row_words, WORDS):
        left = row_words - start
        eight = tl.load(address + start, mask=(row < n)[:, None] & (word < left)[None, :], other=0)
        lane = tl.arange(0, WORDS * 8)
        part = tl.load(x + start * 8 + lane, mask=lane < left * 8, other=0.0)
        even, odd = tl.split(tl.reshape(part, (WORDS, 2, 2, 2)))
        products = tl.zeros((BN, WORDS), tl.float32)
        for j in tl.static_range(8):  # the high nibble comes first: elements 0, 1 are bits 4-7, 0-3
            code = tl.reshape(((eight >> (4 * (j ^ 1))) & 15).to(tl.int32), (BN * WORDS,))
            value = tl.reshape(tl.gather(table, code, 0), (BN, WORDS))
            pair = tl.split(tl.split(odd if j & 1 else even)[(j >> 1) & 1])  # by the second bit of j, then by the third
            products += value * pair[j >> 2].to(tl.float32)[None, :]
        block = (first[:, None] + start + group[None, :]) * 8 // BLOCK_SIZE
        inside = (row < n)[:, None] & (group < left)[None, :]
        scale = load_absmax(block, inside, absmax, nested, offset, scale_map, NESTED)
        total += tl.sum(tl.reshape(products, (BN, WORDS // GROUP, GROUP)), axis=2) * scale
    result = tl.sum(total, axis=1)
    if BR:
        r = tl.arange(0, BR)
        low = tl.load(u + r, mask=r < rank, other=0.0).to(tl.float32)
        place = row.to(tl.int64)[:, None] * rank + r[None, :]
        factor = tl.load(b + place, mask=(row < n)[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        result += scaling * tl.sum(factor * low[None, :], axis=1)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < n)


@triton.jit
def _load_tile(matrix, row, rows, stride, column, columns):
    """Load (rows, columns) of a matrix with adjacent columns; zero outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _decode_tile(
    packed, absmax, nested, offset, scale_map, table, row, n, start, row_bytes,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return fp32 W[row (BN,), start : start + BK]; zero outside, since absmax is."""
    GROUP: tl.constexpr = min(BLOCK_SIZE, BK)
    byte = start // 2 + tl.arange(0, BK // 2)
    pair = _load_tile(packed, row, n, row_bytes, byte, row_bytes)
    column = start + tl.arange(0, BK // GROUP) * GROUP
    block = (row.to(tl.int64)[:, None] * (row_bytes * 2) + column[None, :]) // BLOCK_SIZE
    inside = (row < n)[:, None] & (column < row_bytes * 2)[None, :]
    scale = load_absmax(block, inside, absmax, nested, offset, scale_map, NESTED)
    return tl.reshape(unpack(pair, table, BN, BK // 2, GROUP) * scale[:, :, None], (BN, BK))


@triton.jit
def nf4_matmul(
    x, packed, absmax, nested, offset, scale_map, codes, u, b, y, m, n, row_bytes, x_stride, span, rank, scaling,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Write y (m, n) of BM rows of x and BN of W; program_id(2) has `span` elements of the contraction."""
    row, column = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * span
    table = tl.load(codes + tl.arange(0, 16))
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(first, tl.minimum(first + span, row_bytes * 2), BK):
        weight = _decode_tile(
            packed, absmax, nested, offset, scale_map, table, row, n, start, row_bytes, NESTED, BLOCK_SIZE, BN, BK
        )
        tile = _load_tile(x, column, m, x_stride, start + tl.arange(0, BK), row_bytes * 2)
        total = tl.dot(weight.to(tile.dtype), tl.trans(tile), total, input_precision="ieee")
    if BR:
        if tl.program_id(2) == 0:
            r = tl.arange(0, BR)
            low, factor = _load_tile(u, column, m, rank, r, rank), _load_tile(b, row, n, rank, r, rank)
            total += scaling * tl.dot(factor, tl.trans(low), input_precision="ieee")
    y += tl.program_id(2).to(tl.int64) * m * n
    place = column.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(column < m)[None, :] & (row < n)[:, None])


@triton.jit
def nf4_matmul_backward(
    dy, packed, absmax, nested, offset, scale_map, codes, dx, m, n, row_bytes, dy_stride, span,
    NESTED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write dx (m, row_bytes * 2) of BM rows of dy and BK columns of W; program_id(2) has `span` rows of W."""
    start, row = tl.program_id(0) * BK, tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * span
    table = tl.load(codes + tl.arange(0, 16))
    total = tl.zeros((BM, BK), tl.float32)
    for above in range(first, tl.minimum(first + span, n), BN):
        inner = above + tl.arange(0, BN)
        weight = _decode_tile(
            packed, absmax, nested, offset, scale_map, table, inner, n, start, row_bytes, NESTED, BLOCK_SIZE, BN, BK
        )
        tile = _load_tile(dy, row, m, dy_stride, inner, n)
        total = tl.dot(tile, weight.to(tile.dtype), total, input_precision="ieee")
    column = start + tl.arange(0, BK)
    dx += tl.program_id(2).to(tl.int64) * m * row_bytes * 2
    place = row.to(tl.int64)[:, None] * (row_bytes * 2) + column[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=(row < m)[:, None] & (column < row_bytes * 2)[None, :])


class Plan(NamedTuple):
    """How one product is computed; the sizes are those of a program's tiles of x's rows, out and in."""

    way: str
    """matvec, tiles or dequantize."""
    BM: int = 1
    BN: int = 16
    BK: int = 1024
    span: int = 0
    """Elements of the contraction for one program; less than all of them where programs share it."""


PROGRAMS = 264  # two for each multiprocessor of an H100


def plan(m: int, n: int, k: int, block_size: int = 64, dtype=torch.bfloat16, backward: bool = False) -> Plan:
    """Choose the way for x (m, k), or dy (m, n) if backward, and W (n, k). Not measured: from the arithmetic above.

    Up to 64 rows the tensor cores have time for each decoded tile that is used once or twice; above, cuBLAS reads what
    was decoded once. BN is 8 where 16 would leave half of the multiprocessors idle.
    """
    if m == 1 and not k % block_size and not backward:
        return Plan("matvec", BN=16 if n >= 16 * PROGRAMS else 8)
    if k % block_size or not 0 < m <= 64 or dtype == torch.float32:
        return Plan("dequantize")
    bm, bn, bk = (16, 64, 128) if m <= 16 else (64, 64, 64)
    outside, inside, step = (k, n, bn) if backward else (n, k, bk)
    programs = triton.cdiv(outside, bk if backward else bn)
    shares = max(min(PROGRAMS // programs, inside // (4 * step)), 1)
    return Plan("tiles", bm, bn, bk, triton.cdiv(triton.cdiv(inside, shares), step) * step)


def _arguments(weight):
    *pointers, nested = scale_arguments(weight)
    pointers = (weight.packed, *pointers, codebook(weight.kind, weight.packed.device))
    return pointers, {"NESTED": nested, "BLOCK_SIZE": weight.block_size}


def _shared(shape, span, inside, like):
    """Return room for the result, one fp32 part for each share of the contraction, and the number of shares."""
    shares = triton.cdiv(inside, span)
    if shares > 1:
        return torch.empty((shares, *shape), device=like.device), shares
    return torch.empty(shape, dtype=like.dtype, device=like.device), 1


def _forward(x, weight, u, b, scaling):
    """Return y (M, N) of x (M, K)."""
    (m, k), n = x.shape, weight.shape[0]
    way, bm, bn, bk, span = plan(m, n, k, weight.block_size, x.dtype)
    if way == "dequantize":
        y = x @ nf4.dequantize(weight, x.dtype).T
        return y if u is None else y.addmm_(u, b.T, alpha=scaling)
    pointers, options = _arguments(weight)
    rank = 0 if u is None else u.shape[1]
    low = (x, x) if u is None else (u, b)
    if way == "matvec":
        if weight.packed.data_ptr() % 4:
            raise ConfigError("packed does not begin at a multiple of 4 bytes, as the kernel needs; call .clone()")
        y = torch.empty((1, n), dtype=x.dtype, device=x.device)
        nf4_matvec[(triton.cdiv(n, bn),)](
            x.contiguous(), *pointers, *low, y, n, k // 8, rank, scaling,
            BN=bn, WORDS=bk // 8, BR=triton.next_power_of_2(rank) if rank else 0, num_warps=4, **options,
        )  # fmt: skip
        return y
    y, shares = _shared((m, n), span, k, x)
    nf4_matmul[(triton.cdiv(n, bn), triton.cdiv(m, bm), shares)](
        x, *pointers, *low, y, m, n, k // 2, x.stride(0), span, rank, scaling, BM=bm, BN=bn, BK=bk,
        BR=max(triton.next_power_of_2(rank), 16) if rank else 0, num_warps=4, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return y if shares == 1 else y.sum(0).to(x.dtype)


def _input_gradient(dy, weight):
    """Return dx (M, K) of dy (M, N)."""
    (m, n), k = dy.shape, weight.shape[1]
    way, bm, bn, bk, span = plan(m, n, k, weight.block_size, dy.dtype, backward=True)
    if way == "dequantize":
        return dy @ nf4.dequantize(weight, dy.dtype)
    pointers, options = _arguments(weight)
    dx, shares = _shared((m, k), span, n, dy)
    nf4_matmul_backward[(triton.cdiv(k, bk), triton.cdiv(m, bm), shares)](
        dy, *pointers, dx, m, n, k // 2, dy.stride(0), span,
        BM=bm, BN=bn, BK=bk, num_warps=4, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return dx if shares == 1 else dx.sum(0).to(dy.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, b, weight, scaling):
        ctx.save_for_backward(u, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        low = None if u is None else as_rows(u).contiguous()
        return _forward(as_rows(x), weight, low, b, scaling).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        u, b = ctx.saved_tensors
        rows, (need_x, need_u, need_b) = as_rows(dy), ctx.needs_input_grad[:3]
        dx = _input_gradient(rows, ctx.weight).view(ctx.shape) if need_x else None
        du = (rows @ b).mul_(ctx.scaling).view(u.shape) if need_u else None
        db = (rows.T @ as_rows(u)).mul_(ctx.scaling) if need_b else None
        return dx, du, db, None, None


def nf4_linear(
    x: torch.Tensor,
    weight,
    u: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Return x W^T + scaling u B^T, differentiable in x, u and B.

    Args:
        x: (..., in), fp32, fp16 or bf16; any strides.
        weight: a QuantizedTensor of kind nf4 or fp4 and shape (out, in).
        u: (..., R), the adapter's input after A, in x's dtype; with B or not at all.
        B: (out, R), in x's dtype.
        scaling: the adapter's s.

    Raises:
        ConfigError: a dtype, shape, device or stride that the kernels don't take.
    """
    if len(weight.shape) != 2:
        raise ConfigError(f"weight has the shape {tuple(weight.shape)}, but a linear map needs (out, in)")
    require("x", x, shape=(..., weight.shape[1]))
    require("packed", weight.packed, dtypes=(torch.uint8,), device=x.device)
    if (u is None) != (B is None):
        raise ConfigError("u and B must be given together; the low-rank term needs both")
    if u is not None:
        require("B", B, dtypes=(x.dtype,), shape=(weight.shape[0], None), device=x.device, contiguous=True)
        require("u", u, dtypes=(x.dtype,), shape=(*x.shape[:-1], B.shape[1]), device=x.device)
    return _Linear.apply(x, u, B, weight, scaling)
