"""`python -m minitune.prepare FILES`: show what the model will see, and refuse what training would refuse.

Prints some rows with their tokens coloured by target or not (of a pair the prompt once, then both answers side by
side), a histogram of lengths, and the counts of what is over-long, empty or double. Exits with 1 when training
would refuse the files, after listing every kind of reason with its count and first places; with 2 when they cannot
be looked at. Nothing is written but `--json`.
"""

import json
import os
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, check_seed, counted, run_command

if TYPE_CHECKING:
    from minitune.data.examples import Example
    from minitune.data.formats import Kind
    from minitune.data.lint import Report
    from minitune.data.preferences import Item

BAR = 40  # characters of the longest bar
NOUNS = {"examples": "example", "pairs": "pair", "judged": "judged answer"}
LEARNED, GIVEN, RESET = ("\x1b[32m", "\x1b[92m"), ("\x1b[90m", "\x1b[37m"), "\x1b[0m"


@dataclass(frozen=True)
class PrepareConfig:
    """What to look at, and the training options that bear on data; their defaults are training's."""

    files: tuple[str, ...]
    """Data files: .jsonl, .json, .csv, .tsv or .txt."""
    model: str = "smollm2-135m-instruct"
    """Whose tokenizer and chat template: a fetched model's name, a Hugging Face folder or a GGUF file."""
    objective: Literal["auto", "sft", "dpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo", "cpo", "reward"] = "auto"
    """What the rows are for, as in training; auto tells it by the fields of the first file's first row."""
    max_length: int = 512
    """Longest row in tokens."""
    format: Literal[
        "auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "pairs", "scored", "judged"
    ] = "auto"
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
    kind = kind_wanted(config)
    report, items = inspect_files(
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
        kind=kind,
    )
    refuse_beyond(report, items, stored_positions(resolve(config.model)))
    sys.stdout.reconfigure(errors="backslashreplace")
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for item in items[: config.rows]:
        print("\n".join(shown(item, tokenizer, coloured, shutil.get_terminal_size().columns)) + "\n")
    print("\n".join(report_lines(report, config)))
    if config.json:
        Path(config.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
    return 1 if report.problems else 0


def kind_wanted(config: PrepareConfig) -> "Kind":
    """Return what the rows have to be for the objective."""
    from minitune.data.formats import file_kind

    if config.objective == "auto":
        return file_kind(config.files[0], config.columns)
    return {"sft": "examples", "kto": "judged"}.get(config.objective, "pairs")


def shown(item: "Item", tokenizer: Any, coloured: bool, width: int) -> list[str]:
    """Return a row as lines: its origin and size, then its text; of a pair, the answers in two columns."""
    documents = item.documents
    tokens = " + ".join(str(len(document.ids)) for document in documents)
    targets = " + ".join(str(sum(document.targets)) for document in documents)
    label = f", {'desirable' if item.desirable else 'undesirable'}" if hasattr(item, "desirable") else ""
    margin = f", margin {item.margin:g}" if getattr(item, "margin", None) is not None else ""
    noun = "target" if targets == "1" else "targets"
    head = f"{item.origin}: {tokens} tokens, {targets} {noun}{label}{margin}"
    if len(documents) == 1:
        return [head, painted(documents[0], tokenizer, coloured)]
    start = len(documents[0].prompt)
    prompt = "".join(style + text for style, text in _pieces(documents[0], tokenizer, coloured, 0, start))
    room = max((width - 3) // 2, 1)  # characters of a column; " | " stands between them
    sides = [_column(_pieces(document, tokenizer, coloured, start), room) for document in documents]
    empty = " " * room
    height = max(map(len, sides))
    columns = ([*side, *[empty] * (height - len(side))] for side in sides)
    rows = [f"{left} | {right}".rstrip() for left, right in zip(*columns, strict=True)]
    return [head, prompt, f"{'chosen':{room}} | rejected", *rows]


def painted(example: "Example", tokenizer: Any, coloured: bool) -> str:
    """Return a row's text: targets green and the rest grey, shades alternating by token, or targets in [ ]."""
    return "".join(style + text for style, text in _pieces(example, tokenizer, coloured))


def _pieces(
    example: "Example", tokenizer: Any, coloured: bool, start: int = 0, end: int | None = None
) -> list[tuple[str, str]]:
    """Return (style, text) of the tokens from `start` to `end`; the style is "" without colours."""
    stream, pieces, learned = tokenizer.stream(skip_special=False), [], False
    marked = list(zip(example.ids, example.targets, strict=True))[start:end]
    for number, (id, target) in enumerate(marked, start):
        text = _harmless(stream.push(id))
        if coloured:
            pieces.append(((LEARNED if target else GIVEN)[number % 2], text))
        else:
            pieces.append(("", ("[" if target and not learned else "]" if learned and not target else "") + text))
        learned = target
    return [
        *pieces,
        (RESET, _harmless(stream.flush())) if coloured else ("", _harmless(stream.flush()) + "]" * learned),
    ]


def _column(pieces: list[tuple[str, str]], width: int) -> list[str]:
    """Return the pieces as lines that fill `width` places of a terminal, wide characters taking two."""
    lines, line, used = [], "", 0

    def close() -> None:
        lines.append(line + (RESET if "\x1b" in line else "") + " " * (width - used))

    for style, text in pieces:
        line += style
        for character in text.expandtabs(4):
            places = 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
            if character == "\n" or used + places > width:
                close()
                line, used = style, 0
            if character != "\n":
                line, used = line + character, used + places
    close()
    return lines


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
        *_answer_lines(report),
        f"an epoch       {counted(report.examples, NOUNS[report.kind])}, {counted(report.tokens, 'token')}, "
        f"{report.target_tokens:,} of them targets, {counted(report.batches, 'batch')} of {config.batch_size} ({mode})",
        f"efficiency     {report.efficiency['packed']:.1%} packed, {report.efficiency['padded']:.1%} padded",
    ]
    return lines + _problem_lines(report)


def _answer_lines(report: "Report") -> list[str]:
    """Return what is to be said of the answers, of pairs or judged ones with the lengths of both kinds."""
    if report.kind == "examples":
        again = counted(report.duplicates["other_answer"], "question")
        return [f"contradictory  {again} asked before with another answer"]
    found = report.preferences
    lines = [f"left out       {report.tied} of equal score, {report.equal} of equal sides"]
    for name, lengths in found.get("lengths", {}).items():
        shares = ", ".join(f"{share}% {length}" for share, length in lengths.items())
        count = f"{found[name]}, " if name in found else ""
        lines.append(f"{name:14} {count}target tokens {shares or 'none'}")
    if "chosen_longer" in found:
        lines.append(f"chosen longer  in {found['chosen_longer']:.1%} of pairs; {found['margins']} with a margin")
    return lines


def _problem_lines(report: "Report") -> list[str]:
    """Return the verdict as lines, with its reasons."""
    from minitune.data.formats import READERS

    if not report.problems:
        objective = "" if report.kind == "examples" else f" with --objective {READERS[report.kind][1]}"
        return ["", f"training would accept these files{objective}"]
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
