"""`python -m minitune.inspect PATH`: say what a checkpoint, an adapter or a run is, and what is wrong with it.

Only configs, headers and tokenizers are read, never a weight: a header of 8 bytes to a few MB says where each tensor
lies and what it is, so 100 GB are described as quickly as 100 MB. What loading would refuse is a problem: all of them
are listed, and the exit code is 1. What it would take is a note. A NaN in a weight is for loading to find, as is a
changed byte in a checkpoint's tensors. The exit code is 2 where one of the paths is nothing to describe.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minitune.cli import parse
from minitune.errors import CheckpointError, DataError, MinituneError, counted, run_command
from minitune.reporting.facts import as_text

_NAMES = {  # fields of ModelConfig that are always shown, as what
    "family": "family", "num_layers": "layers", "hidden_size": "width", "intermediate_size": "feed-forward width",
    "num_heads": "heads", "num_kv_heads": "key/value heads", "head_dim": "head width", "vocab_size": "vocabulary",
    "max_positions": "context", "tie_embeddings": "head tied to the embedding",
}  # fmt: skip
_PARTS = ("embedding", "attention", "mlp", "norms", "head", "adapter", "other")
_TRIED = {  # on chat templates
    "system message": ("system", "user", "assistant"),
    "several turns": ("user", "assistant", "user", "assistant"),
}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class InspectConfig:
    """What to describe.

    Args:
        paths: names in the manifest, Hugging Face folders, GGUF files, adapters' or runs' folders.
        json: print JSON instead of text: an object, or a list of them where several paths are given.
    """

    paths: tuple[str, ...]
    json: bool = False


class Findings:
    """What is wrong: `problems` keep something from being loaded, `notes` do not."""

    def __init__(self):
        """Start with none."""
        self.problems: list[str] = []
        self.notes: list[str] = []

    def attempt(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Return what `function` returns; where it finds the input at fault, None, and that is a problem."""
        try:
            return function(*arguments, **options)
        except MinituneError as error:
            found = getattr(error, "problems", None) or [" ".join(str(error).split())]
            # Weights and tokenizer may be one file, which is found at fault twice.
            self.problems += [problem for problem in found if problem not in self.problems]
            return None


def main(argv: list[str] | None = None) -> int:
    """Print what `argv` names; return 1 where something of it cannot be loaded, 2 where it is not there."""
    config = parse(
        InspectConfig, argv, prog="python -m minitune.inspect", positional="paths",
        description="Say what a checkpoint, an adapter or a run is, without loading its weights.",
    )  # fmt: skip
    found, missing = [], []
    for path in config.paths:
        try:
            found.append(describe(path))
        except MinituneError as error:
            missing.append(" ".join(str(error).split()))
    if found and config.json:
        print(json.dumps(found if len(config.paths) > 1 else found[0], indent=2, default=str))
    elif found:
        print("\n\n".join(map(as_text, found)))
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    return 2 if missing else int(any(facts["problems"] for facts in found))


def describe(name_or_path: str | Path) -> dict[str, Any]:
    """Return what is known of a model, adapter or run, as values that JSON has; sizes are in bytes.

    Raises CheckpointError where there is nothing, or nothing of these kinds.
    """
    from minitune.sources import resolve

    path, findings = resolve(name_or_path), Findings()
    kinds = {
        "run": (path / "config.yaml", _run),
        "model, Hugging Face folder": (path / "config.json", _model),
        "adapter, PEFT folder": (path / "adapter_config.json", _adapter),
    }
    kind, read = next(((kind, read) for kind, (sign, read) in kinds.items() if sign.is_file()), (None, _model))
    if kind is None:
        kind = "model, GGUF file"
        if path.suffix != ".gguf" and not any(path.glob("*.gguf")):
            raise CheckpointError(
                f"{path} is no model, adapter or run: it has neither config.json, adapter_config.json nor config.yaml, "
                "and is no .gguf file"
            )
    facts = {"path": str(path), "kind": kind, **read(path, findings), "files": _files(path, findings)}
    return facts | {"notes": findings.notes, "problems": findings.problems}


