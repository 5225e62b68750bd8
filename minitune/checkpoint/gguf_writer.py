"""GGUF out: a model and its tokenizer as one file that llama.cpp and transformers read.

Matrices are stored in the dtype asked for, vectors and learned positions in fp32, as llama.cpp's own converter does.
Q8_0 is round(w / d) in 8 bits with one fp16 scale d = max |w| / 127 for each 32 elements of a row; what was read from
Q8_0 comes out in the same bits, since its largest code is 127 again.

A file is read back before it gets its name: what it says of model and tokenizer must be what was written. To ask each
value of a config whether GGUF has a key for it was rejected: that list is wrong on the day a family gets a new value.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize

from minitune.checkpoint.gguf import Layout, file_name, layout_of, open_gguf
from minitune.checkpoint.gguf_metadata import ARCHITECTURES, STOPS, architecture_of, lost, write_values
from minitune.errors import CheckpointError, ConfigError, nearest
from minitune.files import atomic_file
from minitune.model.config import ModelConfig
from minitune.model.lora import lora_modules, quantized_weights
from minitune.model.transformer import Transformer

Kind = gguf.GGMLQuantizationType
KINDS = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {Kind.F32: gguf.LlamaFileType.ALL_F32, Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
               Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16, Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0}  # fmt: skip
_BLOCK = 32  # elements of a row that share a scale in Q8_0


def save_gguf(
    model: Transformer, tokenizer: Any | None, path: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write a model as one GGUF file, in one atomic step.

    Args:
        model: its adapters must have been merged, its weights not quantised.
        tokenizer: a `minitune.text` tokenizer, written with its chat template; None for a file without one.
        path: the file, which ends in .gguf.
        dtype: of the matrices: "float32", "float16", "bfloat16" or "q8_0"; None is the model's own.
        overwrite: whether to replace a file that is there.

    Returns:
        What a reader of the file will do differently, a line each.

    Raises:
        CheckpointError: a file is there already, an adapter is not merged, weights do not fit the dtype, or model or
            tokenizer have something that GGUF cannot say.
        OSError: the disk is full; what was there before is untouched.
    """
    path, config = Path(path), model.config
    kind = _kind(dtype or str(model.dtype).removeprefix("torch."))
    check_gguf_output(path, overwrite=overwrite)
    _check_model(model)
    weights = model.state_dict()
    kinds = {name: _stored_as(name, weight, kind) for name, weight in weights.items()}
    uneven = [f"{name} {tuple(weights[name].shape)}" for name in weights if kinds[name] == Kind.Q8_0
              and weights[name].shape[-1] % _BLOCK]  # fmt: skip
    if uneven:
        raise CheckpointError(f"q8_0 takes rows of a multiple of {_BLOCK}: {'; '.join(uneven)}; use bfloat16")
    values, vectors = write_values(config)
    metadata = {"general.type": "model", "general.file_type": int(_FILE_TYPES[kind]), "general.quantization_version": 2,
                **{f"{architecture_of(config)}.{key}": value for key, value in values.items()},
                **_vocabulary(config, tokenizer)}  # fmt: skip
    extra = {name: torch.tensor(vector) for name, vector in vectors.items()}
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture_of(config))
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            stored = [(file_name(config, name), weight, kinds[name], layout_of(config, name), name)
                      for name, weight in weights.items()]  # fmt: skip
            stored += [(name, vector, Kind.F32, Layout(), name) for name, vector in extra.items()]
            _write(writer, stored)
        finally:
            writer.close()
        return _differences(config) + _check_written(temporary, config, tokenizer)


