"""Stochastic rounding from fp32 to bf16 (Gupta et al. 2015, section 3): right on average, where nearest stands still.

bf16 keeps 8 bits: an update below 1/512 of a weight vanishes when it is rounded to nearest, every time, so a
low learning rate trains nothing without a word. Here x lands on its lower or upper bf16 neighbour with the
probability that makes the mean x. In bits, bf16 is the upper half of fp32: add a uniform number to the lower
half and cut it off. An fp32 master copy was rejected: 4 bytes a weight, and 8 more for fp32 moments.
"""

import torch

POOL = 1 << 20  # random numbers drawn at a time; slices of one pool at random offsets are used


def noise_pool(device: torch.device) -> torch.Tensor:
    """Draw (2 POOL,) int32 numbers, uniform in [0, 2^16), from torch's global generator."""
    return torch.randint(0, 1 << 16, (2 * POOL,), dtype=torch.int32, device=device)


def round_stochastically(x: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> None:
    """Round x (n,) fp32 into out (n,) bf16 by noise (n,) int32 in [0, 2^16); x is used up."""
    bits = x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    out.copy_(bits.view(torch.float32))  # exact: the lower half is zero
