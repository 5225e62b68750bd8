"""What a file holds against what a model needs: every misfit listed in one error, every number finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minitune.errors import CheckpointError

_LISTED = 8


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all is finite. The sum says so in a tenth of the time, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_fit(what: str, expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing every tensor that is missing, left over, of another shape or no float."""
    fail_listing(what, misfits(expected, tensors))


def misfits(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Any]) -> list[str]:
    """Return a line for every tensor that is missing, left over, of another shape or no float."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not part of this model")
        elif tuple(tensor.shape) != tuple(expected[name]):
            problems.append(f"{name} is {list(tensor.shape)} instead of {list(expected[name])}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"{name} is stored as {tensor.dtype}, which weights cannot be")
    return problems


def fail_listing(what: str, problems: list[str]) -> None:
    """Raise CheckpointError naming the first few problems, and with all as its `problems`; return if there is none."""
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        error = CheckpointError(f"{what}: {'; '.join(problems[:_LISTED])}{more}")
        error.problems = tuple(problems)
        raise error
