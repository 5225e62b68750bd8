"""What every kernel asks of its tensors, in one line of ours; Triton would answer with a trace, or with wrong numbers.

A kernel reads memory by address: a dtype, shape or stride that it does not expect is not an error to it. So each
public function calls `require` on each tensor first. A tensor on another GPU than the current one is refused too,
since Triton launches on the current one.
"""

from collections.abc import Sequence

import torch
import triton

from minitune.errors import ConfigError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were decorated: they run on the CPU


def _misplaced(tensor: torch.Tensor, device: torch.device | None) -> str | None:
    if device is not None:
        return None if tensor.device == device else f"is on {tensor.device}, but the others are on {device}; move it"
    if not tensor.is_cuda:
        return None if INTERPRETED else f"is on {tensor.device}, but a Triton kernel needs a GPU; move it to one"
    current = torch.cuda.current_device()
    if tensor.get_device() != current:
        return f"is on {tensor.device}, but the current GPU is cuda:{current}; call torch.cuda.set_device"
    return None


def _fits(found: Sequence[int], shape: Sequence) -> bool:
    if shape[:1] == (...,):
        found, shape = found[max(len(found) - len(shape) + 1, 0) :], shape[1:]
    return len(found) == len(shape) and all(need in (None, size) for size, need in zip(found, shape, strict=True))


def require(name: str, tensor: torch.Tensor, *, dtypes=FLOATS, shape=None, device=None, contiguous=False) -> None:
    """Raise ConfigError, naming the tensor, unless a kernel can take it.

    Args:
        name: what the public function calls the tensor.
        tensor: the tensor.
        dtypes: those that the kernel knows.
        shape: a tuple in which None is any size and a leading ... any number of dimensions, e.g. (..., 64).
        device: that of the first tensor; None for the first, which must be where kernels run.
        contiguous: True where the kernel takes no strides.
    """
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, but the kernel takes {known}; convert it"
        )
    if shape is not None and not _fits(tensor.shape, shape):
        need = ", ".join({None: "any", ...: "..."}.get(size, str(size)) for size in shape)
        raise ConfigError(f"{name} has the shape {tuple(tensor.shape)}, but the kernel needs ({need})")
    if (problem := _misplaced(tensor, device)) is not None:
        raise ConfigError(f"{name} {problem}")
    if contiguous and not tensor.is_contiguous():
        raise ConfigError(
            f"{name} has the strides {tensor.stride()}, but the kernel needs it contiguous; call .contiguous()"
        )


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x (..., D) as (N, D) with adjacent columns: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