def check_gguf_output(path: str | Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where `save_gguf` would refuse the path."""
    path = Path(path)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: the name of a GGUF file must end in .gguf")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; choose another, or add --overwrite")


def _kind(name: str) -> gguf.GGMLQuantizationType:
    if name not in KINDS:
        raise ConfigError(f"dtype {name!r} cannot be written to GGUF; known: {', '.join(KINDS)}{nearest(name, KINDS)}")
    return KINDS[name]


def _check_model(model: Transformer) -> None:
    """Raise CheckpointError for a model that is not plain weights of a language model, or that llama.cpp misreads."""
    if lora_modules(model):
        raise CheckpointError("the model has an adapter; merge it first")
    if quantized_weights(model):
        raise CheckpointError("the model's weights are quantised; load it without quantize to write GGUF")
    if model.config.reward:
        raise CheckpointError("a reward model cannot be written to GGUF, which has heads over the vocabulary only")
    if model.config.family == "gemma2" and not any(model.config.windows):
        raise CheckpointError("llama.cpp knows Gemma 2 with a window only; export a Hugging Face folder")
    tied = ARCHITECTURES[architecture_of(model.config)].tied
    if tied not in (None, model.config.tie_embeddings):
        kinds = ("untied from", "tied to")
        raise CheckpointError(
            f"the head is {kinds[not tied]} the embedding, but llama.cpp reads every {model.config.family} model as "
            f"{kinds[tied]} it; export a Hugging Face folder"
        )


def _stored_as(name: str, weight: torch.Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    return kind if weight.dim() > 1 and not name.startswith("model.embed_positions") else Kind.F32


def _vocabulary(config: ModelConfig, tokenizer: Any | None) -> dict[str, Any]:
    """Return the keys of the tokenizer; without one, the special ids that the config knows."""
    if tokenizer is not None:
        from minitune.text.gguf_vocabulary import gguf_vocabulary  # which loads tokenizers

        return gguf_vocabulary(tokenizer, config.vocab_size)
    if len(config.eos_ids) > len(STOPS):
        raise CheckpointError(f"{len(config.eos_ids)} tokens end a text; GGUF has keys for {len(STOPS)}")
    ids = {"bos_token_id": config.bos_id, "padding_token_id": config.pad_id}
    ids |= dict(zip(STOPS, config.eos_ids, strict=False))
    return {f"tokenizer.ggml.{key}": id for key, id in ids.items() if id is not None and id >= 0}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp expects of its value."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}  # fmt: skip
    kinds[type(value)](key, value)


def _write(writer: gguf.GGUFWriter, stored: list[tuple]) -> None:
    """Write the header, then each tensor: only one is converted at a time."""
    for name, weight, kind, _, _ in stored:
        shape = quant_shape_to_byte_shape(tuple(weight.shape), kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight, kind, layout, ours in stored:
        writer.write_tensor_data(_encode(weight, kind, layout, ours))


def _encode(weight: torch.Tensor, kind: gguf.GGMLQuantizationType, layout: Layout, name: str) -> np.ndarray:
    """Return a weight's bytes in the file, as uint8."""
    value = weight.detach().to("cpu", torch.float32)
    places = layout.places(len(value))
    value = (value if places is None else value[places]) + layout.offset
    plain = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    value = value.to(plain.get(kind, torch.float32)).contiguous()
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{name} is not finite in {kind.name}; nothing was written, use another dtype")
    if kind == Kind.Q8_0:
        return quantize(value.numpy(), kind)
    return value.view(torch.uint8).numpy()


def _differences(config: ModelConfig) -> list[str]:
    """Return what llama.cpp does otherwise with a file of this model, a line each."""
    notes = []
    window = min((one for one in config.windows if one), default=config.max_positions)
    if config.family == "phi3" and window < config.max_positions:
        notes.append(f"llama.cpp reads Phi-3 without its window: texts of over {window} tokens get other answers")
    if config.rope is not None and config.rope.kind == "longrope":
        trained = config.rope.original_positions or config.max_positions
        notes.append(
            f"llama.cpp takes longrope's long factors for every text once its context (-c) is over {trained} "
            f"tokens; keep -c at {trained} for texts that fit"
        )
    return notes


def _check_written(path: Path, config: ModelConfig, tokenizer: Any | None) -> list[str]:
    """Raise CheckpointError where the file does not say what was written; return what its readers do differently."""
    missing = lost(config, ModelConfig.from_hf(open_gguf(path)[0], str(path)))
    if missing:
        name = architecture_of(config)
        raise CheckpointError(f"GGUF's architecture {name} cannot say {'; '.join(missing)}; export a folder instead")
    if tokenizer is None:
        return []
    from minitune.text.gguf_vocabulary import WORDS
    from minitune.text.tokenizer import load_tokenizer

    again = load_tokenizer(path)
    facts = [(each.encode(WORDS), set(each.end_ids), each.pad_id, each.bos_id, each.settings.get("chat_template") or "")
             for each in (tokenizer, again)]  # fmt: skip
    if facts[0] != facts[1]:
        raise CheckpointError(f"{tokenizer.origin}: read from GGUF this tokenizer is another one; export a folder")
    apart = f" a{next(iter(tokenizer.control_ids), '')}b"
    if tokenizer.encode(apart, control=True) != again.encode(apart, control=True):
        return ["readers of GGUF put a space before a text that begins with one, and after each control token; this "
                "tokenizer does not"]  # fmt: skip
    return []
