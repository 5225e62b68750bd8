"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the tensors of module M `base_model.model.M.lora_A.weight` (R, in) and `.lora_B.weight` (out, R).
Which modules are adapted is read from those names, which is the truth, rather than from `target_modules`,
which is a pattern. A field of the config that would change the result and is not implemented is refused.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.huggingface import refuse_pickle
from minitune.checkpoint.prequantized import configuration
from minitune.errors import CheckpointError, ConfigError
from minitune.files import atomic_file, read_json, write_json
from minitune.model.config import LoRAConfig, QuantizationConfig
from minitune.model.lora import add_lora, linear_modules, lora_modules, quantized_weights
from minitune.model.transformer import Transformer, add_score_head
from minitune.safetensors_io import StoredTensor, read_header, read_metadata, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LISTED = 8
_SCORE = f"{_PREFIX}score.weight"  # of a reward model: PEFT's `modules_to_save`
_BASE = "minitune.base_quantization"  # in the file's metadata: PEFT's config has no field for it

_USED = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
# Fields of which some values are implemented; the second task and module are those of a reward model.
_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    "modules_to_save": (["score"], ["classifier", "score"], [], None),  # PEFT names both for every family's classifier
    # Those that leave the base weights as they are; the others (PiSSA, OLoRA, ...) subtract from them.
    "init_lora_weights": ("gaussian", "eva", "orthogonal", True, False, None),
}
# Where it came from, or which modules it has; the tensors themselves say the latter.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_PLAIN = "; convert the adapter to plain LoRA in PEFT (path_initial_model_for_weight_conversion)"


def load_adapter(model: Transformer, folder: str | Path) -> LoRAConfig:
    """Add the adapter in `folder` to `model`, in place, and return its configuration.

    That of a reward model brings its head.

    Raises:
        CheckpointError: a file is missing or damaged, a field of the config is not implemented, or tensors do not
            fit this model; the model is unchanged then.
        ConfigError: the model has an adapter already.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        inner = folder / "adapter"
        instead = f"; give {inner}" if (inner / CONFIG).is_file() else "; give an adapter's folder, as training writes"
        raise CheckpointError(f"{folder} holds no {CONFIG}{instead}")
    fields = read_json(folder / CONFIG)
    if isinstance(fields.get("modules_to_save"), list):  # PEFT adds both of its names again at each loading
        fields["modules_to_save"] = sorted(set(map(str, fields["modules_to_save"])))
    _check_fields(fields, folder / CONFIG)
    try:
        config = LoRAConfig(
            rank=fields["r"],
            alpha=fields.get("lora_alpha", 8),  # PEFT's default
            dropout=fields.get("lora_dropout") or 0.0,
            rslora=bool(fields.get("use_rslora")),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if not (folder / WEIGHTS).is_file():
        for file in sorted(folder.iterdir()):
            refuse_pickle(file)
    tensors = read_header(folder / WEIGHTS)
    saved = "score" in (fields.get("modules_to_save") or ())
    scores = {_SCORE in tensors, saved, fields.get("task_type") == "SEQ_CLS"}
    if len(scores) > 1 or model.config.reward and scores == {False}:
        raise CheckpointError(
            f"{folder} has no reward head (score), or its config says otherwise; give another adapter"
        )
    config = replace(config, target_modules=_check_fit(model, tensors, config.rank, folder))
    values = {name: tensor.read().float() for name, tensor in tensors.items()}
    bad = [f"{name} holds a NaN or infinity" for name, value in values.items() if not all_finite(value)]
    fail_listing(f"{folder} is from a run that diverged", bad)
    for path, lora in add_lora(model, config).items():
        lora.A.data.copy_(values[f"{_PREFIX}{path}.lora_A.weight"])
        lora.B.data.copy_(values[f"{_PREFIX}{path}.lora_B.weight"])
    if scores == {True}:
        add_score_head(model)
        model.score.weight.data.copy_(values[_SCORE])
    return config


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


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all is finite. The sum says so in a tenth of the time, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def save_adapter(model: Transformer, folder: str | Path, base_name: str | None = None) -> None:
    """Write the model's adapters to `folder` as PEFT does, fp32; other files there stay.

    Args:
        model: has adapters of one rank and scaling.
        folder: where to; made if missing.
        base_name: the base model's name or path, for the record.

    Raises:
        CheckpointError: the model has no adapter, or adapters that one config cannot describe.
    """
    adapters = lora_modules(model)
    shapes = {(lora.A.shape[0], lora.scaling, lora.dropout) for lora in adapters.values()}
    if len(shapes) != 1:
        raise CheckpointError("there is no adapter to save" if not shapes else f"adapters differ: {sorted(shapes)}")
    rank, scaling, dropout = shapes.pop()
    tensors = {}
    for path, lora in adapters.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = lora.A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = lora.B
    if model.config.reward:
        tensors[_SCORE] = model.score.weight
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.config.reward else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": dropout,
        "use_rslora": False,
        "target_modules": _target_names(model, adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": ["score"] if model.config.reward else None,
    }
    folder = Path(folder)
    quantized = next(iter(quantized_weights(model).values()), None)
    base = {} if quantized is None else {_BASE: json.dumps(dataclasses.asdict(configuration(quantized)))}
    with atomic_file(folder / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, base)
    with atomic_file(folder / CONFIG) as temporary:
        write_json(temporary, fields)


def check_fit(what: str, expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing every tensor that is missing, left over, of another shape or no float."""
    fail_listing(what, misfits(expected, tensors))


