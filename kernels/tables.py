"""The constants of the quantised formats, as tensors beside the kernels; `minitune.ops` derives them, tests compare.

Kernels stand below `ops` and cannot import from there. A lookup in 16 values was preferred to a tree of selections,
which costs 15 instructions a value where the lookup costs one.
"""

import functools

import torch

_NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
_FP4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]  # twelfths, bitsandbytes' order; codes 8 to 15 are their negatives


@functools.cache
def codebook(kind: str, device: torch.device) -> torch.Tensor:
    """Return the (16,) fp32 values of "nf4" or "fp4" by code."""
    positive = torch.tensor(_FP4) / 12
    values = torch.tensor([float(word) for word in _NF4.split()]) if kind == "nf4" else torch.cat([positive, -positive])
    return values.to(device)


@functools.cache
def boundaries(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 15 boundaries between the sorted values, and the code (16,) int32 of each value from low to high."""
    values, order = codebook(kind, device).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.int32)


def _even_steps(count: int) -> torch.Tensor:
    """Return `count` fp32 numbers from 0.1 to 1: fp32 steps counted from both ends, added in fp64, rounded once."""
    first = torch.tensor(0.1)
    step, i = ((1 - first) / (count - 1)).double(), torch.arange(count, dtype=torch.float64)
    return torch.where(i < count // 2, first + step * i, 1 - step * (count - 1 - i)).float()


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the (256,) fp32 values, ascending, of the 8-bit map: decades of evenly spaced fractions."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = _even_steps(2 ** (decade + (not signed)) + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values.to(device)


@functools.cache
def map_boundaries(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the 255 boundaries between the map's values."""
    values = dynamic_map(signed, device)
    return (values[:-1] + values[1:]) / 2
