"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the tensors of module M `base_model.model.M.lora_A.weight` (R, in), `.lora_B.weight` (out, R) and in DoRA
`.lora_magnitude_vector` (out,), M being the module's name in the family's checkpoints. Beside them stand parameters of
the base that were trained whole (`modules_to_save`, `bias`), under their own names; an adapted layer's bias is its
`.base_layer.bias`. What trains is what is saved: no list of those is kept besides.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.adapter_config import CONFIG, HEADS, layer_settings, read_config, within, write_fields
from minitune.checkpoint.fit import all_finite as all_finite  # these are used elsewhere too
from minitune.checkpoint.fit import check_fit as check_fit
from minitune.checkpoint.fit import fail_listing as fail_listing
from minitune.checkpoint.fit import misfits as misfits
from minitune.checkpoint.huggingface import refuse_pickle
from minitune.checkpoint.prequantized import configuration
from minitune.errors import CheckpointError, ConfigError
from minitune.files import atomic_file, write_json
from minitune.model.adapter_set import add_named
from minitune.model.adapters import LoRA
from minitune.model.config import LoRAConfig, ModelConfig, QuantizationConfig
from minitune.model.lora import install, linear_modules, make_adapters, quantized_weights
from minitune.model.names import checkpoint_name, is_transposed
from minitune.model.transformer import Transformer, add_score_head
from minitune.model.vocabulary import grow_vocabulary, train_rows, trained_rows, untie_head
from minitune.safetensors_io import StoredTensor, read_header, read_metadata, write_tensors

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_SCORE = f"{_PREFIX}score.weight"  # of a reward model: PEFT's `modules_to_save`
# In the file's metadata, since PEFT's config has no field for them: how the base was kept, which rows were trained.
_BASE, _ROWS = "minitune.base_quantization", "minitune.trained_rows"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk that was found to fit a model; no weight has been read."""

    folder: Path
    fields: dict[str, Any]
    layers: dict[str, LoRAConfig]
    """Settings by the path of the layer."""
    beside: dict[str, str]
    """Parameters of the base that it brings, our name -> the file's; those of a tied head share the embedding's."""
    tensors: dict[str, StoredTensor]

    @property
    def reward(self) -> bool:
        """Whether it brings a reward head."""
        return _SCORE in self.tensors

    def read(self) -> dict[str, torch.Tensor]:
        """Return all tensors as they are stored; CheckpointError naming those that are not finite."""
        values = {name: tensor.read() for name, tensor in self.tensors.items()}
        bad = [f"{name} holds a NaN or infinity" for name, value in values.items() if not all_finite(value.float())]
        fail_listing(f"{self.folder} is from a run that diverged", bad)
        return values


def load_adapter(model: Transformer, folder: str | Path, base_name: str | None = None) -> LoRAConfig:
    """Add the adapter in `folder` to `model`, in place, and return what most of its layers have.

    Its parameters are trainable afterwards, those of the base that it brings included, and no others. That of a reward
    model brings its head; one with more embedding rows makes the vocabulary as large.

    Args:
        model: the base.
        folder: in PEFT's format.
        base_name: what the base was loaded as; a warning says where the adapter was trained on one of another name.

    Raises:
        CheckpointError: a file is missing or damaged, a field of the config is not implemented, or tensors do not
            fit this model; the model is unchanged then.
        ConfigError: the model has an adapter already.
    """
    stored = open_adapter(model, folder)
    if base_name is not None:
        _compare_names(stored, base_name)
    values = stored.read()
    _check_tied(model, stored, values)
    config = model.config  # as it was when the names were made
    added = install(model, stored.layers)
    _put_factors(added, values, config)
    if stored.reward:
        add_score_head(model)
        model.score.weight.data.copy_(values[_SCORE])
    _put_beside(model, stored, values)
    return _typical(stored)


def load_adapters(model: Transformer, folders: Mapping[str, str | Path], base_name: str | None = None) -> None:
    """Add several adapters to `model`, in place, each under its name; the first is chosen (`model/adapter_set.py`).

    Raises:
        CheckpointError: as `load_adapter`; and for one that brings more than updates of layers (embeddings, biases, a
            reward head), of which the base has one. ConfigError: a name without meaning.
    """
    found = {name: open_adapter(model, folder) for name, folder in folders.items()}
    for stored in found.values():
        if stored.beside or stored.reward:
            what = next(iter([*stored.beside, "score"]))
            raise CheckpointError(f"{stored.folder} brings its own {what}; such an adapter is loaded alone")
    read = {name: stored.read() for name, stored in found.items()}
    for name, stored in found.items():
        if base_name is not None:
            _compare_names(stored, base_name)
        adapters = make_adapters(model, stored.layers)
        _put_factors(adapters, read[name], model.config)
        add_named(model, name, adapters)


def open_adapter(model: Transformer, folder: str | Path) -> StoredAdapter:
    """Return what `folder` holds, once it is known to fit `model`; CheckpointError as `load_adapter`."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        inner = folder / "adapter"
        instead = f"; give {inner}" if (inner / CONFIG).is_file() else "; give an adapter's folder, as training writes"
        raise CheckpointError(f"{folder} holds no {CONFIG}{instead}")
    fields = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        for file in sorted(folder.iterdir()):
            refuse_pickle(file)
    tensors = read_header(folder / WEIGHTS)
    if not tensors:
        raise CheckpointError(f"{folder} is not an adapter of this model: it holds no tensors of one")
    _check_head(model, fields, tensors, folder)
    paths = {checkpoint_name(model.config, path): path for path in linear_modules(model)}
    found = (re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", name) for name in tensors)
    present = dict.fromkeys(match[1] for match in found if match and match[1] in paths)
    settings = layer_settings(fields, list(paths), present, folder / CONFIG)
    layers = {paths[name]: one for name, one in settings.items()}
    pissa = [path for path in layers if path in quantized_weights(model) and layers[path].init != "kaiming"]
    if pissa:
        raise CheckpointError(f"{folder / CONFIG}: init_lora_weights 'pissa' needs a base that is not quantised")
    beside = _beside(model, fields, layers, tensors)
    stored = StoredAdapter(folder, fields, layers, beside, tensors)
    fail_listing(f"{folder} is not an adapter of this model", _problems(model, stored))
    return stored


def _typical(stored: StoredAdapter) -> LoRAConfig:
    """Return the settings of most layers, with all their paths as targets."""
    settings = list(stored.layers.values())
    return dataclasses.replace(max(settings, key=settings.count), target_modules=tuple(stored.layers))


def _compare_names(stored: StoredAdapter, base_name: str) -> None:
    """Warn where the adapter names another base: shapes alone do not tell one fine-tune from another."""
    named = stored.fields.get("base_model_name_or_path")
    last = [re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower() for name in (named, base_name)]
    if named and last[0] != last[1]:
        print(f"{stored.folder} says that its base is {named}; it is put on {base_name} now", file=sys.stderr)


def _check_head(model: Transformer, fields: dict[str, Any], tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Raise CheckpointError where file, config and model do not agree on whether there is a reward head."""
    saved = "score" in (fields.get("modules_to_save") or ())
    scores = {_SCORE in tensors, saved, fields.get("task_type") == "SEQ_CLS"}
    if len(scores) > 1 or model.config.reward and scores == {False}:
        raise CheckpointError(
            f"{folder} has no reward head (score), or its config says otherwise; give another adapter"
        )


def _beside(
    model: Transformer, fields: dict[str, Any], layers: dict[str, LoRAConfig], tensors: dict[str, StoredTensor]
) -> dict[str, str]:
    """Return the parameters that the config says were trained beside the layers' adapters: our name -> the file's.

    Embedding and head are saved without being named where a vocabulary has grown.
    """
    config, bias = model.config, fields.get("bias") or "none"
    modules = [name for name in fields.get("modules_to_save") or () if name not in HEADS]
    names = [name for name, _ in model.named_parameters() if ".lora." not in name and name != "score.weight"]
    found = {}
    for name in [*names, *([_HEAD] if config.tie_embeddings and not config.reward else [])]:
        theirs, path = checkpoint_name(config, name), name.rpartition(".")[0]
        is_bias = name.endswith(".bias") and (bias == "all" or bias == "lora_only" and path in layers)
        grown = name in (_EMBEDDING, _HEAD) and f"{_PREFIX}{theirs}" in tensors
        if is_bias and path in layers:
            found[name] = f"{_PREFIX}{theirs.removesuffix('bias')}base_layer.bias"
        elif is_bias or grown or within(theirs, modules):
            found[name] = f"{_PREFIX}{theirs}"
    shared = fields.get("ensure_weight_tying") and config.tie_embeddings
    return found | ({_HEAD: f"{_PREFIX}{checkpoint_name(config, _HEAD)}"} if shared and _EMBEDDING in found else {})


def _problems(model: Transformer, stored: StoredAdapter) -> list[str]:
    """Return a line for each tensor that is missing, left over or misshapen."""
    config, tensors = model.config, stored.tensors
    expected = {_SCORE: (1, config.hidden_size)} if stored.reward else {}
    for path, one in stored.layers.items():
        out_features, in_features = linear_modules(model)[path].weight.shape
        shapes = {"A": (one.rank, in_features), "B": (out_features, one.rank)}
        shapes |= {"magnitude": (out_features,)} if one.dora else {}
        expected |= {_file_name(config, path, part): shape for part, shape in shapes.items()}
    own = dict(model.named_parameters())
    rows = max([config.vocab_size, *(tensors[name].shape[0] for name in _tables(stored) if name in tensors)])
    for name, theirs in stored.beside.items():
        shape = tuple(own[_EMBEDDING if name == _HEAD and config.tie_embeddings else name].shape)
        shape = (rows, *shape[1:]) if name in (_EMBEDDING, _HEAD) else shape
        expected[theirs] = shape[::-1] if is_transposed(config, name) else shape
    problems = misfits(expected, tensors)
    tables = {_EMBEDDING} if config.tie_embeddings and _HEAD not in stored.beside else {_EMBEDDING, _HEAD}
    if rows > config.vocab_size and not tables <= stored.beside.keys():
        problems.append(f"its vocabulary has {rows} tokens instead of {config.vocab_size}, for embedding or head alone")
    return problems


def _tables(stored: StoredAdapter) -> list[str]:
    return [stored.beside[name] for name in (_EMBEDDING, _HEAD) if name in stored.beside]


def _file_name(config: ModelConfig, path: str, part: str) -> str:
    """Return the file's name of a part ("A", "B", "magnitude") of the adapter of the layer at `path`."""
    return f"{_PREFIX}{checkpoint_name(config, path)}.{_PARTS[part]}"


@torch.no_grad()
def _put_factors(added: dict[str, LoRA], values: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Fill the adapters from the file's tensors."""
    for path, lora in added.items():
        for part, parameter in lora.named_parameters():
            parameter.copy_(values[_file_name(config, path, part)])


@torch.no_grad()
def _put_beside(model: Transformer, stored: StoredAdapter, values: dict[str, torch.Tensor]) -> None:
    """Put the base's parameters that the adapter brings in their places, and let them train."""
    if _unties(model, stored):
        untie_head(model)
    if _tables(stored):
        grow_vocabulary(model, max(len(values[name]) for name in _tables(stored)))
    if rows := _trained_rows(stored, model.config.vocab_size):
        train_rows(model, rows)
    own = dict(model.named_parameters())
    for name, theirs in stored.beside.items():
        if name in own:
            own[name].copy_(values[theirs].mT if is_transposed(model.config, name) else values[theirs])
            own[name].requires_grad_(True)


def _trained_rows(stored: StoredAdapter, vocabulary: int) -> list[int]:
    """Return which rows of the tables the adapter was trained in, as its file says; nothing where all were."""
    path = stored.folder / WEIGHTS
    try:
        rows = json.loads(read_metadata(path).get(_ROWS, "[]"))
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < vocabulary for row in rows):
        raise CheckpointError(f"{path}: its record of the rows that were trained is damaged; remove {_ROWS}")
    return rows


def _unties(model: Transformer, stored: StoredAdapter) -> bool:
    """Tell whether a head that is tied to its embedding gets rows of its own.

    As in PEFT: it does where one of the two, or each for itself, was trained; not where the config keeps them tied, or
    the file has both only because the vocabulary grew.
    """
    named = any(within(name, stored.fields.get("modules_to_save") or ()) for name in _tables(stored))
    return model.config.tie_embeddings and named and not stored.fields.get("ensure_weight_tying")


def _check_tied(model: Transformer, stored: StoredAdapter, values: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError where embedding and head are to be one table and the file has two that differ."""
    if model.config.tie_embeddings and not _unties(model, stored) and _HEAD in stored.beside:
        if not torch.equal(*(values[name] for name in _tables(stored))):
            raise CheckpointError(f"{stored.folder}: embedding and head are tied in this model, and differ in the file")


def adapter_quantization(folder: str | Path) -> QuantizationConfig | None:
    """Return how the base was quantised that the adapter in `folder` was trained on; None where it was not, or unsaid.

    Raises CheckpointError where that record is damaged.
    """
    path = Path(folder) / WEIGHTS
    text = read_metadata(path).get(_BASE) if path.is_file() else None
    try:
        return None if text is None else QuantizationConfig(**json.loads(text))
    except (ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: its record of the base's quantisation is damaged ({error})") from None


def save_adapter(
    model: Transformer, folder: str | Path, base_name: str | None = None, *, tokenizer: Any | None = None
) -> None:
    """Write the model's adapters to `folder` as PEFT does; other files there stay.

    What else of the model trains goes with them: biases, and other parameters as `modules_to_save`. After PiSSA's start
    the adapter is written as plain LoRA of twice the rank, which is right on the base as it was.

    Args:
        model: has adapters that one PEFT config can describe; of several, those that are chosen.
        folder: where to; made if missing.
        base_name: the base model's name or path, for the record.
        tokenizer: written beside it where given, as it should be when tokens were added.

    Raises:
        CheckpointError: the model has no adapter, or adapters or trained biases that one config cannot describe.
    """
    chosen, config = {path: layer.chosen for path, layer in linear_modules(model).items()}, model.config
    adapters = {path: lora for path, lora in chosen.items() if lora is not None}
    if not adapters:
        raise CheckpointError("there is no adapter to save")
    tensors, settings = {}, {}
    for path, lora in adapters.items():
        a, b = lora.factors()
        parts = {"A": a, "B": b} | ({} if lora.magnitude is None else {"magnitude": lora.magnitude})
        tensors |= {_file_name(config, path, part): tensor for part, tensor in parts.items()}
        whole = {} if lora.A0 is None else {"rank": len(a), "alpha": lora.scaling * len(a), "rslora": False}
        settings[checkpoint_name(config, path)] = dataclasses.replace(lora.config, **whole, target_modules=(path,))
    beside, fields = _saved_beside(model, adapters)
    tensors |= beside
    if config.reward:
        tensors[_SCORE] = model.score.weight
        fields["modules_to_save"] = [*(fields["modules_to_save"] or []), "score"]
    transposed = any(is_transposed(config, f"{path}.weight") for path in adapters)
    fields |= write_fields(settings, _target_names(model, settings), config, transposed=transposed)
    folder = Path(folder)
    quantized = next(iter(quantized_weights(model).values()), None)
    facts = {} if quantized is None else {_BASE: json.dumps(dataclasses.asdict(configuration(quantized)))}
    if rows := trained_rows(model):
        facts[_ROWS] = json.dumps(rows)
    with atomic_file(folder / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, facts)
    with atomic_file(folder / CONFIG) as temporary:
        write_json(temporary, {"base_model_name_or_path": base_name, **fields})
    if tokenizer is not None:
        tokenizer.save(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": list(tokenizer.end_ids)})


def _saved_beside(model: Transformer, adapters: dict[str, LoRA]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of what trains beside the adapters by the file's names, and the fields that say so."""
    config, own = model.config, {n: p for n, p in model.named_parameters() if ".lora." not in n and n != "score.weight"}
    trained = [name for name, parameter in own.items() if parameter.requires_grad]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained if not name.endswith(".bias")))
    if both := adapters.keys() & set(modules):
        raise CheckpointError(f"{min(both)} has an adapter and trains whole too, which no adapter's file can say")
    loose = {name for name in trained if name.rpartition(".")[0] not in modules}  # biases without their weight
    biases = {name for name in own if name.endswith(".bias")}
    adapted = {f"{path}.bias" for path in adapters} & biases
    bias = "none" if not loose else "all" if loose == biases else "lora_only" if loose == adapted else None
    if bias is None:
        raise CheckpointError("some biases train and some do not; an adapter keeps all, those of its layers, or none")
    names = [name for name in own if name in loose or name.rpartition(".")[0] in modules]
    tensors = {}
    for name in names:
        theirs, tensor = checkpoint_name(config, name), own[name]
        theirs = theirs.removesuffix("bias") + "base_layer.bias" if name in loose & adapted else theirs
        tensors[f"{_PREFIX}{theirs}"] = tensor.mT.contiguous() if is_transposed(config, name) else tensor
    tied = config.tie_embeddings and _EMBEDDING in names and not config.reward
    if tied:  # PEFT writes the head, too, and wants it
        tensors[f"{_PREFIX}{checkpoint_name(config, _HEAD)}"] = own[_EMBEDDING].detach().clone()
        modules.append(_HEAD.removesuffix(".weight"))
    saved = [checkpoint_name(config, path) for path in modules]
    paths = {checkpoint_name(config, name.rpartition(".")[0]) for name in own}
    short = []  # embed_tokens; not norm, with which the names of other norms end
    for name in saved:
        tail = name.rsplit(".", 1)[-1]
        alone = len(name.split(".")) == 2 and not any(path.endswith(tail) for path in paths - {name})
        short.append(tail if alone else name)
    return tensors, {"bias": bias, "modules_to_save": short or None, "ensure_weight_tying": tied}


def _target_names(model: Transformer, adapted: dict[str, Any]) -> list[str]:
    """Return short names ("q_proj") where they select exactly the adapted modules, else full paths."""
    names = {checkpoint_name(model.config, path) for path in linear_modules(model)}
    short = {name.rsplit(".", 1)[-1] for name in adapted}
    selected = {name for name in names if name.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == set(adapted) else adapted)
