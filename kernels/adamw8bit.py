"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on moments of 8 bits (Dettmers et al. 2022, section 2), in one pass.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   m and v decoded from their codes, then encoded again
    w <- w (1 - a d) - a / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

A program has BLOCKS blocks of 256: both moments are decoded, used in fp32 and encoded by their new absmax without
leaving the registers, 10 bytes a bf16 weight instead of the 22 of fp32 moments. The code is found by a binary search
over 255 boundaries, 1 KB that stays in the first cache. v is never encoded as 0, for its weight would move by
a m / eps: `ops/adamw8bit.py` has the numbers. The update has no backward pass.

A bf16 weight is rounded to nearest, or with a seed stochastically: uniform bits are added to the half of the fp32
number that bf16 leaves out, and that half is cut off (Gupta et al. 2015, section 3).
"""

import functools
import math

import torch
import triton
import triton.language as tl

from minitune.codebooks import dynamic_map, midpoints
from minitune.errors import ConfigError
from minitune.kernels.checks import FLOATS, require
from minitune.kernels.nf4 import reciprocal, row_absmax

BLOCK_SIZE = tl.constexpr(256)
BLOCKS = 4  # blocks of a program


@triton.jit
def _decode(codes, absmax, values, place, block, inside, held):
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    return tl.load(values + code) * tl.load(absmax + block, mask=held, other=0.0)[:, None]


@triton.jit
def _encode(value, codes, absmax, middle, place, block, inside, held, LOWEST: tl.constexpr):
    """Store the codes of value, at least LOWEST, and the scale of each row; ties take the lower entry."""
    largest = row_absmax(value)
    scaled = value * reciprocal(largest)[:, None]
    code = tl.zeros(value.shape, tl.int32)
    for i in tl.static_range(8):
        code += tl.where(scaled > tl.load(middle + code + ((128 >> i) - 1)), 128 >> i, 0)
    tl.store(codes + place, tl.maximum(code, LOWEST).to(tl.uint8), mask=inside)
    tl.store(absmax + block, largest, mask=held)


@triton.jit
def adamw8bit_update(
    parameter, gradient, first, first_absmax, second, second_absmax, signed_map, signed_middle, plain_map, plain_middle,
    n, seed, scale, beta1, rest1, beta2, rest2, decay, rate, root, eps,
    STOCHASTIC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update BLOCKS blocks of the parameter (n,) and of its moments in place."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside, held = place < n, block * BLOCK_SIZE < n
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * scale
    m = _decode(first, first_absmax, signed_map, place, block, inside, held) * beta1 + g * rest1
    v = _decode(second, second_absmax, plain_map, place, block, inside, held) * beta2 + g * g * rest2
    m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
    w = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32) * decay
    w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if STOCHASTIC:
        noise = tl.randint(seed, place.to(tl.uint32)).to(tl.int32, bitcast=True) & 0xFFFF
        w = ((w.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    tl.store(parameter + place, w.to(parameter.dtype.element_ty), mask=inside)
    _encode(m, first, first_absmax, signed_middle, place, block, inside, held, 0)
    _encode(v, second, second_absmax, plain_middle, place, block, inside, held, 1)


@functools.cache
def _tables(device):
    """Return the values and boundaries of the signed map, then of the unsigned one."""
    maps = [dynamic_map(signed, device) for signed in (True, False)]
    return [table for values in maps for table in (values, midpoints(values))]


def _check(parameter, gradient, first, second, seed):
    require("parameter", parameter, contiguous=True)
    like = {"device": parameter.device, "contiguous": True}
    require("gradient", gradient, shape=parameter.shape, **like)
    blocks = triton.cdiv(parameter.numel(), 256)
    for name, (codes, absmax) in (("first", first), ("second", second)):
        require(f"{name}'s codes", codes, dtypes=(torch.uint8,), shape=parameter.shape, **like)
        require(f"{name}'s absmax", absmax, dtypes=FLOATS[:1], shape=(blocks,), **like)
    if seed is not None and parameter.dtype != torch.bfloat16:
        raise ConfigError(f"seed is {seed}, but only bfloat16 is rounded stochastically, not {parameter.dtype}")


@torch.no_grad()
def adamw8bit_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
    seed: int | None = None,
) -> None:
    """Update parameter, first and second in place; see `minitune.ops.adamw8bit.adamw8bit_step`."""
    _check(parameter, gradient, first, second, seed)
    device, (beta1, beta2) = parameter.device, betas
    adamw8bit_update[(triton.cdiv(parameter.numel(), BLOCKS * 256),)](
        parameter, gradient, *first, *second, *_tables(device), parameter.numel(), seed or 0, scale,
        beta1, 1 - beta1, beta2, 1 - beta2, 1 - learning_rate * weight_decay, learning_rate / (1 - beta1**step),
        math.sqrt(1 - beta2**step), eps, STOCHASTIC=seed is not None, BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
