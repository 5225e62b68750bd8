"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on moments of 8 bits (Dettmers et al. 2022, section 2).

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   m and v decoded from their codes, then encoded again
    w <- w (1 - a d) - a / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Moments are kept by the dynamic maps of `blockwise8`, signed for m and unsigned for v, in blocks of 256: 2.03 bytes a
weight in place of 8. All arithmetic is in fp32. An outlier spoils the resolution of its own block only; one scale a
tensor was rejected for that. Embeddings, whose rows differ most, keep fp32 moments (Dettmers et al. 2022, section 2.3).

v is never encoded as 0 in a block that holds anything else, since its weight would then move by a m / eps: a v below
1.6e-7 of its block's largest has an m of up to 4e-4, which is not 0 in 8 bits. bitsandbytes lets it be 0. Down a bowl
whose curvatures span two decades (2,048 weights, a = 0.01, b2 = 0.99, 60 steps: `tests/ops/test_adamw8bit.py`) that
moves a weight by 415, where the lowest entry of the map, 3.25e-7, keeps all within 0.18 of fp32 AdamW. In all else the
state is bitsandbytes', bit for bit.

A bf16 weight is rounded to nearest, or with a seed stochastically: see `rounding.py` for why.
"""

import math

import torch

from minitune.codebooks import dynamic_map
from minitune.errors import ConfigError
from minitune.ops.backend import kernel
from minitune.ops.blockwise8 import dequantize_blockwise, quantize_blockwise
from minitune.ops.rounding import round_stochastically

BLOCK_SIZE = 256
SMALL = 4096  # elements
LOWEST = 1  # code of v, that of the smallest entry above 0
CHUNK = 1 << 17  # elements updated at a time: what is decoded of them stays in a core's cache

Moment = tuple[torch.Tensor, torch.Tensor]
"""Codes, uint8 of the parameter's shape, and absmax, fp32 (ceil(n / 256),)."""


def keeps_8_bits(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter has moments of 8 bits: no embedding has, and nothing too small to matter."""
    return parameter.numel() >= SMALL and "embed" not in name


def zero_moment(parameter: torch.Tensor) -> Moment:
    """Return a moment of zeros for a parameter."""
    absmax = torch.zeros(-(-parameter.numel() // BLOCK_SIZE), device=parameter.device)
    return torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device), absmax


@torch.no_grad()
def adamw8bit_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: Moment,
    second: Moment,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
    seed: int | None = None,
) -> None:
    """Update a parameter and its moments in place.

    Args:
        parameter: fp32, bf16 or fp16, contiguous.
        gradient: of its shape, any float dtype, contiguous.
        first: m by the signed map.
        second: v by the unsigned map.
        step: t, 1 for the first update.
        learning_rate: a.
        betas: b1 and b2.
        eps: added to the root of v.
        weight_decay: d.
        scale: what the gradient is multiplied by, in fp32.
        seed: rounds a bf16 parameter stochastically, by numbers drawn from this seed; None: to nearest.

    Raises:
        ConfigError: a seed for a parameter that is not bf16.
    """
    if run := kernel("adamw8bit.adamw8bit_step", parameter):
        return run(parameter, gradient, first, second, step, learning_rate, betas, eps, weight_decay, scale, seed)
    if seed is not None and parameter.dtype != torch.bfloat16:
        raise ConfigError(f"seed is {seed}, but only bfloat16 is rounded stochastically, not {parameter.dtype}")
    generator = None if seed is None else torch.Generator(parameter.device).manual_seed(seed)
    rate, root = learning_rate / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    flats = [tensor.view(-1).split(CHUNK) for tensor in (parameter, gradient, first[0], second[0])]
    scales = [absmax.split(CHUNK // BLOCK_SIZE) for absmax in (first[1], second[1])]
    for w, g, *moments in zip(*flats, *scales, strict=True):
        g = g.float() if scale == 1.0 else g.float() * scale
        m, v = (_decode(*moments[i::2], signed) for i, signed in ((0, True), (1, False)))
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        wide = w.float().mul_(1 - learning_rate * weight_decay)
        wide.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate)
        _write(wide, w, generator)
        _encode(m, *moments[0::2], True)
        _encode(v, *moments[1::2], False)
        moments[1].clamp_(min=LOWEST)


def _decode(codes, absmax, signed):
    return dequantize_blockwise(codes, absmax, dynamic_map(signed, codes.device), BLOCK_SIZE)


def _encode(value, codes, absmax, signed):
    new_codes, new_absmax = quantize_blockwise(value, dynamic_map(signed, codes.device), BLOCK_SIZE)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)


def _write(wide, w, generator):
    """Round wide, fp32, into w; wide may be w itself."""
    if generator is None:
        w.copy_(wide)
    else:
        noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=w.device, generator=generator)
        round_stochastically(wide, noise, w)
