"""The run folder: who may write to it, and what it holds before the first step.

A folder is a run once `config.yaml` is in it, which is therefore written last. What can fail is checked before anything
is written or deleted.
"""

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from minitune import __version__
from minitune.errors import ConfigError
from minitune.files import atomic_file, clean_leftovers

CONTENTS = ("config.yaml", "environment.json", "data.json", "metrics.jsonl", "tensorboard", "checkpoints",
            "adapter", "model", "report.md", "report.html", "loss.png", "facts.json", "outcome.json", "rows.json",
            "evaluations")  # fmt: skip
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2", "gguf")


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, by ConfigError, to write over another run, or to go on with one that is not there."""
    if resume:
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder} holds no run to resume; check --output, or leave out --resume")
        return
    if folder.is_file():
        raise ConfigError(f"output {folder} is a file; name a folder")
    for name in CONTENTS if folder.is_dir() else ():
        clean_leftovers(folder / name)  # of a run that was killed while it wrote its first file
    foreign = [path.name for path in folder.iterdir() if path.name not in CONTENTS] if folder.is_dir() else []
    if (folder / "config.yaml").exists() and not overwrite:
        raise ConfigError(f"{folder} already holds a run; use --resume, --overwrite or another --output")
    if foreign and not (folder / "config.yaml").exists():
        raise ConfigError(f"output {folder} is not empty and no run (it has {foreign[0]}); use another --output")


def write_run_files(
    folder: Path, options: dict[str, Any], files: list[dict], environment: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write config, environment, data and its facts; clear an old run that is to be overwritten.

    A run that is resumed has them already: what differs from then, and may change its numbers, is said on stderr. It
    has no outcome any more.
    """
    if options["resume"]:
        (folder / "outcome.json").unlink(missing_ok=True)
        before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        for name in ("torch", "processor", "device", "threads"):
            if before.get(name) != environment[name]:
                change = f"{name} was {before.get(name)} and is now {environment[name]}"
                print(f"{change}: the run goes on, but not bit for bit as it would have", file=sys.stderr)
        return
    for name in CONTENTS if options["overwrite"] else ():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    options = json.loads(json.dumps({**options, "overwrite": False}))
    texts = {
        "environment.json": json.dumps(environment, indent=1),
        "data.json": json.dumps(files, indent=1),
        "facts.json": json.dumps(facts, indent=1),
        "config.yaml": yaml.safe_dump(options, sort_keys=False),  # last: with it, the folder is a run
    }
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Write how the run ended: "status" is finished, no improvement, stopped or failed, which comes with an "error"."""
    with atomic_file(folder / "outcome.json") as temporary:
        temporary.write_text(json.dumps(outcome, indent=1, default=str) + "\n", encoding="utf-8")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Describe the machine and the software that a run's numbers depend on."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "minitune": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "device": str(device),
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "memory_mb": _memory_mb(),
    }


def _memory_mb() -> float | None:
    """Return the memory that this process may have, in MB (10^6 bytes): the machine's, or less where it is limited."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    sizes = [int(text) for text in texts if text.isdigit()]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return round(min(sizes) / 1e6, 1) if sizes else None
