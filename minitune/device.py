"""Where a model runs and in which arithmetic, when the user leaves it to us."""

import re

import torch

from minitune.errors import ConfigError, counted, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one.

    Raises ConfigError for another name, and for a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device is '{name}'; it must be auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(f"device is {name}, but torch finds {counted(found, 'GPU')} here; use --device cpu")
    return device


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the torch dtype for its name; ConfigError for one that weights cannot have."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    return DTYPES[dtype]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is bfloat16 where the device has instructions for it, else float32.

    Raises ConfigError for another name.
    """
    if name != "auto":
        return as_dtype(name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent in some torch versions
    fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32
