"""`python -m minitune.prepare FILES`: show what the model will see, and refuse what training would refuse.

Prints some rows with their tokens coloured by target or not, a histogram of lengths, and the counts of what is
over-long, empty or double. Exits with 1 when training would refuse the files, after listing every kind of
reason with its count and first places; with 2 when they cannot be looked at. Nothing is written but `--json`.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, check_seed, counted, run_command

if TYPE_CHECKING:
    from minitune.data.examples import Example
    from minitune.data.lint import Report

BAR = 40  # characters of the longest bar
LEARNED, GIVEN, RESET = ("\x1b[32m", "\x1b[92m"), ("\x1b[90m", "\x1b[37m"), "\x1b[0m"


@dataclass(frozen=True)
class PrepareConfig:
    """What to look at, and the training options that bear on data; their defaults are training's."""

    files: tuple[str, ...]
    """Data files: .jsonl, .json, .csv, .tsv or .txt."""
    model: str = "smollm2-135m-instruct"
    """Whose tokenizer and chat template: a fetched model's name, a Hugging Face folder or a GGUF file."""
    max_length: int = 512
    """Longest row in tokens."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = "auto"
    """Format of the rows; auto tells it by the fields of each file's first row."""
    columns: dict[str, str] | None = None
    """Fields by other names, ours: theirs, as in {"prompt": "question", "completion": "answer"}."""
    truncate: Literal["error", "prompt", "split", "drop"] = "error"
    """A longer row is an error, loses the start of its prompt, is split (texts only), or is left out."""
    train_on: Literal["all", "last"] = "all"
    """Learn every assistant turn of a conversation, or its last one."""
    weights: tuple[float, ...] | None = None
    """Each file's share of an epoch's rows; without, every row comes once."""
    packing: bool = True
    """Several rows side by side in one of max_length; false pads instead."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    seed: int = 0
    """Of the order of rows."""
    rows: int = 3
    """How many rows to show in full."""
    json: str | None = None
    """Also write the report to this file."""

    def __post_init__(self):
        """Refuse a count without meaning; the other values are checked where they are used."""
        if self.rows < 0:
            raise ConfigError(f"rows is {self.rows}; it must be 0 or more")
        check_seed(self.seed)


def main(argv: list[str] | None = None) -> int:
    """Inspect the files and print the report; return 1 when training would refuse them, else 0."""
    config = parse(
        PrepareConfig,
        argv,
        prog="python -m minitune.prepare",
        description="Show what the model will see of data files, and whether training would refuse them.",
        positional="files",
    )
    from minitune.checkpoint.load import stored_positions
    from minitune.data.lint import inspect_files, refuse_beyond
    from minitune.sources import resolve
    from minitune.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(config.model))
    report, examples = inspect_files(
        config.files,
        tokenizer,
        weights=config.weights or [None] * len(config.files),
        format=config.format,
        columns=config.columns,
        max_length=config.max_length,
        truncate=config.truncate,
        train_on=config.train_on,
        batch_size=config.batch_size,
        packing=config.packing,
        seed=config.seed,
    )
    refuse_beyond(report, examples, stored_positions(resolve(config.model)))
    sys.stdout.reconfigure(errors="backslashreplace")
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for example in examples[: config.rows]:
        print(f"{example.origin}: {len(example.ids)} tokens, {counted(sum(example.targets), 'target')}")
        print(painted(example, tokenizer, coloured) + "\n")
    print("\n".join(report_lines(report, config)))
    if config.json:
        Path(config.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
    return 1 if report.problems else 0


def painted(example: "Example", tokenizer: Any, coloured: bool) -> str:
    """Return a row's text: targets green and the rest grey, shades alternating by token, or targets in [ ]."""
    stream, text, learned = tokenizer.stream(skip_special=False), "", False
    for number, (id, target) in enumerate(zip(example.ids, example.targets, strict=True)):
        piece = _harmless(stream.push(id))
        if coloured:
            text += (LEARNED if target else GIVEN)[number % 2] + piece
        else:
            text += ("[" if target and not learned else "]" if learned and not target else "") + piece
        learned = target
    return text + _harmless(stream.flush()) + (RESET if coloured else "]" if learned else "")


def _harmless(text: str) -> str:
    """Return the text with control characters escaped, so that data cannot drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def report_lines(report: "Report", config: PrepareConfig) -> list[str]:
    """Return the report as lines for a reader."""
    lines = []
    for file in report.files:
        unread = ", ".join(f"{name} ({count})" for name, count in file["unread_fields"].items())
        note = f"; fields not read: {unread}" if unread else ""
        rows, examples = counted(file["rows"], "row"), counted(file["examples"], "example")
        lines.append(f"{file['path']}: {rows} ({file['format']}), {examples}{note}")
    if not report.rows:
        return [*lines, *_problem_lines(report)]
    shares = ", ".join(f"{share}% {length}" for share, length in report.percentiles.items())
    lines += ["", f"length in tokens ({shares})", *_bars(report), ""]
    double = report.duplicates
    first = f" (first: {'; '.join(double['first'])})" if double["first"] else ""
    mode = "packed" if config.packing else "padded"
    lines += [
        f"rows           {report.rows}",
        f"over-long      {report.over_long} (over {config.max_length}; "
        f"{report.shortened} shortened, {report.dropped} dropped)",
        f"empty          {report.empty}",
        f"duplicates     {double['exact']} exact, {double['normalised']} normalised{first}",
        f"contradictory  {counted(double['other_answer'], 'question')} asked before with another answer",
        f"an epoch       {counted(report.examples, 'example')}, {counted(report.tokens, 'token')}, "
        f"{report.target_tokens:,} of them targets, {counted(report.batches, 'batch')} of {config.batch_size} ({mode})",
        f"efficiency     {report.efficiency['packed']:.1%} packed, {report.efficiency['padded']:.1%} padded",
    ]
    return lines + _problem_lines(report)


def _problem_lines(report: "Report") -> list[str]:
    """Return the verdict as lines, with its reasons."""
    if not report.problems:
        return ["", "training would accept these files"]
    lines = ["", "training would refuse these files:"]
    for problem in report.problems:
        places = ", ".join(problem.origins) + (", ..." if problem.count > len(problem.origins) else "")
        lines.append(
            f"  {problem.count} x {problem.kind}" + (f"; {problem.remedy} ({places})" if problem.remedy else "")
        )
    return lines


def _bars(report: "Report") -> list[str]:
    """Return the histogram of lengths as text."""
    most = max((count for _, _, count in report.histogram), default=0)
    rows = [(f"{low}-{high}", count, "#" * -(-BAR * count // most)) for low, high, count in report.histogram]
    width = max((len(span) for span, _, _ in rows), default=0)
    return [f"  {span:>{width}} {bar} {count}" for span, count, bar in rows]


if __name__ == "__main__":
    run_command(main)