def misfits(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, Any]) -> list[str]:
    """Return a line for every tensor that is missing, left over, of another shape or no float."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not part of this model")
        elif tuple(tensor.shape) != tuple(expected[name]):
            problems.append(f"{name} is {list(tensor.shape)} instead of {list(expected[name])}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"{name} is stored as {tensor.dtype}, which weights cannot be")
    return problems


def fail_listing(what: str, problems: list[str]) -> None:
    """Raise CheckpointError naming every problem, the first few in full; return where there is none."""
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_LISTED])}{more}")


def _check_fields(fields: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError for a field that changes the result in a way not implemented here."""
    if not isinstance(fields.get("r"), int):
        raise CheckpointError(f"{where}: r is {fields.get('r')!r}; it must be a whole number")
    problems = []
    for name, value in {"peft_type": None, **fields}.items():
        neutral = value in (None, False, "none", "", 0) or value == {} or value == []
        if name in _ALLOWED and value not in _ALLOWED[name]:
            known = ", ".join(str(one) for one in _ALLOWED[name] if one)
            remedy = _PLAIN if name == "init_lora_weights" else ""
            problems.append(f"{name} {value!r} is not supported; supported: {known}{remedy}")
        elif not neutral and name not in _USED | _INERT | _ALLOWED.keys():
            problems.append(f"{name} = {value!r} is not implemented")
    fail_listing(str(where), problems)


def _check_fit(model: Transformer, tensors: dict[str, StoredTensor], rank: int, folder: Path) -> tuple[str, ...]:
    """Return the paths of the adapted modules; CheckpointError listing every tensor that does not fit."""
    layers, expected = linear_modules(model), {_SCORE: (1, model.config.hidden_size)} if _SCORE in tensors else {}
    found = (re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", name) for name in tensors)
    paths = tuple(dict.fromkeys(match[1] for match in found if match and match[1] in layers))
    for path in paths:
        out_features, in_features = layers[path].weight.shape
        expected[f"{_PREFIX}{path}.lora_A.weight"] = (rank, in_features)
        expected[f"{_PREFIX}{path}.lora_B.weight"] = (out_features, rank)
    what = f"{folder} is not an adapter of this model"
    check_fit(what, expected, tensors)
    if not paths:
        raise CheckpointError(f"{what}: it holds no tensors of one")
    return paths


def _target_names(model: Transformer, adapters: dict[str, Any]) -> list[str]:
    """Return short names ("q_proj") where they select exactly the adapted modules, else full paths."""
    short = {path.rsplit(".", 1)[-1] for path in adapters}
    selected = {path for path in linear_modules(model) if path.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == set(adapters) else adapters)