def _model(path: Path, findings: Findings) -> dict[str, Any]:
    """Describe the model at `path`."""
    from minitune.checkpoint.load import open_model
    from minitune.model.names import own_name

    if (path / "config.json").is_file():
        settings, tensors = _open_folder(path, findings)
    else:
        settings, tensors = findings.attempt(open_model, path) or _open_truncated(path, findings)
    quantization = settings.pop("quantization_config", None)
    config = findings.attempt(_config, settings, path) if settings else None
    named = {own_name(config, name): tensor for name, tensor in tensors.items()} if config else tensors
    facts = {"model": _sizes(config), "parts": _by_part(named), "quantisation": _quantisation(quantization, tensors)}
    if config and tensors:
        findings.attempt(_check_weights, config, tensors, path, findings)
    return facts | _tokenizer(path, findings, config.vocab_size if config else None)


def _open_folder(path: Path, findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `open_model` does; where config or weights are at fault, still the other."""
    from minitune.checkpoint.huggingface import read_config, read_weights
    from minitune.checkpoint.prequantized import check_settings, group

    settings, tensors = findings.attempt(read_config, path) or {}, findings.attempt(read_weights, path) or {}
    if settings.get("quantization_config"):
        findings.attempt(check_settings, settings["quantization_config"], path)
        tensors = findings.attempt(group, tensors) or tensors
    return settings, tensors


def _open_truncated(path: Path, findings: Findings) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return what a GGUF file says of itself that cannot be opened: its tensors may end beyond it."""
    from minitune.checkpoint.gguf import open_gguf

    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    return (findings.attempt(open_gguf, files[0], whole=False) if len(files) == 1 else None) or ({}, {})


def _config(settings: dict[str, Any], path: Path) -> Any:
    from minitune.model.config import ModelConfig

    return ModelConfig.from_hf(settings, where=str(path))


def _sizes(config: Any) -> dict[str, Any]:
    """Return what is always of interest, then each other value that is not the usual one."""
    if config is None:
        return {}
    values = asdict(config, dict_factory=lambda pairs: {name: value for name, value in pairs if value is not None})
    others = [
        one.name
        for one in fields(config)
        if one.name not in _NAMES and values.get(one.name, one.default) != one.default
    ]
    return {_NAMES.get(name, name.replace("_", " ")): values.get(name) for name in (*_NAMES, *others)}


def _check_weights(config: Any, tensors: Mapping[str, Any], path: Path, findings: Findings) -> None:
    """Compare what is stored with what the config needs; raises CheckpointError for sizes that cannot be."""
    from minitune.checkpoint.load import own_tensors, tensor_problems

    own = own_tensors(config, tensors)
    if config.tie_embeddings and own.pop("lm_head.weight", None) is not None:
        findings.notes.append("the head is stored though it is tied; loading checks that it equals the embedding")
    findings.problems += tensor_problems(config, own, path)


def _part(name: str) -> str:
    """Return which part of a model a tensor belongs to, by its name here."""
    module = name.rpartition(".")[0]
    leaf = module.rpartition(".")[2]
    signs = {
        "adapter": ".lora_" in name,
        "norms": "norm" in leaf,
        "embedding": "embed" in leaf,
        "attention": ".self_attn." in name,
        "mlp": ".mlp." in name,
        "head": leaf in ("lm_head", "score"),
        "other": True,
    }
    return next(part for part, is_it in signs.items() if is_it)


def _by_part(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return counts by part of the model, then those of all; parameters that are stored in 4 bits count as one each."""
    from math import prod

    rows = {part: {"part": part, "tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []} for part in (*_PARTS, "all")}
    for name, tensor in tensors.items():
        for row in (rows[_part(name)], rows["all"]):
            row["tensors"] += 1
            row["parameters"] += prod(tensor.shape)
            row["bytes"] += _stored_bytes(tensor)
            row["dtypes"] = sorted({*row["dtypes"], _stored_dtype(tensor)})
    return [row for row in rows.values() if row["tensors"]]


def _stored_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor in its file."""
    if hasattr(tensor, "parts"):
        return sum(part.size for part in tensor.parts.values())
    if hasattr(tensor, "kind"):
        from math import prod

        from gguf.quants import quant_shape_to_byte_shape

        return prod(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
    return tensor.size


def _stored_dtype(tensor: Any) -> str:
    """Return what a tensor's numbers are in its file."""
    if hasattr(tensor, "kind"):
        return tensor.kind.name
    return "4 bits" if hasattr(tensor, "parts") else str(tensor.dtype).removeprefix("torch.")


def _quantisation(settings: Any, tensors: Mapping[str, Any]) -> str:
    """Say how weights are quantised, "none" where they are not."""
    if isinstance(settings, dict):
        kind = settings.get("bnb_4bit_quant_type", "")
        double = ", double quantisation" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"{settings.get('quant_method', 'bitsandbytes')} {kind}{double}".strip()
    kinds = [tensor.kind.name for tensor in tensors.values() if hasattr(tensor, "kind")]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds)) if kind.startswith(("Q", "I"))}
    return ", ".join(f"{kind} ({counted(count, 'tensor')})" for kind, count in counts.items()) or "none"


