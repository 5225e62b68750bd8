"""The state of a run on disk: everything that the next micro-batch depends on, and nothing else.

A checkpoint `step-0000050` (or `step-0000050-02`: two micro-batches into the next step) holds

    weights.safetensors     what trains; the frozen base is only named, by `fingerprint`
    optimizer.safetensors   moments
    window.safetensors      random states, and the summed gradients of an open accumulation window
    state.json              counters, the fingerprint, and the sha256 of these two and of the three files

It is written to a temporary folder, forced to disk and renamed, so a killed run finds its last complete one;
a damaged one is refused by name and the one before it used. torch.save was rejected: it pickles.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune.data.reading import data_path
from minitune.errors import CheckpointError
from minitune.files import atomic_folder, clean_leftovers, file_sha256
from minitune.model.lora import quantized_weights
from minitune.safetensors_io import read_tensors, write_tensors
from minitune.training.config import TrainConfig
from minitune.training.optimizer import Optimizer

FILES = ("weights", "optimizer", "window")
# Options that may change when a run goes on: they do not touch the numbers.
NEUTRAL = {"data", "validation", "model", "adapter", "output", "evaluation.samples", "evaluation.sample_tokens",
           "evaluation.general", "evaluation.general_tokens", "require",
           "checkpoint.every_steps", "checkpoint.keep", "preference.reference_cache", "penalty.text", "optimizer.paged",
           "penalty.fisher_cache", "device", "backend", "threads", "resume", "overwrite"}  # fmt: skip


@dataclass
class Progress:
    """How far a run is. Losses are in nats: sums in the window, means per target token or pair elsewhere.

    `window_metrics` holds for each metric its sum and what that is over.
    """

    step: int = 0
    batches: int = 0
    micro: int = 0
    window_loss: float = 0.0
    window_weight: int = 0
    window_metrics: dict[str, list[float]] = field(default_factory=dict)
    since_loss: float = 0.0
    since_weight: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    high_losses: int = 0
    started_low: bool = False
    best_step: int | None = None
    best_loss: float | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the checkpoint folder; `checkpoints` reads the order of progress from it."""
        return f"step-{self.step:07d}" + (f"-{self.micro:02d}" if self.micro else "")


def base_fingerprint(model: nn.Module) -> str:
    """Return a sha256 over the config and every weight's name, shape and 64 elements, or bytes, spread over it."""
    digest = hashlib.sha256()
    stored = quantized_weights(model).items()
    quantized = {f"{name}.{field}": part for name, weight in stored for field, part in weight.tensors().items()}
    config = dataclasses.replace(model.config, bos_id=None, eos_ids=(), pad_id=None)  # of text, not of arithmetic
    digest.update(repr(config).encode())
    for name, parameter in (*model.named_parameters(), *quantized.items()):
        flat = parameter.detach().flatten()
        chosen = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long().to(flat.device)]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(struct.pack("<64d", *chosen.double().tolist()))
    return digest.hexdigest()


