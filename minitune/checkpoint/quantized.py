"""4-bit weights as bitsandbytes writes them to safetensors, both ways, bit for bit.

Beside the weight NAME, uint8 (bytes, 1), lie its scales and maps, and the rest as JSON in a uint8 tensor:

    NAME.absmax         fp32 (blocks,); in double quantisation uint8 codes, and then also
    NAME.nested_absmax  fp32 (ceil(blocks / 256),)   and   NAME.nested_quant_map  fp32 (256,)
    NAME.quant_map      fp32 (16,)
    NAME.quant_state.bitsandbytes__nf4   (or __fp4)

A form of our own could do without the maps, 1 kB a weight, but nobody else could read it. Here the maps and every count
must be the ones that follow from kind and shape: a weight decoded by another map would be wrong without a word.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from minitune.codebooks import codebook, dynamic_map
from minitune.errors import CheckpointError, ConfigError
from minitune.ops.nf4 import NESTED_BLOCK, QuantizedTensor
from minitune.ops.quantization import BLOCK_SIZES

_STATE = "quant_state.bitsandbytes__"
_KINDS = {_STATE + "nf4": "nf4", _STATE + "fp4": "fp4"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def to_bitsandbytes(name: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Return what bitsandbytes saves of a 4-bit weight, by key.

    Args:
        name: the weight's full name, as "model.layers.0.mlp.up_proj.weight".
        weight: of kind nf4 or fp4; its tensors are not copied.

    Raises:
        ConfigError: it is of kind int8.
    """
    if weight.kind == "int8":
        raise ConfigError(f"{name} is int8; bitsandbytes' 4-bit form holds nf4 and fp4, so quantise it to one of these")
    offset = None if weight.offset is None else weight.offset.item()
    dtype = str(weight.dtype).removeprefix("torch.")
    fields = _fields(weight.kind, weight.block_size, dtype, list(weight.shape), offset)
    tensors = {"absmax": weight.absmax, "quant_map": codebook(weight.kind).clone()}  # tensors to save share no memory
    if weight.absmax is None:
        tensors["absmax"] = weight.absmax_codes
        tensors |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": dynamic_map(True).clone()}
    tensors[_STATE + weight.kind] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    return {name: weight.packed[:, None]} | {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def from_bitsandbytes(name: str, tensors: Mapping[str, torch.Tensor], where: str = "") -> QuantizedTensor:
    """Return the 4-bit weight `name` of a checkpoint; it has the tensors given, not copies.

    Args:
        name: the weight's full name.
        tensors: the checkpoint's, by key; those of other weights are passed over.
        where: stands before the name in errors.

    Raises:
        CheckpointError: a tensor is missing, damaged, unknown or not the one that the shape asks for.
    """
    parts = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    packed, name = tensors.get(name), where + name
    kind, fields = read_state(name, parts)
    nested = "nested_offset" in fields
    size, block_size = math.prod(fields["shape"]), fields["blocksize"]
    blocks = -(-size // block_size)
    wanted = {"absmax": (torch.uint8 if nested else torch.float32, blocks), "quant_map": codebook(kind)}
    if nested:
        groups = -(-blocks // NESTED_BLOCK)
        wanted |= {"nested_absmax": (torch.float32, groups), "nested_quant_map": dynamic_map(True)}
    _check_parts(name, parts, wanted)
    if packed is None or packed.nbytes != -(-size // 2) or not packed.is_contiguous():
        found = "missing" if packed is None else f"{packed.nbytes} bytes"
        raise CheckpointError(f"{name} is {found}, but its shape {fields['shape']} takes {-(-size // 2)} in 4 bits")
    scales = {"absmax": parts["absmax"]}
    if nested:
        offset = torch.tensor(fields["nested_offset"], device=packed.device)
        scales = {"absmax_codes": parts["absmax"], "nested_absmax": parts["nested_absmax"], "offset": offset}
    packed = packed.view(-1).view(torch.uint8)  # bitsandbytes can keep the bytes as numbers of another dtype
    return QuantizedTensor(packed, torch.Size(fields["shape"]), _DTYPES[fields["dtype"]], block_size, kind, **scales)


def read_state(name: str, parts: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Return a weight's kind and the fields of its JSON, each checked."""
    keys = [key for key in parts if key.startswith(_STATE)]
    if len(keys) != 1 or keys[0] not in _KINDS or parts[keys[0]].dtype != torch.uint8:
        raise CheckpointError(
            f"{name} has {', '.join(keys) or 'nothing'} for its state; it needs one uint8 tensor, {' or '.join(_KINDS)}"
        )
    key, kind = keys[0], _KINDS[keys[0]]
    try:
        fields = json.loads(parts[key].cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}.{key} is not JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(fields, dict) or not _valid(fields, kind):
        raise CheckpointError(
            f"{name}.{key} is not a state of a 4-bit weight that can be read here: {str(fields)[:200]}"
        )
    return kind, fields


def _fields(kind: str, block_size: Any, dtype: Any, shape: Any, offset: Any) -> dict[str, Any]:
    """Return the state's JSON; `offset` is None without double quantisation."""
    fields = {"quant_type": kind, "blocksize": block_size, "dtype": dtype, "shape": shape}
    if offset is not None:
        fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return fields


def _valid(fields: dict[str, Any], kind: str) -> bool:
    block_size, dtype, shape, offset = (fields.get(name) for name in ("blocksize", "dtype", "shape", "nested_offset"))
    return (
        fields == _fields(kind, block_size, dtype, shape, offset)
        and str(dtype) in _DTYPES
        and block_size in BLOCK_SIZES
        and isinstance(shape, list)
        and len(shape) > 0
        and all(type(size) is int and size > 0 for size in [*shape, block_size])
        and (offset is None or (type(offset) is float and abs(offset) < torch.finfo(torch.float32).max))
    )


def _check_parts(name: str, parts: Mapping[str, torch.Tensor], wanted: dict[str, Any]) -> None:
    """Raise CheckpointError unless the parts beside the state are `wanted`: tensors, or dtypes with counts."""
    found = {key for key in parts if key not in _KINDS}
    if found != wanted.keys():
        raise CheckpointError(f"{name} has the parts {sorted(found)} beside its state, which asks for {sorted(wanted)}")
    for key, value in wanted.items():
        part = parts[key]
        if isinstance(value, torch.Tensor):
            if part.dtype != value.dtype or not torch.equal(part.cpu(), value):
                raise CheckpointError(f"{name}.{key} is another map than bitsandbytes', which can't be read here")
        elif (part.dtype, part.shape) != (value[0], (value[1],)):
            raise CheckpointError(f"{name}.{key} is {list(part.shape)} {part.dtype} instead of [{value[1]}] {value[0]}")
        elif not torch.isfinite(part).all():
            raise CheckpointError(f"{name}.{key} holds a NaN or infinity; the checkpoint is damaged")
