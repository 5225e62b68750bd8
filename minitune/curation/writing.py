"""The folder that `prepare` writes: what is trained on, what is measured on, and what was left out and why.

    train.jsonl validation.jsonl test.jsonl     rows as they were read, each with its source
    golden.jsonl                                rows kept apart, as `evaluation.golden` reads them
    removed.jsonl                               {"origin", "step", "reason", "row"} for each row that was left out
    leaks.jsonl                                 every leak that was found (`leakage.Leak`)
    report.json report.html                     what was found, for programs and for readers

The folder appears whole or not at all; the two reports, which look at the rows as they were written, come last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from minitune.curation.golden_rows import GOLDEN, golden_line
from minitune.curation.pipeline import Prepared
from minitune.curation.rows import Row, json_line, line_of
from minitune.curation.splitting import labels_of
from minitune.errors import ConfigError
from minitune.files import atomic_folder

CONTENTS = ("train.jsonl", "validation.jsonl", "test.jsonl", "golden.jsonl", "removed.jsonl", "leaks.jsonl",
            "report.json", "report.html")  # fmt: skip


def check_output(folder: Path, files: Sequence[str], overwrite: bool) -> None:
    """Refuse, by ConfigError, a folder that holds anything else, prepared data to keep, or one of the `files` read."""
    if folder.is_file():
        raise ConfigError(f"output {folder} is a file; name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if name not in CONTENTS]
    if foreign:
        raise ConfigError(f"output {folder} holds something else ({foreign[0]}); name another folder")
    for file in files:
        places = (Path(file).resolve(), Path(file).parent.resolve())
        if folder.is_dir() and Path(file).exists() and folder.resolve() in places:
            raise ConfigError(f"output {folder} holds {file}, which is read; name another folder")
    if names and not overwrite:
        raise ConfigError(f"output {folder} holds prepared data already; name another folder, or add --overwrite")


def write_folder(folder: Path, prepared: Prepared, *, stratify: str | None) -> None:
    """Write all but the reports; what `check_output` allowed to be there is replaced as a whole."""
    with atomic_folder(folder, overwrite=True) as temporary:
        for name, rows in prepared.splits.items():
            _write(temporary / f"{name}.jsonl", _golden(rows, stratify) if name == GOLDEN else map(line_of, rows))
        left = (asdict(one) for one in prepared.removed)
        _write(temporary / "removed.jsonl", (json_line(one | {"row": one.pop("fields")}) for one in left))
        _write(temporary / "leaks.jsonl", (json_line(asdict(leak)) for leak in prepared.leaks))


def _golden(rows: Sequence[Row], stratify: str | None) -> list[str]:
    labels = [()] * len(rows) if stratify is None else [(label,) for label in labels_of(rows, stratify)]
    return [json_line(golden_line(row, tags)) for row, tags in zip(rows, labels, strict=True)]


def _write(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
