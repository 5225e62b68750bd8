"""GGUF files, llama.cpp's format: metadata, quantised tensors, and rows, norms and ropes written in other ways.

The `gguf` package reads and dequantises. llama.cpp turns neighbouring elements (2i, 2i+1) as a pair where most
checkpoints turn (i, i + d/2); of some architectures its files hold the rows of q and k interleaved for that: within
each head, row 2i + j there is row i + j d/2 here. Gemma's norms are stored as 1 + w, GPT-NeoX's fused q, k and v as
[q; k; v]. Tensors are dequantised a few rows at a time, into place.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape

from minitune.checkpoint.gguf_metadata import (
    ARCHITECTURES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    architecture_of,
    read_fields,
)
from minitune.errors import CheckpointError
from minitune.gguf_io import read_file
from minitune.model.config import ModelConfig

CHUNK = 1 << 15  # elements dequantised at a time: stays in a core's cache, and torch copies it on one thread
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VECTOR = 1 << 16  # elements that a vector of the metadata may have
_PARAMETER = re.compile(r"(?s)(model\.layers\.(\d+)\.)?(.*)\.(\w+)")  # of ours: layer, module, weight or bias
_TENSOR = re.compile(r"(?s)(blk\.(\d+)\.)?(.*)\.(\w+)")  # of the file: the same
_MODULES = {  # ours -> the file's
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_NORMS = {  # by where they stand
    "before": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "after": _AFTER,
    "around": {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm", **_AFTER},
}


@dataclass(frozen=True)
class Layout:
    """How a file holds a tensor of ours.

    Our rows are seen as (first, second, rest), and the file's have `axis` and the one after it swapped; `offset` is
    what the file's values have on top of ours.
    """

    first: int = 1
    second: int = 1
    axis: int = 0
    offset: float = 0.0

    def places(self, rows: int) -> torch.Tensor | None:
        """Return for each row of the file which one it is here: (rows,); None where all stay in place."""
        if self.first == self.second == 1:
            return None
        return torch.arange(rows).view(self.first, self.second, -1).transpose(self.axis, self.axis + 1).flatten()


@dataclass(frozen=True)
class QuantisedTensor:
    """Where one tensor lies in a GGUF file, and how."""

    file: Path
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    layout: Layout = Layout()

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype; what a quantised tensor becomes is fp32."""
        return _PLAIN.get(self.kind.name, torch.float32)

    def read_into(self, destination: torch.Tensor) -> None:
        """Dequantise in fp32, a few rows at a time, into `destination`, of the same shape and of any dtype and device.

        Raises CheckpointError for a type that the gguf package cannot dequantise.
        """
        places = self.layout.places(self.shape[0])
        # A vector is one row, or, where its elements change places, a column.
        target = destination.detach().view(-1, 1 if places is not None and len(self.shape) == 1 else self.shape[-1])
        rows, row_bytes = quant_shape_to_byte_shape(target.shape, self.kind)
        step = max(1, CHUNK // target.shape[-1])
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            for start in range(0, rows, step):
                end = min(start + step, rows)
                raw = np.fromfile(stream, np.uint8, (end - start) * row_bytes).reshape(-1, row_bytes)
                try:
                    chunk = torch.from_numpy(dequantize(raw, self.kind).astype(np.float32, copy=False))
                except NotImplementedError:
                    raise CheckpointError(f"{self.file}: the type {self.kind.name} cannot be dequantised") from None
                if self.layout.offset:
                    chunk = chunk - self.layout.offset
                if places is None:
                    target[start:end] = chunk
                else:
                    target.index_copy_(0, places[start:end].to(target.device), chunk.to(target.device, target.dtype))


def open_gguf(path: Path, *, whole: bool = True) -> tuple[dict[str, Any], dict[str, QuantisedTensor]]:
    """Return a GGUF file's content of `config.json` and its tensors under our names, which are Hugging Face's for most.

    Tensors that have no such name keep the file's own. With `whole` false, some may lie beyond the file's end.

    Raises:
        CheckpointError: not GGUF, truncated, counts that cannot be, or an architecture or field not known here.
        ConfigError: metadata that amounts to no model.
    """
    metadata, stored = read_file(path, arrays=False, whole=whole)
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in stored}
    size, ends = path.stat().st_size, {item.name: item.data_offset + item.n_bytes for item in stored}
    places = {item.name: (path, item.tensor_type, shapes[item.name], item.data_offset) for item in stored}

    def vector(name: str) -> list[float]:
        if name not in places or len(shapes[name]) != 1 or shapes[name][0] > _VECTOR or ends[name] > size:
            raise CheckpointError(f"{path}: {name} is missing, beyond the file's end or no vector: {shapes.get(name)}")
        values = torch.empty(shapes[name])
        QuantisedTensor(*places[name]).read_into(values)
        return [float(str(value)) for value in values.numpy()]  # the shortest decimals

    fields = read_fields(metadata, shapes, vector, str(path))
    config = ModelConfig.from_hf(fields, str(path))
    names = {theirs: ours for ours, theirs in _modules(config).items()}
    tensors = {}
    for theirs, place in places.items():
        if config.rope and theirs in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue  # part of the config
        ours = _renamed(theirs, _TENSOR, "model.layers.{}.", names)
        tensors[ours] = QuantisedTensor(*place, layout_of(config, ours))
    return fields, tensors


def file_name(config: ModelConfig, name: str) -> str:
    """Return a GGUF file's name of the parameter that we call `name`."""
    return _renamed(name, _PARAMETER, "blk.{}.", _modules(config))


def layout_of(config: ModelConfig, name: str) -> Layout:
    """Return how a GGUF file holds the parameter that we call `name`."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module.endswith("norm"):
        return Layout(offset=config.norm_offset)
    if module == "qkv_proj" and config.fused == "by_head":
        return Layout(config.num_heads, 3, 0)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    if module in heads and ARCHITECTURES[architecture_of(config)].interleaved:
        return Layout(heads[module], 2, 1)
    return Layout()


def _modules(config: ModelConfig) -> dict[str, str]:
    """Return our name of each module a model may have -> the file's."""
    names = _MODULES | _NORMS[config.norm_placement]
    if config.fused == "stacked" and config.gated:  # gate and up are one tensor, with the name of up
        del names["mlp.up_proj"]
        names["mlp.gate_up_proj"] = "ffn_up"
    return names


def _renamed(name: str, pattern: re.Pattern, layer: str, modules: dict[str, str]) -> str:
    """Return `name` in the other style; unchanged where it has no counterpart there."""
    match = pattern.fullmatch(name)
    if match is None or match[3] not in modules:
        return name
    prefix = layer.format(match[2]) if match[1] else ""
    return f"{prefix}{modules[match[3]]}.{match[4]}"