def _tokenizer(path: Path, findings: Findings, rows: int | None) -> dict[str, Any]:
    """Describe the tokenizer and its chat template; `rows` is the height of the model's embedding."""
    from minitune.checkpoint.load import has_tokenizer, load_tokenizer

    if not has_tokenizer(path):
        findings.notes.append("there is no tokenizer: the model loads, but cannot train or generate")
        return {"tokenizer": None, "template": None}
    tokenizer = findings.attempt(load_tokenizer, path)
    if tokenizer is None:
        return {"tokenizer": None, "template": None}
    if rows is not None:
        findings.attempt(tokenizer.check_fits, rows)
    named = tokenizer.special.values()
    facts = {
        "kind": tokenizer.kind,
        "tokens": tokenizer.vocab_size,
        "spare rows in the embedding": None if rows is None else max(0, rows - tokenizer.vocab_size),
        "special": {name: f"{token} ({tokenizer.control_ids.get(token)})" for name, token in tokenizer.special.items()},
        "others added": [f"{token} ({id})" for token, id in tokenizer.added_ids.items() if token not in named],
        "ends a turn": list(tokenizer.end_ids),
        "puts BOS before a text": tokenizer.add_bos,
    }
    return {"tokenizer": facts, "template": _template(tokenizer, findings)}


def _template(tokenizer: Any, findings: Findings) -> dict[str, Any] | None:
    """Describe a chat template, and try what it does with a system message and with several turns."""
    import hashlib

    from minitune.text.chat import render_segments

    template = tokenizer.chat_template
    if template is None:
        findings.notes.append("there is no chat template: messages cannot be rendered")
        return None
    facts = {
        "sha256": hashlib.sha256(template.source.encode()).hexdigest(),
        "characters": len(template.source),
        "first line": template.source.strip().partition("\n")[0][:80],
    }
    for what, roles in _TRIED.items():
        messages = [{"role": role, "content": f"Sentence {number}."} for number, role in enumerate(roles)]
        try:
            render_segments(tokenizer, messages)
            facts[what] = "taken"
        except DataError as error:
            facts[what] = "refused"
            findings.notes.append(str(error))
        except CheckpointError as error:
            facts[what] = "broken"
            findings.problems += [str(error)] if str(error) not in findings.problems else []
    return facts


