"""GGUF files, llama.cpp's format: metadata, quantised tensors and rotary rows in another order.

The `gguf` package reads and dequantises. llama.cpp turns neighbouring elements (2i, 2i+1) as a pair where
Llama checkpoints turn (i, i + d/2), so its files hold the rows of q and k interleaved: within each head,
row 2i + j there is row i + j d/2 here. Tensors are dequantised a few rows at a time, into place.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape

from minitune.errors import CheckpointError
from minitune.text.gguf_reader import open_reader

CHUNK = 1 << 15  # elements dequantised at a time: stays in a core's cache, and torch copies it on one thread
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Metadata of a llama file -> field of config.json; None for those that are checked below.
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
    "attention.key_length": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.scaling.type": None,
}
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_IDS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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
        """Dequantise in fp32 into `destination`, of the same shape and of any dtype and device."""
        target = destination.detach()
        place = self._places()
        for start, rows in self._chunks():
            chunk, end = torch.from_numpy(rows), start + len(rows)
            if place is None:
                target[start:end] = chunk
            else:
                target.index_copy_(0, place[start:end].to(target.device), chunk.to(target.device, target.dtype))

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows as fp32) a few rows at a time; a vector's elements are its rows."""
        row_shape = quant_shape_to_byte_shape(self.shape if len(self.shape) > 1 else (1, *self.shape), self.kind)
        rows = self.shape[0] if len(self.shape) > 1 else 1
        step = max(1, CHUNK // self.shape[-1])
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(stream, np.uint8, count * row_shape[-1]).reshape(count, row_shape[-1])
                try:
                    values = dequantize(raw, self.kind).astype(np.float32, copy=False)
                except NotImplementedError:
                    raise CheckpointError(f"{self.file}: the type {self.kind.name} cannot be dequantised") from None
                yield start, values if len(self.shape) > 1 else values[0]

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
    metadata, tensors = _read(path)
    fields = _config_fields(path, metadata, tensors)
    heads = {"attn_q": fields.get("num_attention_heads"), "attn_k": fields.get("num_key_value_heads")}
    return fields, {
        _hf_name(name): replace(tensor, heads=heads.get(name.split(".")[-2] if "." in name else ""))
        for name, tensor in tensors.items()
    }


def _value(field: gguf.ReaderField) -> Any:
    """Return a field's value, None for an array; an fp32 one as its shortest decimal (1e-05, not 9.99999975e-06)."""
    if field.types[0] == gguf.GGUFValueType.ARRAY:
        return None
    value = field.contents()
    return float(str(np.float32(value))) if field.types[0] == gguf.GGUFValueType.FLOAT32 else value


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor; its own where it has none."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}" if block and block[2] in _BLOCK else name


def _config_fields(path: Path, metadata: dict[str, Any], tensors: dict[str, QuantisedTensor]) -> dict[str, Any]:
    """Return the content of `config.json` that the metadata amounts to; refuse what it may not leave out."""
    family = metadata.get("general.architecture")
    if family != "llama":
        raise CheckpointError(f"{path}: architecture {family!r} is not supported in GGUF; supported: llama")
    values = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    unknown = sorted(set(values) - set(_FIELDS))
    if unknown:
        raise CheckpointError(
            f"{path}: the field llama.{unknown[0]} is not known to this engine and may change the model; "
            f"it is refused rather than ignored"
        )
    fields = {theirs: values[name] for name, theirs in _FIELDS.items() if theirs and name in values}
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    if "token_embd.weight" in tensors:
        fields.setdefault("vocab_size", next(iter(tensors["token_embd.weight"].shape), None))
    widths = {name: values[name] for name in _HEAD_WIDTHS if name in values}
    if len(set(widths.values())) > 1 or values.get("rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path}: heads of several widths, or scaled rope, are not implemented: {widths}")
    return {
        "model_type": "llama",
        **fields,
        "head_dim": next(iter(widths.values()), None),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **{theirs: metadata.get(f"tokenizer.ggml.{ours}") for ours, theirs in _IDS.items()},
        "eos_token_id": [metadata[name] for name in _STOPS if name in metadata],
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, QuantisedTensor]]:
    """Return the metadata and the tensors under the file's own names."""
    reader = open_reader(path)
    try:
        metadata = {name: _value(field) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from None
    return metadata, {
        tensor.name: QuantisedTensor(path, tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset)
        for tensor in reader.tensors
    }
