"""GGUF files, llama.cpp's format: metadata, quantised tensors and rotary rows in another order.

The `gguf` package reads and dequantises. llama.cpp turns neighbouring elements (2i, 2i+1) as a pair where
Llama checkpoints turn (i, i + d/2), so its files hold the rows of q and k interleaved: within each head,
row 2i + j there is row i + j d/2 here. Tensors are dequantised a few rows at a time, into place.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape

from minitune.errors import CheckpointError
from minitune.gguf_io import read_file

CHUNK = 1 << 15  # elements dequantised at a time: stays in a core's cache, and torch copies it on one thread
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Metadata of a llama file -> field of config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
_TENSOR = re.compile(r"(?s)(?:blk\.(\d+)\.)?(.*?)\.?([^.]*)")  # block, module, weight or bias
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_SCALING = "rope.scaling.type"
_IDS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class QuantisedTensor:
    """Where one tensor lies in a GGUF file. `heads`: its rows are interleaved within that many heads."""

    file: Path
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    heads: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype; what a quantised tensor becomes is fp32."""
        return _PLAIN.get(self.kind.name, torch.float32)

    def read_into(self, destination: torch.Tensor) -> None:
        """Dequantise in fp32, a few rows at a time, into `destination`, of the same shape and of any dtype and device.

        Raises CheckpointError for a type that the gguf package cannot dequantise.
        """
        target = destination.detach().view(-1, self.shape[-1])  # a vector is one row
        rows, row_bytes = quant_shape_to_byte_shape(target.shape, self.kind)
        places, step = self._places(), max(1, CHUNK // self.shape[-1])
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            for start in range(0, rows, step):
                end = min(start + step, rows)
                raw = np.fromfile(stream, np.uint8, (end - start) * row_bytes).reshape(-1, row_bytes)
                try:
                    chunk = torch.from_numpy(dequantize(raw, self.kind).astype(np.float32, copy=False))
                except NotImplementedError:
                    raise CheckpointError(f"{self.file}: the type {self.kind.name} cannot be dequantised") from None
                if places is None:
                    target[start:end] = chunk
                else:
                    target.index_copy_(0, places[start:end].to(target.device), chunk.to(target.device, target.dtype))

    def _places(self) -> torch.Tensor | None:
        """Return where each row of the file belongs, None where all stay in place."""
        if self.heads is None:
            return None
        rows = torch.arange(self.shape[0]).view(self.heads, 2, -1)  # (heads, half, i)
        return rows.transpose(1, 2).flatten()  # row 2i + half of the file -> row i + half d/2


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, QuantisedTensor]]:
    """Return a llama GGUF file's content of `config.json` and its tensors under their Hugging Face names.

    Tensors that have no such name keep the file's own.

    Raises:
        CheckpointError: not GGUF, truncated, counts that cannot be, or an architecture or field not known here.
    """
    metadata, stored = read_file(path, arrays=False)
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in stored}
    fields = _config_fields(path, metadata, shapes)
    heads = {"attn_q": fields.get("num_attention_heads"), "attn_k": fields.get("num_key_value_heads")}
    tensors = {}
    for tensor in stored:
        block, stem, kind = _TENSOR.fullmatch(tensor.name).groups()
        name = f"{_MODULES[stem]}.{kind}" if stem in _MODULES else tensor.name
        name = f"model.layers.{block}.{name}" if block and stem in _MODULES else name
        place = path, tensor.tensor_type, shapes[tensor.name], tensor.data_offset
        tensors[name] = QuantisedTensor(*place, heads.get(stem))
    return fields, tensors


def _config_fields(path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the content of `config.json` that metadata and shapes amount to; refuse what it may not leave out."""
    family = metadata.get("general.architecture")
    if family != "llama":
        raise CheckpointError(f"{path}: architecture {family!r} is not supported in GGUF; supported: llama")
    values = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    unknown = sorted(set(values) - {*_FIELDS, *_HEAD_WIDTHS, _SCALING})
    if unknown:
        raise CheckpointError(
            f"{path}: the field llama.{unknown[0]} is not known to this engine and may change the model; "
            f"it is refused rather than ignored"
        )
    fields = {theirs: values[name] for name, theirs in _FIELDS.items() if name in values}
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    fields.setdefault("vocab_size", next(iter(shapes.get("token_embd.weight", ())), None))
    widths = {name: values[name] for name in _HEAD_WIDTHS if name in values}
    if len(set(widths.values())) > 1 or values.get(_SCALING, "none") != "none":
        raise CheckpointError(f"{path}: heads of several widths, or scaled rope, are not implemented: {widths}")
    return {
        "model_type": "llama",
        **fields,
        "head_dim": next(iter(widths.values()), None),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        **{theirs: metadata.get(f"tokenizer.ggml.{ours}") for ours, theirs in _IDS.items()},
        "eos_token_id": [metadata[name] for name in _STOPS if name in metadata],
    }
