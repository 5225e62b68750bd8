"""safetensors files, read tensor by tensor straight into the memory where each is to live.

The safetensors library checks the header (size, order, no gaps, nothing after the last tensor). Of two entries of one
name it keeps the last, so the header is read again, strictly. The bytes are then read, not mapped: pages of a mapped
file count as resident until the file is closed, which would double the peak while loading. A conversion of dtype or a
move to another device goes through a buffer of `CHUNK` elements.
"""

import errno
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitune.errors import CheckpointError
from minitune.strict_json import loads

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
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): truncated, padded or of another kind; fetch it again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        if not isinstance(info, dict):  # the library takes a list of the values too
            raise CheckpointError(f"{path}: {name} is described by {info!r}; it must be an object; fetch it again")
        if math.prod(max(1, extent) for extent in info["shape"]) >= 1 << 63:  # the library allows it with another 0
            raise CheckpointError(f"{path}: {name} has the impossible shape {info['shape']}; fetch it again")
        if info["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {info['dtype']}; known are {', '.join(DTYPES)}")
        start, end = info["data_offsets"]
        dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + start, end - start)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself, beside its tensors; errors as in `read_header`."""
    read_header(path)
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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
