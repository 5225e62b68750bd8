"""safetensors files, read tensor by tensor straight into the memory where each is to live.

    8 bytes: length n of the header;   n bytes: JSON, name -> {dtype, shape, data_offsets};   the tensors, without gaps

The safetensors library writes them. It is not asked to read: it maps the whole file into memory, which a system may
refuse for one larger than that, it keeps the last of two entries of one name, and pages of a mapped file count as
resident until it is closed, which would double the peak while loading. A conversion of dtype or a move to another
device goes through a buffer of `CHUNK` elements.
"""

import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minitune.errors import CheckpointError
from minitune.strict_json import loads

_HEADER_LIMIT = 100_000_000  # bytes, the library's own
_ENTRY = {"dtype", "shape", "data_offsets"}
CHUNK = 1 << 15  # elements: stays in a core's cache, and torch converts it on one thread
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file, and what it is; nothing is read yet. `offset` and `size` are in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def read_into(self, destination: torch.Tensor) -> None:
        """Fill `destination`, contiguous, of the same shape and of any dtype and device."""
        flat = destination.detach().view(-1)
        direct = destination.dtype == self.dtype and destination.device.type == "cpu"
        step = max(1, flat.numel()) if direct else CHUNK
        buffer = None if direct else torch.empty(min(step, flat.numel()), dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            for start in range(0, flat.numel(), step):
                part = flat[start : start + step]
                target = part if buffer is None else buffer[: len(part)]
                self._fill(stream, target)
                if buffer is not None:
                    part.copy_(target)

    def read(self) -> torch.Tensor:
        """Return the tensor as it is stored, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def _fill(self, stream, target: torch.Tensor) -> None:
        view = memoryview(target.view(torch.uint8).numpy())
        while view:
            count = stream.readinto(view)
            if not count:
                raise CheckpointError(f"{self.file} became shorter while it was read")
            view = view[count:]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds, by tensor name, without reading any tensor.

    Raises:
        CheckpointError: the file is missing, truncated, padded or not safetensors, or has a dtype not known here.
    """
    header, data, size = _header(path)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    try:
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = stored = _stored(path, name, info, data)
            if stored.offset != data + end:
                raise ValueError(f"{name} begins at byte {stored.offset - data:,}, where {end:,} is next")
            end += stored.size
        if data + end != size:
            raise ValueError(f"the tensors end at byte {data + end:,}, the file at {size:,}")
    except (ValueError, TypeError, KeyError) as error:
        raise _broken(path, error) from None
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, where its tensors begin, and the file's size in bytes."""
    try:
        with open(path, "rb") as stream:
            size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length:,} bytes is claimed in a file of {size:,}")
            header = loads(stream.read(length).decode())
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its header is not an object")
        if not all(isinstance(value, str) for value in header.get("__metadata__", {}).values()):
            raise ValueError("its metadata is not text")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        raise _broken(path, error) from None
    return header, 8 + length, size


def _stored(path: Path, name: str, info: dict[str, Any], data: int) -> StoredTensor:
    """Return the tensor that an entry of the header describes, `data` being where tensors begin; ValueError if none."""
    shape, (start, end) = info["shape"], info["data_offsets"]
    if info["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} is stored as {info['dtype']!r}; known are {', '.join(DTYPES)}")
    whole = isinstance(shape, list) and all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if info.keys() != _ENTRY or not whole or math.prod(max(1, extent) for extent in shape) >= 1 << 63:
        raise ValueError(f"{name} is described by {info}")
    dtype = DTYPES[info["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} has {end - start:,} bytes")
    return StoredTensor(path, dtype, tuple(shape), data + start, end - start)


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file ({error}): truncated, padded or of another kind; fetch it again"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself, beside its tensors; errors as in `read_header`."""
    return _header(path)[0].get("__metadata__", {})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU; errors as in `read_header`."""
    return {name: stored.read() for name, stored in read_header(path).items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file; the caller makes the write atomic (`files.atomic_file`).

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; the library would leave the file to its owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(mode)
        if metadata:
            _sort_metadata(path)
    except SafetensorError as error:
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from None


def _sort_metadata(path: Path) -> None:
    """Sort what a file says of itself: the library has another order, and so other bytes, at every write."""
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
