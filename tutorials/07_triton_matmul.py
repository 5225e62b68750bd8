# %% [markdown]
"""# 7. A matmul kernel, from the first line to NF4

A GPU computes much faster than it reads its memory. So a kernel is mostly about traffic: which number is read how
often. We write the linear map `y = x W^T` five times in Triton (Tillet et al. 2019). The first kernel reads
everything far too often. The last reads its weights in 4 bits and decodes them on the way. Each is run on awkward
sizes and checked against 64-bit arithmetic, and we count what it reads.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/07_triton_matmul.py

Without a GPU the kernels run in Triton's interpreter. It executes the same source with numpy, one program after the
other. That is slow, and says nothing about speed: no time is measured here. It shows whether a kernel is right, but
for one kind of mistake: programs that get in each other's way do so only where they run at once.

The letters: M rows of x, N rows of W, K the length of the sums. x has shape (M, K), W (N, K), y (M, N).
"""

# %%
import importlib.util
import os
import sys

import torch

if importlib.util.find_spec("triton") is None:
    sys.exit("this tutorial needs Triton, which there is for Linux: pip install triton")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before triton is imported
import triton
import triton.language as tl

from minitune.kernels import nf4, nf4_matmul
from minitune.ops.nf4 import codebook, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
print(f"Triton {triton.__version__}, " + ("on a GPU" if DEVICE == "cuda" else "interpreted, on the CPU"))
M, N, K = 18, 27, 70  # none of them a multiple of anything useful


def draw(*shape, seed, dtype=torch.float32):
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def check(name, found, exact, reference):
    """Assert that a kernel is as close to the exact result as torch is: at most twice as far, plus an ulp or two."""
    error, allowed = ((value.double() - exact).abs().max().item() for value in (found, reference))
    floor = 2 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    print(f"  {name}: largest error {error:.1e}, that of torch's own {reference.dtype} matmul {allowed:.1e}")
    assert error <= 2 * allowed + floor, f"{name}: {error:.1e}"


x, W = draw(M, K, seed=0), draw(N, K, seed=1)
exact = x.double() @ W.double().T  # (M, N)

# %% [markdown]
"""## 1. One program, one output

A kernel is a function that runs many times at once. Each run is a program, and knows its number. A program is
handed addresses. It makes a whole block of addresses by adding an `arange`, loads there, computes with blocks, and
stores.

The simplest matmul gives each of the M x N outputs a program of its own. It reads a row of x and a row of W,
multiplies them and adds up. Block sizes have to be powers of two, and 70 is none. So the row is read in blocks of
32: 32, 32 and then 6 of 32. What lies beyond the end is masked: it is not read, and counts as 0.

We load through a small function that also counts, so that we know afterwards how many numbers were really read.
"""

# %%
print("== 1. One program, one output")


@triton.jit
def load(address, inside, counter):
    """Load where inside, 0 elsewhere; add to the counter how many numbers that were."""
    tl.atomic_add(counter, tl.sum(inside.to(tl.int32)))
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def naive(x, w, y, n, k, counter, BLOCK: tl.constexpr):
    """Write y[row, column], one number."""
    row, column = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        place = start + tl.arange(0, BLOCK)  # (BLOCK,)
        left = load(x + row * k + place, place < k, counter)
        right = load(w + column * k + place, place < k, counter)
        total += left * right
    tl.store(y + row * n + column, tl.sum(total))


