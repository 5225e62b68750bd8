"""`python -m minitune.prepare FILES`: show what the model will see, and refuse what training would refuse.

Prints some rows with their tokens coloured by target or not (of a pair the prompt once, then both answers side by
side), a histogram of lengths, the counts of what is over-long, empty or double, and what is likely to be a fault. Exits
with 1 when training would refuse the files, after listing every kind of reason with its count and first places; with 2
when they cannot be looked at. Nothing is written but `--json`.

With `--output FOLDER` the rows are cleaned as asked, split, mixed and written (`curation.writing` lists the files), and
what is shown is the file that training will read. Nothing is changed or left out that was not asked for, but what is
nearly a golden row.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from minitune.cli import parse
from minitune.curation.options import CurationOptions
from minitune.errors import ConfigError, check_seed, run_command

if TYPE_CHECKING:
    from minitune.curation.pipeline import Prepared
    from minitune.curation.rows import Row
    from minitune.data.formats import Kind
    from minitune.data.lint import Report
    from minitune.data.preferences import Item


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CurationOptions):
    """What to look at or to write, and the training options that bear on data; their defaults are training's."""

    files: tuple[str, ...]
    """Data files: .jsonl, .json, .csv, .tsv or .txt."""
    output: str | None = None
    """Write the rows to this folder: cleaned as asked, split, mixed, and reported on."""
    overwrite: bool = False
    """Replace prepared data in that folder."""
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
    """Each file's share of an epoch, or with output of what is written; without, every row comes once."""
    packing: bool = True
    """Several rows side by side in one of max_length; false pads instead."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    seed: int = 0
    """Of the order of rows, and of which row is in which split."""
    rows: int = 3
    """How many rows to show in full."""
    json: str | None = None
    """Also write the report to this file."""

    def __post_init__(self):
        """Refuse a count without meaning and options without effect; other values are checked where they are used."""
        super().__post_init__()
        if self.rows < 0:
            raise ConfigError(f"rows is {self.rows}; it must be 0 or more")
        check_seed(self.seed)
        if self.output is not None and self.json and Path(self.json).parent.resolve() == Path(self.output).resolve():
            raise ConfigError("json names a file in output, where report.json has the same; leave it out")
        if self.output is None:
            self._refuse_without_output()
        elif self.share_of != "rows" and not (self.weights or self.shares):
            raise ConfigError("share_of is set, but there are neither weights nor rehearsal or safety files; add some")
        elif self.shortage != "error" and not self.shares:
            raise ConfigError("shortage is set, but there are no rehearsal or safety files; add some, or leave it out")

    def _refuse_without_output(self) -> None:
        """Refuse what would change rows that are written nowhere."""
        unset = CurationOptions(clean=replace(self.clean, repair=(), remove=(), unicode="keep"))
        names = ["overwrite"] if self.overwrite else []
        names += [field.name for field in fields(unset) if getattr(self, field.name) != getattr(unset, field.name)]
        if names:
            raise ConfigError(f"{names[0]} is set, but rows are written only with --output FOLDER; add it")


def main(argv: list[str] | None = None) -> int:
    """Inspect the files, or what is written of them, and report; return 1 when training would refuse that, else 0."""
    config = parse(
        PrepareConfig,
        argv,
        prog="python -m minitune.prepare",
        description="Show what the model will see of data files; clean, split and mix them; say what is wrong.",
        positional="files",
    )
    from minitune.curation.pipeline import look
    from minitune.reporting.data_lines import finding_lines, prepared_lines, problem_lines, report_lines
    from minitune.reporting.rows import harmless, shown
    from minitune.sources import resolve
    from minitune.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(config.model))
    kind = kind_wanted(config)
    prepared = None if config.output is None else curate(config, tokenizer, kind)
    if prepared is None:
        found = look(config.files, config, kind=kind, format=config.format, columns=config.columns, tokenizer=tokenizer)
        report, items = inspected(config, tokenizer, kind)
    else:
        found = prepared.findings
        report, items = inspected(config, tokenizer, kind, prepared.splits)
    sys.stdout.reconfigure(errors="backslashreplace")
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for item in items[: config.rows]:
        print("\n".join(shown(item, tokenizer, coloured, shutil.get_terminal_size().columns)) + "\n")
    content = report.to_dict() | {"findings": [described(one, config.clean) for one in found]}
    lines = report_lines(report, config.max_length, config.batch_size, config.packing)
    lines += finding_lines(content["findings"])
    if prepared is not None:
        content["prepared"] = prepared.facts | conclusion(config, report, kind, prepared)
        write_reports(Path(config.output), content)
        lines += prepared_lines(content["prepared"])
    lines += problem_lines(report)
    if prepared is not None:
        lines += [f"next: {content['prepared']['next']}"] if content["prepared"]["next"] else []
        lines += [f"the whole report: {Path(config.output, 'report.html')}"]
    print(harmless("\n".join(lines)))
    if config.json:
        Path(config.json).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return 1 if report.problems else 0


def kind_wanted(config: PrepareConfig) -> "Kind":
    """Return what the rows have to be for the objective."""
    from minitune.data.formats import file_kind

    if config.objective == "auto":
        return file_kind(config.files[0], config.columns)
    return {"sft": "examples", "kto": "judged"}.get(config.objective, "pairs")


def curate(config: PrepareConfig, tokenizer: Any, kind: "Kind") -> "Prepared":
    """Write the rows as the options want them, and return what was done; where they cannot be, nothing is written."""
    from minitune.curation.pipeline import prepare_rows
    from minitune.curation.writing import check_output, write_folder
    from minitune.data.examples import row_origin
    from minitune.data.pairing import survey_records
    from minitune.evaluation.sets import is_set, rows_of

    folder = Path(config.output)
    read = [*config.files, *(file for name in _READ for file in config.files_of(name)), config.golden or ""]
    check_output(folder, read, config.overwrite)

    def count_targets(rows: Sequence["Row"]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for item in survey_records(kind, [row.record for row in rows], tokenizer, **encoding(config)).examples:
            targets = sum(sum(document.targets) for document in item.documents)
            counts[row_origin(item)] = counts.get(row_origin(item), 0) + targets
        return counts

    reading = {"kind": kind, "format": config.format, "columns": config.columns}
    options = {"weights": config.weights, "seed": config.seed, "tokenizer": tokenizer}
    options |= {"count_targets": count_targets, "records_of": lambda name: rows_of(name) if is_set(name) else None}
    prepared = prepare_rows(config.files, config, **reading, **options)
    write_folder(folder, prepared, stratify=config.stratify)
    return prepared


def encoding(config: PrepareConfig) -> dict[str, Any]:
    """Return how rows become tokens: the options of `survey_records`."""
    return {"max_length": config.max_length, "truncate": config.truncate, "train_on": config.train_on}


def inspected(
    config: PrepareConfig, tokenizer: Any, kind: "Kind", splits: Mapping[str, Any] | None = None
) -> tuple["Report", list["Item"]]:
    """Return the report on the files, and the items of an epoch; with `splits`, on those that were written."""
    from minitune.checkpoint.load import stored_positions
    from minitune.data.lint import inspect_files, refuse_beyond, refuse_validation
    from minitune.sources import resolve

    files, format, columns, weights = config.files, config.format, config.columns, config.weights
    if splits is not None:
        files, format, columns, weights = [str(Path(config.output, "train.jsonl"))], "auto", None, None
    report, items = inspect_files(
        files,
        tokenizer,
        weights=weights or [None] * len(files),
        format=format,
        columns=columns,
        **encoding(config),
        batch_size=config.batch_size,
        packing=config.packing,
        seed=config.seed,
        kind=kind,
    )
    if splits is not None and "validation" in splits:
        refuse_validation(report, items, str(Path(config.output, "validation.jsonl")), tokenizer, **encoding(config))
    refuse_beyond(report, items, stored_positions(resolve(config.model)))
    return report, items


def described(found: Any, clean: Any) -> dict[str, Any]:
    """Return a finding as JSON has it, with the option that would do something about it."""
    from minitune.curation.cleaning import Removable, Repairable

    option = ""
    if found.kind not in (*clean.repair, *clean.remove):
        choices = {"repair": get_args(Repairable), "remove": get_args(Removable)}
        option = " or ".join(
            f"--clean.{name} '[{found.kind}]'" for name, kinds in choices.items() if found.kind in kinds
        )
    return asdict(found) | {"numbers": dict(found.numbers), "option": option}


def conclusion(config: PrepareConfig, report: "Report", kind: "Kind", prepared: "Prepared") -> dict[str, Any]:
    """Return what stands at the top of the report (the verdict, the command to go on with), and the options."""
    command = ["python", "-m", "minitune.train", "--data", str(Path(config.output, "train.jsonl"))]
    if "validation" in prepared.splits:
        command += ["--validation", str(Path(config.output, "validation.jsonl"))]
    if kind != "examples":
        command += ["--objective", config.objective if config.objective != "auto" else _OBJECTIVE[kind]]
    for name in ("model", "max_length", "truncate", "train_on", "packing"):
        value = getattr(config, name)
        if value != getattr(PrepareConfig, name):
            command += [f"--{name}", str(value)]
    sound = not report.problems
    verdict = "Training would accept these rows." if sound else "Training would refuse these rows, for these reasons:"
    given = {"output": config.output, "verdict": verdict, "share_of": config.share_of.replace("_", " ")}
    options = {name: value for name, value in asdict(config).items() if value not in (None, ())}
    return given | {"next": shlex.join(command) if sound else "", "options": options}


_READ = ("rehearsal", "safety", "evaluation_sets")  # options that name files
_OBJECTIVE = {"pairs": "dpo", "judged": "kto"}


def write_reports(folder: Path, content: dict[str, Any]) -> None:
    """Write report.json and report.html beside the rows."""
    from minitune.files import atomic_file, write_json
    from minitune.reporting.data_page import data_page

    with atomic_file(folder / "report.json") as path:
        write_json(path, content)
    with atomic_file(folder / "report.html") as path:
        path.write_text(data_page(content), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
