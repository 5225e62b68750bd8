"""What a run says while it goes on: one JSON line a step, a progress bar, TensorBoard events where installed.

`metrics.jsonl` is the truth that the report is made of. On resuming it is cut back to the checkpoint, so that
no step stands in it twice.
"""

import json
import resource
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitune.files import atomic_file, read_json


class Journal:
    """Writer of a run's metrics and messages; a context manager.

    Args:
        folder: the run folder.
        total: optimiser steps of the run, for the bar.
        step: steps done where the run begins; later lines of an earlier attempt are dropped.
        evaluated: steps whose evaluations the run knows; lines of others are dropped.
    """

    def __init__(self, folder: Path, total: int, step: int = 0, evaluated: Collection[int] = ()):
        """Cut the metrics back and open them for appending."""
        self.path = folder / "metrics.jsonl"
        _cut_back(self.path, step, evaluated)
        self.stream = open(self.path, "a", encoding="utf-8")
        self.board = _tensorboard(folder / "tensorboard", step)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> "Journal":
        """Return itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Close files and bar."""
        self.bar.close()
        self.stream.close()
        if self.board:
            self.board.close()

    def step(self, line: dict[str, Any]) -> None:
        """Record an optimiser step."""
        self._write(line)
        self.bar.set_postfix_str(
            f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
            f"{line['target_tokens']:,} target tokens, {line['peak_rss_mb']:,.0f} MB"
        )
        self.bar.update(1)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Record an evaluation and print it with its samples."""
        self._write(line)
        training = "" if line["training_loss"] is None else f", training loss {line['training_loss']:.4f}"
        right = line.get("validation_accuracy")
        accuracy = "" if right is None else f", accuracy {right:.1%}, margin {line['validation_margin']:.3f}"
        self.say(f"step {line['step']}: validation loss {line['validation_loss']:.4f}{training}{accuracy}")
        for sample in line["samples"]:
            self.say(f"  > {_short(sample['prompt'])}\n    {_short(sample['answer'])}")

    def rows(self, step: int, losses: list[tuple[float, int]]) -> None:
        """Keep each validation row's (summed loss, targets) of step 0 and of the latest `step` that was the best."""
        if losses:
            kept = {0: read_rows_of(self.path.parent, 0), step: losses}
            content = {str(at): [[float(f"{loss:.6g}"), count] for loss, count in rows] for at, rows in kept.items()}
            with atomic_file(self.path.parent / "rows.json") as temporary:
                temporary.write_text(json.dumps(content), encoding="utf-8")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def _write(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.stream.flush()
        if self.board:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, line["step"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; a last line that a killed writer left half done is dropped."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def read_rows_of(folder: Path, step: int) -> list[tuple[float, int]]:
    """Return each validation row's (summed loss, targets) at a step, as `Journal.rows` kept them; [] if it did not."""
    kept = read_json(folder / "rows.json", optional=True).get(str(step), [])
    return [(loss, count) for loss, count in kept]


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _cut_back(path: Path, step: int, evaluated: Collection[int]) -> None:
    """Drop lines after `step`, and evaluations of other steps than `evaluated`."""
    lines = read_metrics(path.parent)
    kept = [
        line for line in lines
        if line["step"] <= step and ("validation_loss" not in line or line["step"] in evaluated)
    ]  # fmt: skip
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        temporary.write_text(text, encoding="utf-8")


def _tensorboard(folder: Path, step: int) -> Any | None:
    """Return a writer of TensorBoard events, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _short(text: str, limit: int = 200) -> str:
    """Return one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
