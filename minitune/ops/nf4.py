"""4-bit NormalFloat (Dettmers et al. 2023, "QLoRA", section 3): weights as 16 quantiles of a normal, block by block.

    absmax_b = max |w_i| over block b,   q_i = argmin_j |code_j - w_i / absmax_b|,   w_i ~ round(code[q_i] absmax_b)

Weights of a trained model are close to normal, so codes at the quantiles are used about equally often and carry
nearly 4 bits each. Blocks are runs of the weight read row by row; the scale costs 32 / 64 bits a weight. Double
quantisation keeps the scales, less their mean, in 8 bits, and one fp32 for 256 of them: 4.127 bits in all.

A weight is the product of two fp32 numbers rounded once to its dtype. bf16 codes times bf16 scales were rejected:
they round three times, and no longer agree with what other programs read from the same file. On the CPU a table
gives both codes of a byte at once; one of four codes for two bytes (1 MB) misses the nearest cache and is no faster.
`torch.compile` was rejected: it needs a C++ compiler and seconds at every start.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minitune.codebooks import ascending, codebook, dynamic_map
from minitune.errors import CheckpointError, ConfigError
from minitune.ops.backend import kernel
from minitune.ops.blockwise8 import (
    CHUNK,
    dequantize_blockwise,
    nearest,
    quantize_blocks,
    quantize_blockwise,
    scale_blocks,
)
from minitune.ops.quantization import QuantizationConfig

DECODED = 1 << 19  # elements decoded at a time on a CPU: 8 to 15% less time than a quarter of it, in 3 MB
NESTED_BLOCK = 256  # scales that share one scale in double quantisation


@functools.cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """Return for each byte its two fp32 values, the high nibble's first, as one int64: (256,)."""
    byte = torch.arange(256, device=device)
    values = codebook(kind, device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).squeeze(1)