y, counter = torch.empty(M, N, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
naive[(M, N)](x, W, y, N, K, counter, BLOCK=32)
check("naive", y, exact, x @ W.T)
once, reads = M * K + N * K, counter.item()
print(f"  x and W have {once:,} numbers; {M * N:,} programs read {reads:,}, each number {reads / once:.1f} times")
assert reads == M * N * 2 * K and (M, N, K) == (18, 27, 70) and 70 - 32 - 32 == 6

# %% [markdown]
"""Each output reads 2 K numbers, so all of them read 2 M N K. At M = N = K = 4,096 in 16 bits that would be 275 GB,
where x and W have 67 MB. And there is one multiplication and one addition for every two numbers read. A GPU that
can do hundreds of operations in the time that one number takes to arrive would do nothing but wait.
"""

# %%
assert round(2 * 2 * 4_096**3 / 1e9) == 275 and 16 / 8 == 2 and round(2 * 2 * 4_096**2 / 1e6) == 67

# %% [markdown]
"""## 2. What a missing mask does

Memory has no walls. Behind the last row of W lies something else, and behind every other row the next row. A kernel
without a mask reads it, without complaint, and multiplies. Often the result is nearly right, which is worse than
wrong. If what lies behind happens to be 0, it is even right, until one day it isn't.

So we put a canary there. We place x and W into larger buffers full of NaN. A NaN makes everything NaN that it
touches. A kernel that reads one number too many then shows it. For what is written there is a canary too: a margin
of 777 around y, which must still be there afterwards.
"""

# %%
print("== 2. What a missing mask does")


def framed(tensor, filling, margin=64):
    """Return a copy of a tensor that has `margin` elements of filling before and after it, and the whole buffer."""
    buffer = torch.full((tensor.numel() + 2 * margin,), filling, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[margin:-margin].view(tensor.shape)
    return inner.copy_(tensor), buffer


@triton.jit
def unmasked(x, w, y, n, k, BLOCK: tl.constexpr):
    """The same as `naive`, without masks: wrong wherever k is no multiple of BLOCK."""
    row, column = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * k + place) * tl.load(w + column * k + place)
    tl.store(y + row * n + column, tl.sum(total))


framed_x, _ = framed(x, float("nan"))
framed_W, _ = framed(W, float("nan"))
framed_y, around = framed(torch.zeros(M, N, device=DEVICE), 777.0)
unmasked[(M, N)](framed_x, framed_W, framed_y, N, K, BLOCK=32)
poisoned = framed_y.isnan()
worst = (framed_y.double() - exact)[~poisoned].abs().max().item()
print(f"  without masks: {int(poisoned.sum())} of {M * N:,} results are NaN, the others off by up to {worst:.1f}")
assert poisoned[-1].all() and poisoned[:, -1].all() and worst > 1
assert int(poisoned.sum()) == M + N - 1  # the last row and the last column

naive[(M, N)](framed_x, framed_W, framed_y, N, K, counter, BLOCK=32)
check("with masks, inside NaN", framed_y, exact, x @ W.T)
assert torch.equal(framed_y, y) and (around[:64] == 777).all() and (around[-64:] == 777).all()

# %% [markdown]
"""Only the last row and the last column met a NaN. All other programs read numbers of the next row. Without the
canary they would look fine to anyone who only checks for NaN, and be off by several units. So the tests of
minitune's kernels do both: NaN around every input, and a comparison with 64 bits.
"""

# %% [markdown]
"""## 3. Tiles

A program that computes a tile of BM x BN outputs reads BM rows of x and BN rows of W, and uses each number BN or BM
times. So all programs together read

    M K N / BN + N K M / BM        (rounded up to whole tiles)

The sum over K goes in steps of BK. In each step a tile of x, (BM, BK), and one of W, (BN, BK), are multiplied by
`tl.dot`. On a GPU that is what the tensor cores do. Masks now have two sides, rows and columns: both edges of the
matrix can cut a tile.
"""

# %%
print("== 3. Tiles")


@triton.jit
def load_tile(matrix, row, rows, column, columns, counter):
    """Load the tile (row, column) of a matrix (rows, columns), 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return load(matrix + row[:, None] * columns + column[None, :], inside, counter)


@triton.jit
def tiled(x, w, y, m, n, k, counter, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Write a tile (BM, BN) of y."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        place = start + tl.arange(0, BK)
        left = load_tile(x, row, m, place, k, counter)  # (BM, BK)
        right = load_tile(w, column, n, place, k, counter)  # (BN, BK)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y + row[:, None] * n + column[None, :], total.to(y.dtype.element_ty), mask=inside)


print("    tile        programs     read   each number")
read_by_tile = {}
for bm, bn in ((16, 16), (32, 16), (32, 32)):
    counter.zero_()
    grid = (triton.cdiv(M, bm), triton.cdiv(N, bn))
    framed_y.fill_(float("nan"))  # a place that is left out stays NaN
    tiled[grid](framed_x, framed_W, framed_y, M, N, K, counter, BM=bm, BN=bn, BK=32)
    read_by_tile[bm, bn] = counter.item()
    print(f"    {bm} x {bn:2} {grid[0] * grid[1]:12} {counter.item():10,} {counter.item() / once:8.1f} times")
    assert counter.item() == M * K * grid[1] + N * K * grid[0]
    check(f"{bm} x {bn}", framed_y, exact, x @ W.T)
assert (around[:64] == 777).all() and (around[-64:] == 777).all()
assert read_by_tile[32, 32] == once < read_by_tile[16, 16] < reads / 4

# %% [markdown]
"""With tiles of 128 x 128, the product of our 4,096 x 4,096 matrices would read 2.1 GB in place of 275, one 128th.
And each pair of numbers read gives 128 multiplications. Larger tiles would read less still, but a tile's sums have
to stay in registers: 128 x 128 sums are 64 KiB, a quarter of what a multiprocessor of an H100 has.

(`input_precision="ieee"` is there for 32-bit inputs. The tensor cores would otherwise round them to 10 bits of
fraction first, without a word.)
"""

# %%
assert round(2 * 2 * 4_096**3 / 128 / 1e9, 1) == 2.1 and 128 * 128 * 4 == 64 * 1024 and 64 / 256 == 1 / 4
ten_bits = torch.tensor(1.0).add(2.0**-10)  # the smallest step above 1 that 10 bits of fraction can hold
assert (ten_bits - 1).item() == 2**-10 and torch.finfo(torch.float32).bits == 32 and round(4_096**3 * 4 / 1e9) == 275

# %% [markdown]
"""## 4. What the sum is kept in

Inputs in 16 bits are fine. The sum of their products is another matter. fp16 has 11 digits in base 2. Once a sum
has grown to 2,048, it moves in steps of 2, and whatever is smaller than 1 is lost. So `tl.dot` takes 16-bit tiles
and adds in 32 bits, and only the finished result is rounded. To see the difference we add 4,096 products of numbers
between 0 and 1, in both ways.
"""

# %%
print("== 4. What the sum is kept in")


@triton.jit
def narrow(x, w, y, m, n, k, counter, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same as `tiled`, but the sum is kept in fp16."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float16)
    for start in range(0, k, BK):
        place = start + tl.arange(0, BK)
        left = load_tile(x, row, m, place, k, counter)
        right = load_tile(w, column, n, place, k, counter)
        total += tl.dot(left, tl.trans(right)).to(tl.float16)
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y + row[:, None] * n + column[None, :], total, mask=inside)


long = 4_096
a, b = (draw(17, long, seed=seed).abs().clamp(max=1).half() for seed in (2, 3))
long_exact = a.double() @ b.double().T
errors, sums = {}, {}
for name, kernel in (("fp32", tiled), ("fp16", narrow)):
    sums[name] = out = torch.empty(17, 17, dtype=torch.float16, device=DEVICE)
    kernel[(1, 1)](a, b, out, 17, 17, long, counter, BM=32, BN=32, BK=32)
    errors[name] = ((out.double() - long_exact) / long_exact).abs().max().item()
    print(f"  sum kept in {name}: largest relative error {errors[name]:.1e}")
check("kept in fp32", sums["fp32"], long_exact, a @ b.T)
half = torch.finfo(torch.float16)
assert half.bits == 16 and half.eps == 2 ** -(11 - 1) and torch.tensor(2048.0).half() + 1 == 2_048
assert errors["fp32"] <= 1.01 * half.eps / 2 and errors["fp16"] > 4 * errors["fp32"]

# %% [markdown]
"""## 5. Decode in the tile: NF4

Now W is NF4 (tutorial 6): two codes in a byte, the first in the upper four bits, and one fp32 absmax for each 64
weights. One could decode W to memory and multiply then. That writes every weight and reads it again, 2 bytes each
time. With few rows of x, reading W is all the time there is, so it should be read in 4 bits and never be written.

The kernel is `tiled` with another way to get the right tile:

    bytes (BN, BK / 2)  ->  codes, high and low side by side (BN, BK / 2, 2)  ->  (BN, BK)  ->  16 values  ->  x absmax

Blocks of 64 are flat: they run through the matrix row by row. If K is a multiple of 64, as here with K = 128, none
spans two rows, and a tile with BK = 64 has one absmax a row. `tl.join` puts two blocks side by side in a new last
dimension.
"""

# %%
print("== 5. Decode in the tile: NF4")


@triton.jit
def nf4_tiled(
    x, packed, absmax, values, y, m, n, k, counter, scale_counter, byte_counter,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile (BM, BN) of y; k is a multiple of BK, and BK is the block of 64."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        left = load_tile(x, row, m, start + tl.arange(0, BK), k, counter)  # (BM, BK)
        byte = load_tile(packed, column, n, start // 2 + tl.arange(0, BK // 2), k // 2, byte_counter)  # (BN, BK / 2)
        byte = byte.to(tl.int32)
        codes = tl.reshape(tl.join(byte >> 4, byte & 15), (BN, BK))
        scale = load(absmax + column * (k // BK) + start // BK, column < n, scale_counter)  # (BN,)
        weight = tl.load(values + codes) * scale[:, None]  # 16 values: they stay in the nearest cache
        total = tl.dot(left, tl.trans(weight.to(left.dtype)), total, input_precision="ieee")
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y + row[:, None] * n + column[None, :], total.to(y.dtype.element_ty), mask=inside)


K = 128
x, W = draw(M, K, seed=4), draw(N, K, seed=5)
weight = quantize(W, "nf4", block_size=64, double_quant=False)
decoded = weight.dequantize()  # (N, K), what the reference would multiply with
exact = x.double() @ decoded.double().T
framed_x, _ = framed(x, float("nan"))
packed, _ = framed(weight.packed, 255)  # two codes 15; a byte cannot be NaN, but the scales beside it can
absmax, _ = framed(weight.absmax, float("nan"))
counters = torch.zeros(3, dtype=torch.int32, device=DEVICE)
framed_y.fill_(float("nan"))
grid = (triton.cdiv(M, 64), triton.cdiv(N, 32))
nf4_tiled[grid](framed_x, packed, absmax, codebook("nf4", DEVICE), framed_y, M, N, K, counters[0:], counters[1:],
                counters[2:], BM=64, BN=32, BK=64)  # fmt: skip
check("NF4, fp32 inputs", framed_y, exact, x @ decoded.T)
assert (around[:64] == 777).all() and (around[-64:] == 777).all()
_, scales, codes = counters.tolist()
read_bytes = codes + 4 * scales
print(f"  W is read once: {codes:,} bytes of codes and {scales} scales, {8 * read_bytes / W.numel():.1f} bits a weight")
assert grid[0] == 1 and codes == N * K // 2 and scales == N * K // 64 and 8 * read_bytes / W.numel() == 4.5

# %% [markdown]
"""That is 4.5 bits a weight in place of 16: 3.6 times less to read. With double quantisation it is 4.127 bits
(tutorial 6). For one token and a matrix of 4,096 x 4,096, W is 33.6 MB in bf16 and 9.4 MB in NF4, and everything
else is next to nothing. In return the kernel has work to do for each weight: a shift, a mask, a lookup, a
multiplication. It is worth it as long as the memory is the bottleneck.

With many rows it is not. Each row of tiles decodes W again: at M = 2,048 and BM = 64 that is 32 times. Then it is
better to decode once to memory and leave the rest to the vendor's matmul.
"""

# %%
assert round(16 / 4.5, 1) == 3.6 and round(4_096**2 * 2 / 1e6, 1) == 33.6 and round(4_096**2 * 4.5 / 8 / 1e6, 1) == 9.4
assert 2_048 / 64 == 32
double = quantize(draw(64, 256, seed=8).repeat(4, 4), "nf4")
assert round(4 + 8 / 64 + 32 / (64 * 256), 3) == 4.127 <= 8 * double.nbytes / double.shape.numel()

# %% [markdown]
"""## 6. The kernels that minitune uses

`minitune/kernels` has the same ideas, grown up: double quantisation decoded on the way, a LoRA term added before
the result is written, gradients, any strides, and three ways to go. Which one depends on the number of rows:

- one row, as in generation: no tiles, each program multiplies a few rows of W with x,
- up to 64 rows: tiles, decoded in registers, as above,
- more rows, or 32 bits: decode once, then the vendor's matmul.

We run all of them here, against 64 bits. The last check is the gradient of x, which needs W the other way round:
`dx = dy W`.
"""

# %%
print("== 6. The kernels that minitune uses")
N, K, R = 48, 192, 4
weight = quantize(draw(N, K, seed=6), "nf4")  # double quantisation
decoded = nf4.dequantize(weight, torch.float32)
assert torch.equal(decoded, weight.dequantize()), "the kernel decodes otherwise than the reference"
print(f"  decoding W (N={N}, K={K}): equal to the reference, bit for bit")
B, ways = (draw(N, R, seed=7) / 8).half(), []
for rows in (1, 17, 64, 65):
    x = (draw(rows, K, seed=rows) / 8).half().requires_grad_(True)
    u = (draw(rows, R, seed=rows + 1) / 8).half()
    ways.append(nf4_matmul.plan(rows, N, K, dtype=torch.float16).way)
    y = nf4_matmul.nf4_linear(x, weight, u, B, 0.5)
    narrow_weight = decoded.half()
    exact = x.detach().double() @ narrow_weight.double().T + 0.5 * u.double() @ B.double().T
    check(f"{rows:2} rows, fp16, by {ways[-1]}", y.detach(), exact, x.detach() @ narrow_weight.T + 0.5 * u @ B.T)
    dy = (draw(rows, N, seed=9) / 8).half()
    (dx,) = torch.autograd.grad(y, x, dy)
    check(f"{rows:2} rows, its gradient", dx, dy.double() @ narrow_weight.double(), dy @ narrow_weight)
assert (
    ways == ["matvec", "tiles", "tiles", "dequantize"] and nf4_matmul.plan(64, N, K, dtype=torch.float32).way == ways[3]
)
print("== every number agreed")
