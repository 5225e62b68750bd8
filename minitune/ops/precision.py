"""The dtype in which norms, turns, softmax and losses are computed: fp32, or fp64 for fp64 inputs."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, fp32 for every other float dtype."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return x in `wide_dtype`; x itself where it is that already."""
    return x.to(wide_dtype(x.dtype))