@functools.lru_cache(maxsize=8)
def _room(device: torch.device, size: int, thread: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for the indices and pairs of `size` bytes, one for each thread, so that none writes to another's."""
    with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside
        return tuple(torch.empty(size, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight in 4 or 8 bits, and its scales: `absmax`, or in double quantisation the three fields after it."""

    packed: torch.Tensor
    """4 bits: uint8 (ceil(n / 2),), elements 2i and 2i + 1 in the high and low nibble; int8: of the weight's shape."""
    shape: torch.Size
    dtype: torch.dtype
    """Of the weight, and of what `dequantize` returns unless told otherwise."""
    block_size: int
    """Elements that share a scale, read row by row; for int8 the length of a row."""
    kind: str = "nf4"
    absmax: torch.Tensor | None = None
    """fp32 (ceil(n / block_size),)."""
    absmax_codes: torch.Tensor | None = None
    """uint8 (ceil(n / block_size),), into the signed dynamic map."""
    nested_absmax: torch.Tensor | None = None
    """fp32 (ceil(len(absmax_codes) / 256),)."""
    offset: torch.Tensor | None = None
    """fp32 (), the mean absmax."""
    on_gradient: Callable[[torch.Tensor], None] | None = None
    """Called in each backward pass with the gradient that the weight would have, (out, in); nothing keeps that."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are present, by field: all that is to be stored or moved."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedTensor":
        """Return a copy with `function` applied to each tensor, such as a move to another device."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def scales(self) -> torch.Tensor:
        """Return absmax, fp32 (ceil(n / block_size),), dequantised where it is kept in 8 bits."""
        if self.absmax is not None:
            return self.absmax
        values = dynamic_map(True, self.absmax_codes.device)
        return dequantize_blockwise(self.absmax_codes, self.nested_absmax, values, NESTED_BLOCK).add_(self.offset)

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight in `dtype` (None: its own), or fill `out`, contiguous, of its shape and any float dtype.

        Raises:
            ConfigError: `out` has another shape or device, has gaps, or comes together with a dtype.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        elif dtype or out.shape != self.shape or not out.is_contiguous() or out.device != self.packed.device:
            raise ConfigError(
                f"out is {list(out.shape)} on {out.device}, contiguous: {out.is_contiguous()}; it must be "
                f"{list(self.shape)} on {self.packed.device}, contiguous, and given without dtype"
            )
        if self.kind == "int8":
            return _fill_rows(self.packed, self.scales(), out)
        if run := kernel("nf4.dequantize", out):  # decodes the scales too
            return run(self, out=out)
        return _fill_pairs(self.packed, self.scales(), self.block_size, self.kind, out)


def quantize(
    weight: torch.Tensor,
    kind: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "the weight",
) -> QuantizedTensor:
    """Quantise a weight of any shape.

    Args:
        weight: fp32, fp16 or bf16; not empty.
        kind: nf4, fp4, or int8, which has one scale a row, absmax / 127.
        block_size: for 4 bits a power of two from 32 to 4096; a row of int8 is its block.
        double_quant: whether to keep the scales of 4 bits in 8 bits; those of int8 are fp32.
        name: of the weight, for errors.

    Raises:
        ConfigError: an option or the dtype is impossible or without effect.
        CheckpointError: the weight holds a NaN or infinity.
    """
    QuantizationConfig(kind, block_size, double_quant)  # refuses what is impossible or without effect
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not weight.numel():
        raise ConfigError(
            f"{name} is {list(weight.shape)} {weight.dtype}; only float32, float16 and bfloat16 weights with "
            f"at least one element can be quantised"
        )
    if kind == "int8":
        block_size = weight.shape[-1]
        packed, absmax = quantize_blocks(weight, block_size, lambda scaled: scaled.mul_(127).round_(), torch.int8)
    else:
        packed, absmax = quantize_4bit(weight.reshape(-1), block_size, kind)
    if not torch.isfinite(absmax).all():
        raise CheckpointError(f"{name} holds a NaN or infinity and cannot be quantised; the checkpoint is damaged")
    scales = _nest(absmax) if double_quant and kind != "int8" else {"absmax": absmax}
    return QuantizedTensor(packed, weight.shape, weight.dtype, block_size, kind, **scales)


def _nest(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Double quantisation (QLoRA, section 3): the scales, less their mean, in 8 bits; fields of QuantizedTensor."""
    offset = absmax.mean()
    codes, nested = quantize_blockwise(absmax - offset, dynamic_map(True, absmax.device), NESTED_BLOCK)
    return {"absmax_codes": codes, "nested_absmax": nested, "offset": offset}


def quantize_4bit(flat: torch.Tensor, block_size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 (ceil(n / 2),), and absmax, fp32 (ceil(n / block_size),), of flat (n,), n > 0.

    Where n is odd, the last low nibble is the code of zero.
    """
    if run := kernel("nf4.quantize_4bit", flat):
        return run(flat, block_size, kind)
    values, order = ascending(kind, flat.device)
    index, absmax = quantize_blocks(flat, block_size, lambda scaled: nearest(scaled, values), torch.uint8)
    if len(flat) % 2:
        index = torch.cat([index, nearest(torch.zeros(1, device=flat.device), values)])
    codes = index if kind == "nf4" else order.index_select(0, index.int())
    return (codes[::2] << 4) | codes[1::2], absmax


def _fill_pairs(packed: torch.Tensor, absmax: torch.Tensor, block_size: int, kind: str, out: torch.Tensor):
    """Fill out with fp32 code x absmax, rounded once."""
    flat = out.view(-1)
    step = DECODED if out.device.type == "cpu" else 1 << 22
    index, pairs = _room(out.device, step // 2, threading.get_ident())
    for start in range(0, len(flat), step):
        part, data = flat[start : start + step], packed[start // 2 : (start + step) // 2]
        chosen = index[: len(data)].copy_(data)
        torch.index_select(_pairs(kind, out.device), 0, chosen, out=pairs[: len(data)])
        values = pairs.view(torch.float32)[: len(part)]
        part.copy_(scale_blocks(values, absmax[start // block_size : (start + step) // block_size], block_size))
    return out


def _fill_rows(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill out with int8 x (absmax / 127) of its row, rounded once more where out is narrower than fp32."""
    width = packed.shape[-1]
    tensors = (packed.view(-1, width), out.view(-1, width), (absmax / 127)[:, None])
    for data, part, scale in zip(*(tensor.split(max(1, CHUNK // width)) for tensor in tensors), strict=True):
        part.copy_(data.float().mul_(scale))
    return out
