"""The values that codes of 4 and 8 bits stand for: NF4, FP4 and the dynamic map. `ops` and the kernels share them.

nf4          quantiles of a standard normal (Dettmers et al. 2023, "QLoRA", equation 4)
fp4          floats of a sign, two bits of exponent and one of fraction
dynamic map  a decimal exponent and even steps in [0.1, 1] (Dettmers et al. 2022, section 2.2 and appendix F)

They are derived rather than listed, and equal the published tables to the last bit.
"""

import functools

import torch


def even_steps(start: float, end: float, count: int) -> torch.Tensor:
    """Return `count` fp32 numbers from start to end, as `torch.linspace` gives them where it fuses multiply and add.

    The published tables were made so; on processors without that instruction `torch.linspace` is an ulp off.
    """
    first, last = torch.tensor([start, end])
    step = ((last - first) / (count - 1)).double()
    i = torch.arange(count, dtype=torch.float64)
    return torch.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).float()


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 256 values of the map, ascending, fp32, in [-0.993, 1] or [0, 1]; shared: don't write to it."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = even_steps(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        centres = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), device=device)


def midpoints(values: torch.Tensor) -> torch.Tensor:
    """Return the (n-1,) fp32 boundaries between n ascending values."""
    return (values[:-1] + values[1:]) / 2


@functools.cache
def codebook(kind: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the (16,) fp32 values of "nf4" or "fp4" in the order of their codes; shared: don't write to it."""
    return {"nf4": _nf4, "fp4": _fp4}[kind]().to(device)


def _nf4() -> torch.Tensor:
    """Quantiles of a standard normal (QLoRA, equation 4): 7 below zero, zero, 8 above it, divided by the largest."""
    outermost = 0.9677083  # probability: the mean of 1 - 1/30 and 1 - 1/32, as the published table has it
    below = -torch.special.ndtri(even_steps(outermost, 0.5, 8)[:-1].double())
    above = torch.special.ndtri(even_steps(outermost, 0.5, 9)[:-1].double())
    values = torch.cat([below, torch.zeros(1), above.flip(0)]).float()
    return values / values[-1]


def _fp4() -> torch.Tensor:
    """Floats of a sign, two bits of exponent and one of fraction, in bitsandbytes' order, divided by the largest."""
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([positive, 0 - positive])


@functools.cache
def ascending(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values in ascending order and the code of each."""
    values, codes = codebook(kind, device).sort(stable=True)
    return values, codes.to(torch.uint8)