def fingerprint(config: TrainConfig, files: list[dict[str, Any]], base: str, dtype: str) -> dict[str, Any]:
    """Return what must be equal for a run to go on: options that matter, data by sha256, the base model."""
    options = {name: value for name, value in _flat(dataclasses.asdict(config)).items() if name not in NEUTRAL}
    # By content, not by path: a file that moved is the same file.
    data = {
        f"data file {number}": [file[key] for key in ("role", "sha256", "weight", "format", "columns", "share")]
        for number, file in enumerate(files, 1)
    }
    if config.penalty.text is not None:
        data["data of penalty.text"] = file_sha256(data_path(config.penalty.text))
    # A changed tokenizer or chat template makes other tokens of the same files.
    tokens = [[file["training_tokens"], file["target_tokens"]] for file in files]
    return json.loads(json.dumps({**options, "dtype": dtype, **data, "tokenised data": tokens, "base model": base}))


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError naming the first field in which a run differs from its checkpoint."""
    for name in {**saved, **now}:
        old, new = saved.get(name), now.get(name)
        if old != new:
            what = "is another one" if "model" in name or "data" in name else f"was {old} and is now {new}"
            raise CheckpointError(
                f"cannot resume from {where}: {name} {what}; give the same as before, or start a new --output"
            )


def save_checkpoint(
    root: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, progress: Progress, matters: dict, keep: int
) -> Path:
    """Write a checkpoint below `root` and prune older ones; returns its folder.

    Raises OSError when the disk is full; nothing that was there before is touched then.
    """
    gradients = {f"gradient.{n}": p.grad for n, p in parameters.items() if progress.micro and p.grad is not None}
    window = {"random.cpu": torch.get_rng_state(), **gradients}
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        window["random.cuda"] = torch.cuda.get_rng_state(device)
    folder = root / progress.name
    with atomic_folder(folder, overwrite=True) as temporary:
        for name, tensors in zip(FILES, (parameters, optimizer.state(), window), strict=True):
            write_tensors(temporary / f"{name}.safetensors", tensors)
        state = {
            "progress": dataclasses.asdict(progress),
            "fingerprint": matters,
            "sha256": {name: file_sha256(temporary / f"{name}.safetensors") for name in FILES},
        }
        state["sha256"]["state"] = _digest(state)
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    _prune(root, keep)
    return folder


def save_best(root: Path, parameters: dict[str, nn.Parameter], step: int) -> None:
    """Write the weights alone as `best-STEP`; older ones go when no checkpoint refers to them."""
    with atomic_folder(root / f"best-{step:07d}", overwrite=True) as temporary:
        write_tensors(temporary / "weights.safetensors", parameters)


@torch.no_grad()
def load_best(root: Path, parameters: dict[str, nn.Parameter], step: int) -> None:
    """Put the weights of `best-STEP` into the parameters."""
    _fill(parameters, read_tensors(root / f"best-{step:07d}" / "weights.safetensors"))


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders below `root` in the order of progress, by number: 100 comes after 99."""
    found = {path: re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name) for path in root.glob("step-*")}
    steps = {path: (int(match[1]), int(match[2] or 0)) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return folder and state of the last sound checkpoint below `root`, None when none was written.

    Damaged ones after it are reported through `warn` and moved out of the way. Raises CheckpointError, and moves
    nothing, where all are damaged.
    """
    for hidden in list(root.glob(".*-*")):
        clean_leftovers(root / hidden.name[1:].split(".")[0])
    damaged: dict[Path, CheckpointError] = {}
    for folder in reversed(checkpoints(root)):
        try:
            state = read_state(folder)
            _check_files(folder, state["sha256"])
        except CheckpointError as error:
            damaged[folder] = error
            continue
        for bad, error in damaged.items():
            warn(f"{error}; using the checkpoint before it")
            refused = bad.with_suffix(".refused")
            shutil.rmtree(refused, ignore_errors=True)
            bad.rename(refused)
        return folder, state
    if damaged:
        first = next(iter(damaged.values()))
        raise CheckpointError(f"{first}, and no checkpoint before it is sound; begin again with --overwrite")
    return None


@torch.no_grad()
def restore(folder: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Put weights, moments, random states and open gradients back as they were saved in `folder`."""
    _fill(parameters, read_tensors(folder / "weights.safetensors"))
    optimizer.load(read_tensors(folder / "optimizer.safetensors"))
    window = read_tensors(folder / "window.safetensors")
    torch.set_rng_state(window["random.cpu"])
    device = next(iter(parameters.values())).device
    if "random.cuda" in window and device.type == "cuda":
        torch.cuda.set_rng_state(window["random.cuda"], device)
    for name, parameter in parameters.items():
        gradient = window.get(f"gradient.{name}")
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, whose tensors are not read; CheckpointError where it is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        Progress(**state["progress"])
        if state["sha256"]["state"] != _digest(state) or not state["sha256"].keys() >= set(FILES):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder / 'state.json'} is missing or damaged") from None
    return state


def _check_files(folder: Path, sums: dict[str, str]) -> None:
    """Raise CheckpointError naming the first file of a checkpoint that is missing or not what was written."""
    for name in FILES:
        path = folder / f"{name}.safetensors"
        if not path.is_file() or file_sha256(path) != sums[name]:
            raise CheckpointError(f"{path} is missing, truncated or damaged")


def _digest(state: dict[str, Any]) -> str:
    """Return the sha256 of a state's counters and fingerprint: a flipped digit would resume at another step."""
    return hashlib.sha256(json.dumps([state["progress"], state["fingerprint"]], sort_keys=True).encode()).hexdigest()


def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    for name, parameter in parameters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise CheckpointError(f"the checkpoint has no weight {name} of shape {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def _prune(root: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, and best weights that none of those refers to."""
    folders = checkpoints(root)
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
    used = set()
    for folder in folders[-keep:]:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            used.add(f"best-{state['progress']['best_step'] or 0:07d}")
        except (OSError, ValueError, KeyError):
            return  # damaged: it may refer to any of the best weights, so all stay
    for folder in root.glob("best-*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
