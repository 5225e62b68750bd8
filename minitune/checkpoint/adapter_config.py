"""PEFT's `adapter_config.json`: every field is used, known to change nothing, or refused by its name with the reason.

Which modules have an adapter is worked out as PEFT does it, from `target_modules` and what narrows it, and then held
against the tensors of the file: one too many or too few is an error. Trusting the tensors alone was rejected, since
PEFT ignores those that its config does not select, and would answer otherwise than we do.
"""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from minitune.checkpoint.fit import fail_listing
from minitune.errors import CheckpointError, ConfigError
from minitune.files import read_json
from minitune.model.config import ModelConfig
from minitune.model.lora_config import LoRAConfig

CONFIG = "adapter_config.json"
HEADS = {"score", "classifier"}  # what PEFT calls a classifier's head; it names both for every family
_SECONDS = 5.0  # for matching one config's regular expressions

_USED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "bias", "ensure_weight_tying",
    "base_model_name_or_path",
}  # fmt: skip
_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    # Those that leave the base as it is, and PiSSA's exact one, which can be done again; see _REASONS.
    "init_lora_weights": ("gaussian", "eva", "orthogonal", "pissa", True, False, None),
}
# Where it came from, how it started (settings of an `init_lora_weights`), and what PEFT corrects by itself.
_INERT = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_REASONS = {
    "init_lora_weights": "it changes the base; convert the adapter to plain LoRA in PEFT "
    "(path_initial_model_for_weight_conversion)",
    "trainable_token_indices": "single rows of the embedding; train with modules_to_save instead",
    "lora_bias": "a bias beside B; train without it",
    "layer_replication": "a base with repeated layers; replicate the layers in a checkpoint of its own",
    "alora_invocation_tokens": "an adapter that begins at a token of the prompt",
    "target_parameters": "adapters of bare parameters, as mixtures of experts have them",
}


def read_config(path: Path) -> dict[str, Any]:
    """Return the fields of an `adapter_config.json`, checked.

    Raises:
        CheckpointError: the file is damaged, or listing every field that changes the result in a way not implemented
            here or has a value without meaning.
    """
    fields = read_json(path)
    if not isinstance(fields.get("r"), int):
        raise CheckpointError(f"{path}: r is {fields.get('r')!r}; it must be a whole number")
    problems = []
    for name, value in {"peft_type": None, **fields}.items():
        reason = f": {_REASONS[name]}" if name in _REASONS else ""
        neutral = value in (None, False, "none", "", 0) or value == {} or value == []
        if name in _ALLOWED and not any(value is one or value == one and value != 1 for one in _ALLOWED[name]):
            known = ", ".join(str(one) for one in _ALLOWED[name] if one)
            problems.append(f"{name} {value!r} is not supported; supported: {known}{reason}")
        elif not neutral and name not in _USED | _INERT | _ALLOWED.keys():
            problems.append(f"{name} = {value!r} is not implemented{reason}")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = fields.get(name)
        whole = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (value is None or whole or isinstance(value, str) and name != "modules_to_save"):
            problems.append(f"{name} is {value!r}; it must be a list of names")
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        value = fields.get(name) or {}
        if not (isinstance(value, dict) and all(isinstance(one, kinds) for one in value.values())):
            problems.append(f"{name} is {value!r}; it must be an object of module name -> number")
    layers = fields.get("layers_to_transform")
    if not all(isinstance(one, int) for one in (layers if isinstance(layers, list) else [layers or 0])):
        problems.append(f"layers_to_transform is {layers!r}; it must be a list of whole numbers")
    if fields.get("bias") not in ("none", "all", "lora_only", None):
        problems.append(f"bias is {fields['bias']!r}; it must be none, all or lora_only")
    fail_listing(str(path), problems)
    return fields


def layer_settings(fields: dict[str, Any], names: list[str], present: Collection[str], where: Path):
    """Return the settings of each layer that has an adapter, by the checkpoint's name of the layer.

    Args:
        fields: what `read_config` returned.
        names: all linear layers of the model, as checkpoints call them.
        present: those of which the file has tensors; they decide where the config names no target.
        where: the config's path, for errors.

    Raises:
        CheckpointError: a pattern that is none, matches nothing, or takes too long; a rank or alpha without meaning.
    """
    chosen = list(present) if fields.get("target_modules") is None else _selected(fields, names, where)
    if not chosen:
        raise CheckpointError(
            f"{where}: target_modules {fields.get('target_modules')!r} matches no linear layer of this model; "
            f"a layer is called {names[0]}"
        )
    ranks = _by_pattern(fields.get("rank_pattern") or {}, chosen, where)
    alphas = _by_pattern(fields.get("alpha_pattern") or {}, chosen, where)
    settings = {}
    for name in chosen:
        try:
            settings[name] = LoRAConfig(
                rank=ranks.get(name, fields["r"]),
                alpha=alphas.get(name, fields.get("lora_alpha", 8)),  # PEFT's default
                dropout=fields.get("lora_dropout") or 0.0,
                rslora=bool(fields.get("use_rslora")),
                dora=bool(fields.get("use_dora")),
                init="pissa" if fields.get("init_lora_weights") == "pissa" else "kaiming",
            )
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from None
    return settings


