"""GGUF files: their metadata and the places of their tensors, by the `gguf` package's reader, made bounded and quick.

The package's own makes several array views for each element of an array, 2.7 s for a vocabulary of 49,152
(2 cores; time `gguf.GGUFReader(path)`), and believes every count. Here an array is one checked pass.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from minitune.errors import CheckpointError

_MAX_FIELDS = 1 << 16


class _Reader(gguf.GGUFReader):
    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        at, size = orig_offs + 12, len(self.data)
        types = [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            end = at + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            if end > size:
                raise ValueError(f"an array of {count:,} elements ends beyond the file")
            return end - orig_offs, [self._get(at, self.gguf_scalar_to_np[kind], count)], [0], types
        if count * 8 > size - at:
            raise ValueError(f"an array claims {count:,} strings")
        parts, raw = [], memoryview(self.data)
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(raw[at:start], "little")
            if at > size:
                raise ValueError("a string ends beyond the file")
            parts.append(raw[start:at])
        return at - orig_offs, parts, list(range(count)), types

    def _build_tensors(self, start_offs, fields):
        """Note where tensors lie; the package's own also makes views, which none beyond the file's end can have."""
        names = set()
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            name, kind, shape = str(bytes(name), "utf-8"), gguf.GGMLQuantizationType(kind[0]), dims.tolist()[::-1]
            if name in names:
                raise ValueError(f"there are two tensors {name}")
            names.add(name)
            size, at = math.prod(quant_shape_to_byte_shape(shape, kind)), start_offs + int(offset[0])
            self.tensors.append(gguf.ReaderTensor(name, kind, dims, math.prod(shape), size, at, None, field))


def read_file(path: Path, *, arrays: bool, whole: bool = True) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    """Return a file's metadata, with None for each array unless `arrays`, and where its tensors lie.

    Counts are bounded before any is believed. Raises CheckpointError for a file that is missing, not GGUF, truncated
    or damaged; with `whole` false, tensors may end beyond the file, which can then be described but not read.
    """
    try:
        with open(path, "rb") as stream:
            head, size = stream.read(24), path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    if head[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {head[:4]!r}")
    tensors, fields = (int.from_bytes(head[start : start + 8], "little") for start in (8, 16))
    if len(head) < 24 or tensors * 24 > size or fields > _MAX_FIELDS:
        raise CheckpointError(f"{path} is damaged: {tensors:,} tensors and {fields:,} fields in {size:,} bytes")
    try:
        reader = _Reader(path)
        beyond = [tensor for tensor in reader.tensors if tensor.data_offset + tensor.n_bytes > size]
        if whole and beyond:
            first = min(beyond, key=lambda tensor: tensor.data_offset)
            raise ValueError(
                f"the tensor {first.name} ends at byte {first.data_offset + first.n_bytes:,}, the file at {size:,}; "
                f"{len(beyond):,} of its {len(reader.tensors):,} tensors end beyond it"
            )
        return {name: _value(field, arrays) for name, field in reader.fields.items()}, reader.tensors
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _value(field: gguf.ReaderField, arrays: bool) -> Any:
    """Return a field's content; an fp32 number as its shortest decimal (1e-05, not 9.99999975e-06)."""
    if field.types[0] == gguf.GGUFValueType.ARRAY and not arrays:
        return None
    value = field.contents()
    return float(str(np.float32(value))) if field.types[0] == gguf.GGUFValueType.FLOAT32 else value
