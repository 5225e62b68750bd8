"""Which implementation an operation takes: its Triton kernel where one can run, else the reference beside it.

Every operation asks `kernel` itself, once it has seen that its input is on a GPU. A registry that patches the
operations at start was rejected: what runs would then depend on what was imported.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

from minitune.errors import ConfigError, nearest

BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_backend = "auto"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _find(name: str) -> Callable:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"minitune.kernels.{module}"), function)


def set_backend(name: str) -> None:
    """Choose for all operations from here on: "auto" (kernels on a GPU), "reference" or "triton".

    Raises ConfigError for another name, and for "triton" where no kernel can run.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"backend is '{name}'; it must be {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    if name == "triton" and not _has_triton():
        raise ConfigError("backend is triton, but Triton is not installed; use auto or reference")
    if name == "triton" and not torch.cuda.is_available():
        raise ConfigError("backend is triton, but torch finds no GPU here; use auto or reference")
    _backend = name


def get_backend() -> str:
    """Return the choice in force."""
    return _backend


def kernel(name: str, *tensors: torch.Tensor) -> Callable | None:
    """Return the function `name`, as "norm.rms_norm", of `minitune.kernels`; None where the reference is to run.

    "auto" takes a kernel where all tensors are on a GPU in a dtype that kernels know; "triton" leaves it to the
    kernel to refuse a dtype.
    """
    if _backend == "reference" or not all(tensor.is_cuda for tensor in tensors):
        return None
    if _backend == "auto" and not (_has_triton() and all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)):
        return None
    return _find(name)