def within(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a parameter lies in a module whose path ends with one of `modules`, as PEFT compares them."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: size + 1]) for size in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in modules)


def write_fields(
    settings: dict[str, LoRAConfig], selected_by: Any, config: ModelConfig, *, transposed: bool
) -> dict[str, Any]:
    """Return the fields that describe adapters, as PEFT reads them: the commonest rank and alpha, and what differs.

    Raises CheckpointError where one config cannot describe all of them.
    """
    kinds = {(one.dropout, one.rslora, one.dora) for one in settings.values()}
    if len(kinds) != 1:
        raise CheckpointError(f"adapters differ in (dropout, rslora, dora): {sorted(kinds)}; PEFT has one for all")
    ((dropout, rslora, dora),) = kinds
    rank, ranks = _commonest({name: one.rank for name, one in settings.items()})
    alpha, alphas = _commonest({name: one.alpha for name, one in settings.items()})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.reward else "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": selected_by,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _commonest(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the commonest value, and the others by name."""
    counted = list(values.values())
    common = max(dict.fromkeys(counted), key=counted.count)
    return common, {name: value for name, value in values.items() if value != common}


def _selected(fields: dict[str, Any], names: list[str], where: Path) -> list[str]:
    """Return the names that the config selects, by PEFT's rules."""
    target, excluded = fields["target_modules"], fields.get("exclude_modules") or []
    saved = [name for name in fields.get("modules_to_save") or () if name not in HEADS]
    names = [name for name in names if not any(f".{name}.".find(f".{module}.") >= 0 for module in saved)]
    if isinstance(excluded, str):
        gone = _matching([excluded], names, where)[0]
    else:
        gone = {name for name in names if _ends_with(name, excluded)}
    names = [name for name in names if name not in gone]
    if target == "all-linear":
        return names
    if isinstance(target, str):
        hits = _matching([target], names, where)[0]
        return [name for name in names if name in hits]
    wanted, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    layers = [wanted] if isinstance(wanted, int) else wanted or None
    patterns = [patterns] if isinstance(patterns, str) else patterns
    hits = [name for name in names if _ends_with(name, target)]
    return [name for name in hits if layers is None or _layer_index(name, patterns) in layers]


def _ends_with(name: str, tails: Iterable[str]) -> bool:
    return any(name == tail or name.endswith(f".{tail}") for tail in tails)


def _layer_index(name: str, patterns: list[str]) -> int | None:
    """Return the number after the first of the named lists of layers, by default after any but the outermost."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal() and i > 0 and (parts[i - 1] in patterns if patterns else i > 1):
            return int(part)
    return None


def _by_pattern(values: dict[str, Any], names: list[str], where: Path) -> dict[str, Any]:
    """Return the value of each name that a key matches, whole or after a dot; the first key that does counts."""
    hits = _matching([rf"(.*\.)?({key})" for key in values], names, where)
    found: dict[str, Any] = {}
    for value, matched in zip(values.values(), hits, strict=True):
        found |= {name: value for name in matched if name not in found}
    return found


_CHILD = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    print(json.dumps([[name for name in names if re.fullmatch(one, name)] for one in expressions]))
except (re.error, OverflowError, RecursionError) as error:
    print(json.dumps(str(error)))
"""


def _matching(expressions: list[str], names: list[str], where: Path) -> list[set[str]]:
    """Return the names that each regular expression matches as a whole.

    An expression of somebody else's can take longer than the universe lasts: one that repeats something is tried in a
    process of its own, which is ended after some seconds.
    """
    if all(re.fullmatch(r"(\(\.\*\\\.\)\?\()?\^?([\w.-]|\\\.)*\$?\)?", one) for one in expressions):
        return [{name for name in names if re.fullmatch(one, name)} for one in expressions]
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    what = f"{where}: the pattern {max(expressions, key=len)[:200]!r}"
    try:
        done = subprocess.run(
            command, input=json.dumps([expressions, names]), capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{what} takes too long to match; list the modules by name instead") from None
    result = json.loads(done.stdout) if done.returncode == 0 else "it cannot be matched"
    if isinstance(result, str):
        raise CheckpointError(f"{what} is not a regular expression ({result}); list the modules by name instead")
    return [set(matched) for matched in result]
