"""Hugging Face folders: `config.json`, safetensors in one file or in shards with an index, tokenizer files.

Every path in an index stays inside its folder, links included; pickle files are refused, since loading
one runs whatever code it holds.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.prequantized import expand, settings_of
from minitune.errors import CheckpointError
from minitune.files import atomic_folder, read_json, write_json
from minitune.model.lora import lora_modules, quantized_weights
from minitune.model.names import checkpoint_name, is_transposed
from minitune.model.transformer import Transformer
from minitune.ops.nf4 import QuantizedTensor
from minitune.safetensors_io import StoredTensor, read_header, write_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WRITTEN = {".json", ".safetensors", ".jinja", ".model"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the content of a folder's `config.json`, with every stop id, and its tensors by name.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or outside the folder.
    """
    return read_config(folder), read_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`, with every stop id; CheckpointError where it cannot be read."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter, not a model; give its base as the model, this as the adapter")
    fields = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        stops = [*_as_list(fields.get("eos_token_id")), *_as_list(read_json(generation).get("eos_token_id"))]
        fields["eos_token_id"] = list({json.dumps(stop): stop for stop in stops}.values())
    return fields


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return a folder's tensors by name, none of them read yet; CheckpointError as in `open_folder`."""
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / SINGLE).is_file():
        return read_header(_inside(folder, SINGLE))
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}")


def refuse_pickle(file: Path) -> None:
    """Raise CheckpointError where a file's name says that it is a pickle."""
    if file.suffix in _PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which runs code when loaded; it is refused, convert it to safetensors"
        )


def _as_list(ids: Any) -> list:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors that an index names, each from the shard it names."""
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must be an object of tensor name -> file name")
    files = {shard: _inside(folder, shard) for shard in sorted(set(names.values()))}
    absent = [shard for shard, file in files.items() if not os.path.isfile(file)]  # pathlib's raises for long names
    if absent:
        raise CheckpointError(f"{folder} lacks shards that {INDEX} names: {', '.join(absent)}; fetch them again")
    shards = {shard: read_header(file) for shard, file in files.items()}
    absent = [name for name, shard in names.items() if name not in shards[shard]]
    if absent:
        raise CheckpointError(f"{folder / names[absent[0]]} lacks {absent[0]}, which {INDEX} says is there")
    tensors: dict[str, StoredTensor] = {}
    for shard, content in shards.items():
        twice = tensors.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{folder / shard}: {min(twice)} is in two shards")
        tensors |= content
    return tensors


def _inside(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder`; CheckpointError where it, or what it links to, is elsewhere.

    The hub's own cache is the exception: there `snapshots/REVISION/FILE` links to `blobs/` of the same repository.
    """
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve()
    except (ValueError, OSError, RuntimeError):  # a zero byte, too long, a circle of links
        raise CheckpointError(f"{folder}: {name[:80]!r} cannot be a file's name") from None
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if ".." in Path(name).parts or not (real.is_relative_to(home) or in_cache):
        raise CheckpointError(f"{folder}: the file {name!r} leads outside the folder; it is refused")
    return path


def save_model(
    model: Transformer,
    tokenizer: Any | None,
    folder: str | Path,
    *,
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder that transformers reads, in one atomic step.

    Args:
        model: its adapters must have been merged.
        tokenizer: a `minitune.text` tokenizer, saved with its chat template; None for a folder without one.
        folder: where to; see `overwrite`.
        max_shard_bytes: above this the weights are split over files with an index.
        overwrite: whether to replace a folder that is there.

    Raises:
        CheckpointError: the folder is there already, or the model has an unmerged adapter.
        OSError: the disk is full; what was in `folder` before is untouched.
    """
    if lora_modules(model):
        raise CheckpointError("the model has an adapter; merge it first, or save the adapter alone (save_adapter)")
    config = {**model.config.to_hf(), "torch_dtype": str(model.dtype).removeprefix("torch.")}
    weights = quantized_weights(model)
    quantized = {f"{path}.weight": replace(weight, dtype=model.dtype) for path, weight in weights.items()}
    if quantized:
        config["quantization_config"] = settings_of(quantized.values(), model.dtype)
    stops = list(dict.fromkeys([*model.config.eos_ids, *(tokenizer.end_ids if tokenizer else ())]))
    generation = {"bos_token_id": model.config.bos_id, "eos_token_id": stops, "pad_token_id": model.config.pad_id}
    if model.config.reward and model.config.pad_id in stops:
        # transformers takes the last token that is not padding; were that the end of a turn, it would take another.
        config["pad_token_id"] = None
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])})
        _write_shards(temporary, _stored_tensors(model, quantized), max_shard_bytes)


def _stored_tensors(model: Transformer, quantized: dict[str, QuantizedTensor]) -> dict[str, torch.Tensor]:
    """Return what the files hold: tensors by the family's names, GPT-2's as (in, out) unless they are quantised."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        tensors[checkpoint_name(config, name)] = tensor.mT if is_transposed(config, name) else tensor
    return tensors | {checkpoint_name(config, name): tensor for name, tensor in expand(quantized).items()}


def check_output(folder: str | Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where `save_model` would refuse `folder`, or would replace what is not a model."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder for the exported model")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{folder} exists already and is not empty; choose another, or add --overwrite")
        strange = [file.name for file in folder.iterdir() if file.is_dir() or file.suffix not in _WRITTEN]
        if strange or not (folder / "config.json").is_file():
            found = strange[0] if strange else "no config.json"
            raise CheckpointError(f"{folder} is not only an exported model ({found}); it is not overwritten")


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    """Write `tensors` in their order, in as few files as `limit` bytes each allow."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(part.nbytes for part in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard)
