"""A run as its folder tells it: everything that the report and the doctor read, and nothing else.

Files that older runs lack are empty here, so old folders stay readable. A folder without config.yaml is no run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minitune.errors import CheckpointError, ConfigError, type_name
from minitune.files import sole_writer
from minitune.reporting.journal import read_metrics

EVALUATIONS = "evaluations"
_OPTIONS = {"model", "objective", "method", "optimizer", "schedule", "batch_size", "accumulation_steps", "max_length",
            "seed"}  # fmt: skip
_STEP, _EVALUATION = {"loss", "grad_norm", "tokens", "target_tokens"}, {"validation_loss", "training_loss"}
MEASURES = {  # what validation rows of preferences tell beside the loss
    "accuracy": "accuracy (chosen has the higher reward)",
    "prefers_chosen": "chosen has the higher log-probability",
    "accuracy_chosen_longer": "accuracy where chosen is longer",
    "accuracy_chosen_shorter": "accuracy where chosen is shorter",
    "margin": "margin of the rewards",
    "chosen_reward": "reward of chosen answers",
    "rejected_reward": "reward of rejected answers",
    "chosen_log_probability": "log-probability of chosen answers (nats)",
    "rejected_log_probability": "log-probability of rejected answers (nats)",
    "kl": "log-ratio to the reference (nats an answer)",
    "chosen_length": "length of chosen answers (tokens)",
    "rejected_length": "length of rejected answers (tokens)",
}
_PLAIN = ("steps", "target_tokens", "seconds", "peak_rss_mb", "base_loss", "best_loss", "best_step")
_SPREAD = {"value": None, "interval": None}
GATED = (*_PLAIN, "gain", "gain.low", "gain.high", "gain.rows", "general.ratio",
         *(f"general.{when}{end}" for when in ("before", "after") for end in ("", ".low", ".high")))  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's files.

    `steps` and `evaluations` are the lines of metrics.jsonl; `facts` and `outcome` are {} where the run left none;
    `measured` holds the results of `python -m minitune.evaluate` in its folder `evaluations`, by file name, and of
    `python -m minitune.curve` in a folder there.
    """

    folder: Path
    options: dict[str, Any]
    environment: dict[str, Any]
    files: list[dict[str, Any]]
    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    outcome: dict[str, Any]
    measured: dict[str, dict[str, Any]]
    running: bool = False

    @property
    def data(self) -> dict[str, Any]:
        """What was counted of the training rows before the first step (`evidence.data_facts`)."""
        return self.facts.get("data") or {}

    @property
    def base_loss(self) -> float | None:
        """The validation loss before training."""
        return next((line["validation_loss"] for line in self.evaluations if line["step"] == 0), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation after step 0 with the lowest loss, whose weights are kept."""
        later = [line for line in self.evaluations if line["step"]]
        return min(later, key=lambda line: line["validation_loss"], default=None)

    @property
    def general(self) -> dict[str, Any]:
        """Perplexity of general text before and after; {} where it was not measured."""
        return self.outcome.get("general") or {}


def read_run(folder: Path) -> Run:
    """Read a run's folder, finished or not; raises ConfigError where it is none, or a file in it is damaged."""
    if not (folder / "config.yaml").is_file():
        what = "is a file" if folder.is_file() else "has no config.yaml" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} is no run: it {what}; name the --output of minitune.train")
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{folder / 'config.yaml'}: broken YAML ({found}); the run's folder is damaged") from None
    if not isinstance(options, dict) or not _OPTIONS <= options.keys():
        raise ConfigError(f"{folder / 'config.yaml'} holds no options of a training run; name the --output of one")
    lines = [line for line in read_metrics(folder) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    outcome = _read(folder / "outcome.json", {})
    measured = folder / EVALUATIONS
    found = sorted([*measured.glob("*.json"), *measured.glob("*/curve.json")])
    return Run(
        folder=folder,
        options=options,
        environment=_read(folder / "environment.json", {}),
        files=_read(folder / "data.json", []),
        facts=_read(folder / "facts.json", {}),
        steps=[line for line in lines if _STEP <= line.keys()],
        evaluations=[line for line in lines if _EVALUATION <= line.keys()],
        outcome=outcome,
        measured={path.relative_to(measured).with_suffix("").as_posix(): _read(path, {}) for path in found},
        running=not outcome and _is_running(folder),  # the report is written while the run still holds its folder
    )


def _read(path: Path, missing: Any) -> Any:
    """Return the content of a JSON file that is of the same type as `missing`, and that where there is no file."""
    if not path.is_file():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); write it again, or remove it") from None
    if not isinstance(content, type(missing)):
        raise ConfigError(f"{path}: holds {type_name(content)}, not {type_name(missing)}; write it again, or remove it")
    return content


def _is_running(folder: Path) -> bool:
    """Tell whether a process is writing to the run."""
    try:
        with sole_writer(folder):
            return False
    except CheckpointError:
        return True


def gated(outcome: dict[str, Any], objective: str) -> dict[str, Any]:
    """Return the part of an outcome that gates are about; what was not measured is there as None."""
    general = outcome.get("general") or {}
    kept = outcome.get("validation") or {}
    return {name: outcome.get(name) for name in _PLAIN} | {
        "gain": outcome.get("gain") or _SPREAD | {"rows": None},
        "general": {"ratio": general.get("ratio")}
        | {when: {name: (general.get(when) or {}).get(name) for name in _SPREAD} for when in ("before", "after")},
        "validation": {} if objective == "sft" else {name: kept.get(name) for name in MEASURES},
    }