def _adapter(path: Path, findings: Findings) -> dict[str, Any]:
    """Describe the PEFT adapter in the folder `path`."""
    from minitune.checkpoint.adapter import CONFIG, WEIGHTS, adapter_quantization
    from minitune.checkpoint.adapter_config import read_config
    from minitune.files import read_json
    from minitune.safetensors_io import read_header

    settings = findings.attempt(read_json, path / CONFIG) or {}
    tensors = findings.attempt(read_header, path / WEIGHTS) or {}
    quantization = findings.attempt(adapter_quantization, path) if tensors else None
    shown = {name: value for name, value in settings.items() if value not in (None, False, [], {}, "", "none")}
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})
    facts = {
        "adapter": shown | {"modules in the file": modules},
        "parts": _by_part(tensors),
        "base quantised": "no, or unsaid" if quantization is None else _in_words(quantization),
    }
    if settings and findings.attempt(read_config, path / CONFIG) and tensors:
        findings.attempt(_check_adapter, path, settings.get("base_model_name_or_path"), findings)
    return facts


def _in_words(quantization: Any) -> str:
    """Return a QuantizationConfig as "nf4, blocks of 64, double quantisation"."""
    if quantization.kind == "int8":
        return "int8"
    double = ", double quantisation" if quantization.double_quant else ""
    return f"{quantization.kind}, blocks of {quantization.block_size}{double}"


def _check_adapter(path: Path, base: Any, findings: Findings) -> None:
    """Compare an adapter with its base, where that is here; CheckpointError where it does not fit."""
    from minitune.checkpoint.adapter import open_adapter
    from minitune.checkpoint.load import open_model, own_tensors, tensor_problems
    from minitune.model.transformer import Transformer
    from minitune.sources import resolve

    try:
        place = resolve(str(base))
        settings, tensors = open_model(place)
        settings.pop("quantization_config", None)
        config = _config(settings, place)
        own = own_tensors(config, tensors)
        tensor_problems(config, own, place)  # refuses absurd sizes, of which no model can be made
        model = Transformer(config, device="meta", init=False)
    except MinituneError as error:
        findings.notes.append(f"whether it fits its base is not known: {error}")
        return
    open_adapter(model, path)


def _run(path: Path, findings: Findings) -> dict[str, Any]:
    """Describe a run: how far it came, and the adapter or model that it left, whose problems are the run's."""
    from minitune.files import read_json
    from minitune.training.config import TrainConfig
    from minitune.training.state import checkpoints

    findings.attempt(parse, TrainConfig, ["--config", str(path / "config.yaml")], prog="", description="")
    findings.attempt(read_json, path / "environment.json")
    folders, progress = checkpoints(path / "checkpoints"), {}
    for folder in folders:
        progress = findings.attempt(_checkpoint, folder, findings) or progress
    kept = ("step", "tokens", "target_tokens", "seconds", "best_step", "best_loss")
    if progress:
        progress = {name: progress.get(name) for name in kept} | {"seconds": round(progress.get("seconds", 0), 3)}
    facts = {"checkpoints": [folder.name for folder in folders], "last": progress or None, "result": None}
    result = next((path / name for name in ("adapter", "model") if (path / name).is_dir()), None)
    if result is None:
        findings.notes.append("the run has left no adapter and no model yet; go on with --resume")
        return facts
    left = describe(result)
    findings.problems += left["problems"]
    return facts | {"result": left}


def _checkpoint(folder: Path, findings: Findings) -> dict[str, Any]:
    """Return the progress that a checkpoint holds; CheckpointError where its state is damaged."""
    from minitune.safetensors_io import read_header
    from minitune.training.state import FILES, read_state

    for name in FILES:
        findings.attempt(read_header, folder / f"{name}.safetensors")
    progress = read_state(folder)["progress"]
    if (best := progress.get("best_step")) is not None:
        findings.attempt(read_header, folder.parent / f"best-{best:07d}" / "weights.safetensors")
    return progress


def _files(path: Path, findings: Findings) -> list[dict[str, Any]]:
    """Return names and sizes of the files; pickles, which nothing here reads, are noted."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    pickles = [file.name for file in files if file.suffix in _PICKLES]
    if pickles:
        findings.notes.append(
            f"pickles lie beside, which run code when loaded; they are not used: {', '.join(pickles)}"
        )
    return [{"file": file.name, "bytes": file.stat().st_size} for file in files]


if __name__ == "__main__":
    run_command(main)
