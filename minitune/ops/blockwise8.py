"""Eight bits a number, block by block, by a dynamic map (Dettmers et al. 2022, section 2.2 and appendix F).

    absmax_b = max |x_i| over block b,   q_i = argmin_j |map_j - x_i / absmax_b|,   x_i ~ map[q_i] absmax_b

A dynamic map spends its bits as needed: a run of leading zeros is a decimal exponent (1 down to 1e-6), what is left
is a fraction in even steps over [0.1, 1]. So it resolves seven decades where even steps resolve two.

Halfway between two entries the lower one is taken, and x / absmax is x times the fp32 reciprocal: the rule of
bitsandbytes' CUDA kernels and of its pure-PyTorch code. Its CPU library rounds x / absmax to 65,536 even steps first,
so that 0 becomes 2.1e-5 absmax and seven entries are never used. That was rejected.

The entry is found by its neighbourhood: floats that share their upper 16 bits have at most one boundary among them,
so a table gives the entry at the lowest of them and one comparison decides. The answer is exactly that of a binary
search (`torch.bucketize`), which takes ten times as long.
"""

import functools
from collections.abc import Callable

import torch

from minitune.codebooks import midpoints
from minitune.errors import ConfigError

CHUNK = 1 << 17  # elements worked on at a time: the passes over them stay in a core's cache
TINY = 1e-38  # divides a block of zeros; below it fp32 has no finite reciprocal


@functools.lru_cache(maxsize=16)
def _guesses(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the value nearest to the lowest float of each neighbourhood, (2^16,), and the boundaries.

    Neighbourhoods are in the order of their upper 16 bits read as a signed integer; the last boundary is infinite.
    """
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    boundaries = midpoints(values).cpu()
    low, high = torch.bucketize(ends, boundaries, out_int32=True).sort(0).values
    if (high - low)[ends.isfinite().all(0)].max() > 1:
        raise ConfigError("the values of a quantisation map are closer than 1 part in 128; use fewer of them")
    return low.to(values.device), torch.cat([boundaries, torch.tensor([torch.inf])]).to(values.device)


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return for each of x, fp32, the index of the nearest of at most 256 ascending values, uint8; ties go down."""
    guesses, boundaries = _guesses(values)
    flat = x.reshape(-1)
    index = guesses.index_select(0, (flat.view(torch.int32) >> 16).add_(1 << 15))
    index += flat > boundaries.index_select(0, index)
    return index.to(torch.uint8).view(x.shape)


def quantize_blocks(
    x: torch.Tensor, block_size: int, to_codes: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return to_codes(x / absmax) in `dtype` and x's shape, and absmax, fp32 (ceil(n / block_size),).

    x, of any shape and float dtype, is read row by row. NaN and infinity show in absmax.
    """
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    absmax = torch.empty(-(-x.numel() // block_size), device=x.device)
    step = max(1, CHUNK // block_size)  # blocks
    for start in range(0, len(absmax), step):
        part = slice(start * block_size, (start + step) * block_size)
        source, target = x.reshape(-1)[part], codes.view(-1)[part]
        blocks = torch.nn.functional.pad(source.float(), (0, -len(source) % block_size)).view(-1, block_size)
        scale = torch.amax(blocks.abs(), 1, out=absmax[start : start + step])
        scaled = blocks * (1 / scale.clamp(min=TINY))[:, None]
        target.copy_(to_codes(scaled).view(-1)[: len(target)])
    return codes, absmax


def quantize_blockwise(x: torch.Tensor, values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 of x's shape, into the ascending fp32 `values`, and absmax as `quantize_blocks` does."""
    return quantize_blocks(x, block_size, lambda scaled: nearest(scaled, values), torch.uint8)


def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return values[codes] x absmax, fp32, of the shape of codes."""
    out = torch.empty(codes.shape, device=codes.device)
    step = max(1, CHUNK // block_size)  # blocks
    for start, scale in zip(range(0, len(absmax), step), absmax.split(step), strict=True):
        part = slice(start * block_size, (start + step) * block_size)
        target = out.view(-1)[part]
        torch.index_select(values, 0, codes.view(-1)[part].int(), out=target)
        scale_blocks(target, scale, block_size)
    return out


def scale_blocks(flat: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply flat (n,) in place by its block's absmax; the last block may be short."""
    whole = len(flat) // block_size
    flat[: whole * block_size].view(-1, block_size).mul_(absmax[:whole, None])
    if whole < len(absmax):
        flat[whole * block_size :].mul_(absmax[whole])
    return flat
