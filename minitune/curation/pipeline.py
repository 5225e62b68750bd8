"""From files to splits: read, clean, keep a golden set apart, split, look for leaks, mix.

The order matters. Cleaning comes before anything is counted; the golden set is taken before any split, so that no later
choice can move it; leaks are looked for before sources are mixed, so that what is taken out does not spoil a share; and
rehearsal and safety rows join the training rows alone, since validation is to measure the task.
"""

import contextlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from minitune.curation.cleaning import CleaningOptions, clean
from minitune.curation.consistency import lint
from minitune.curation.faults import FAULTS
from minitune.curation.findings import Finding
from minitune.curation.golden_rows import GOLDEN, take_golden
from minitune.curation.leakage import Leak, Probe, find_leaks, probe, probes_of_set, set_files
from minitune.curation.mixing import mixture
from minitune.curation.options import CurationOptions
from minitune.curation.rows import TRAINING, Row, changed, joined, read_source
from minitune.curation.splitting import fractions_of, label_table, split_rows
from minitune.data.formats import FormatName, Kind
from minitune.data.reading import RowError, data_path, first_of
from minitune.errors import ConfigError, DataError
from minitune.files import file_sha256

SetReader = Callable[[str], Sequence[Any] | None]
TRAIN = "train"
CHOSEN_BY = (TRAIN, "validation")  # the splits that a model owes something to
LISTED = 50  # leaks in the report; leaks.jsonl has all of them


@dataclass(frozen=True)
class Removed:
    """A row that was left out: at which step, why (the kind of reason, and after ": " the case), and its fields."""

    origin: str
    step: str
    reason: str
    fields: dict[str, Any]


@dataclass
class Prepared:
    """What is to be written: rows by split (train, validation, test, golden), what was left out, and what was found."""

    splits: dict[str, list[Row]] = field(default_factory=dict)
    removed: list[Removed] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def leave_out(self, rows: Sequence[tuple[Row, str]], step: str) -> None:
        """Note rows with the reasons why they leave."""
        self.removed += [Removed(row.origin, step, reason, row.fields) for row, reason in rows]


def prepare_rows(
    files: Sequence[str],
    options: CurationOptions,
    *,
    kind: Kind,
    format: FormatName = "auto",
    columns: dict[str, str] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    count_targets: Callable[[Sequence[Row]], dict[str, int]],
    records_of: SetReader = lambda name: None,
) -> Prepared:
    """Return what is to be written of `files`, to which alone `format`, `columns` and `weights` belong.

    The `tokenizer` measures lengths, which are in characters without one. `count_targets` gives the target tokens of
    rows by their origins; it is called where shares are of tokens. `records_of` gives the records of an evaluation set
    by its name, None for one that is a file.
    Raises ConfigError and DataError for options that the rows do not allow; `read_records` lists those for files.
    """
    done = Prepared()
    task = _read(done, files, TRAINING, options, format=format, columns=columns, kind=kind)
    others = {role: _read(done, options.files_of(role), role, options, kind=kind) for role in options.shares}
    _refuse_twice(done)
    task, *rest = _clean(done, [task, *others.values()], options.clean, kind, tokenizer)
    others = dict(zip(others, rest, strict=True))
    sets = _evaluation_sets(done, options, records_of)
    golden: list[Row] = []
    if options.golden is not None:
        by = {"group": options.group, "stratify": options.stratify}
        golden, twins, task = take_golden(task, options.golden, seed, **by)
        done.leave_out(twins, GOLDEN)
    fractions = fractions_of(options.split)
    given = {"group": options.group, "stratify": options.stratify, "exact": options.exact_sizes}
    done.splits = split_rows(task, fractions, seed, **given)
    if golden:
        done.splits[GOLDEN] = golden
    _part_leaks(done, others, sets, options)
    if options.stratify is not None:
        done.facts["labels"] = label_table(done.splits, options.stratify)
    done.facts["splits"] = {name: len(rows) for name, rows in done.splits.items()}
    _mix(done, files, others, weights, options, seed, count_targets)
    done.splits = {name: joined(rows) for name, rows in done.splits.items()}
    done.facts["lines"] = {name: len(rows) for name, rows in done.splits.items()}
    done.facts["golden_texts"] = sum(row.record.sides[0].messages is None for row in golden)
    done.facts["first_leaks"] = [asdict(leak) for leak in done.leaks[:LISTED]]
    done.facts["removed"] = dict(Counter(one.reason.partition(": ")[0] for one in done.removed))
    return done


def look(
    files: Sequence[str],
    options: CurationOptions,
    *,
    kind: Kind,
    format: FormatName,
    columns: dict[str, str] | None,
    tokenizer: Any = None,
) -> list[Finding]:
    """Return what is found in files of which nothing is to be written; what cannot be read is not looked at."""
    done, parts = Prepared(), []
    for path in files:
        with contextlib.suppress(DataError):  # training's own words on it are shown by `data.lint`
            parts.append(read_source(path, TRAINING, format=format, columns=columns, kind=kind)[0])
    _clean(done, parts, options.clean, kind, tokenizer)
    return done.findings


def _read(done: Prepared, paths: Sequence[str], role: str, options: CurationOptions, **reading: Any) -> list[Row]:
    """Return the rows of all files of a role, and note each file; malformed rows stop it or are left out."""
    result: list[Row] = []
    for path in paths:
        rows, broken = read_source(path, role, **reading)
        if broken and options.malformed == "error":
            hint = f": python -m minitune.prepare {path}; --malformed drop leaves them out"
            raise DataError(first_of([error for error, _ in broken], hint))
        for error, fields in broken:
            done.removed.append(Removed(error.origin, "read", f"{error.problem}; {error.remedy}", fields))
        if not rows:
            raise DataError(f"{path}: no row that can be read; give a file with rows")
        place = data_path(path)
        fact = {"path": path, "role": role, "rows": len(rows), "malformed": len(broken), "sha256": file_sha256(place)}
        done.facts.setdefault("sources", []).append(fact)
        result += rows
    return result


def _refuse_twice(done: Prepared) -> None:
    """Refuse a file that is given twice: its rows would be in several splits, or count twice."""
    seen: dict[str, str] = {}
    for source in done.facts["sources"]:
        if source["sha256"] in seen:
            first = seen[source["sha256"]]
            found = "is given twice" if first == source["path"] else f"has the same content as {first}"
            raise ConfigError(f"{source['path']} {found}; name each file once, weights make one count for more")
        seen[source["sha256"]] = source["path"]


def _clean(
    done: Prepared, parts: list[list[Row]], options: CleaningOptions, kind: Kind, tokenizer: Any
) -> list[list[Row]]:
    """Return the rows that cleaning keeps, changed as it says; each part is asked whether it is consistent."""
    rows = {row.origin: row for part in parts for row in part}
    cleaned = clean([row.record for row in rows.values()], options)
    done.findings += cleaned.findings
    done.leave_out([(rows[record.origin], reason) for record, reason in cleaned.removed], "clean")
    gone = {record.origin for record, _ in cleaned.removed}
    for record, what in cleaned.changed:
        repair = FAULTS[what].repair if what in FAULTS else partial(unicodedata.normalize, what)
        try:
            rows[record.origin] = changed(rows[record.origin], repair, kind)
        except RowError as error:
            if record.origin not in gone:
                done.leave_out([(rows[record.origin], f"{what}: then {error.problem}")], "clean")
                gone.add(record.origin)
    done.facts["changed"] = dict(Counter(what for _, what in cleaned.changed))
    kept = [[rows[row.origin] for row in part if row.origin not in gone] for part in parts]
    done.findings += [one for part in kept for one in lint([row.record for row in part], tokenizer)]
    return kept


def _evaluation_sets(done: Prepared, options: CurationOptions, records_of: SetReader) -> list[tuple[str, list[Probe]]]:
    """Read the evaluation sets; refuse one that is a training file itself."""
    own = {source["sha256"]: source["path"] for source in done.facts["sources"]}
    sets, broken = [], {}
    for name in options.files_of("evaluation_sets"):
        if (records := records_of(name)) is not None:
            sets.append((name, [probe(record) for record in records]))
            continue
        files = set_files(name)
        probes, unread = probes_of_set(files)
        if same := next((own[sha256] for file in files if (sha256 := file_sha256(file)) in own), None):
            raise ConfigError(f"evaluation set {name} is {same} itself, the data to train on; leave it out")
        sets.append((name, probes))
        broken |= {name: unread} if unread else {}
    done.facts |= {"evaluation_sets": {name: len(probes) for name, probes in sets}, "evaluation_rows_unread": broken}
    return sets


def _part_leaks(
    done: Prepared, others: dict[str, list[Row]], sets: list[tuple[str, list[Probe]]], options: CurationOptions
) -> None:
    """List leaks; take out those that are to be, and whatever is nearly a golden row, from the side nearer to training.

    Rehearsal and safety rows are looked at as training rows. That a test row is in an evaluation set too harms nobody.
    """
    extra = [row for rows in others.values() for row in rows]
    looked = {name: rows + extra * (name == TRAIN) for name, rows in done.splits.items()}
    splits = [(name, [probe(row.record) for row in rows]) for name, rows in looked.items()]
    near = {"threshold": options.clean.threshold, "shingle": options.clean.shingle}
    outside = {name for name, _ in sets}
    done.leaks = [
        leak
        for leak in find_leaks([*splits, *sets], **near, outer=len(sets))
        if leak.split in CHOSEN_BY or leak.held_split not in outside
    ]
    gone: dict[str, str] = {}
    for leak in done.leaks:
        if options.leaks == "remove" or (leak.held_split == GOLDEN and leak.kind != "n-gram"):
            gone.setdefault(leak.row, f"{leak.kind} leak: {leak.held_row} of {leak.held_split} ({leak.share:.2f})")
    for name, rows in (*done.splits.items(), *others.items()):
        leaving = [(row, gone[row.origin]) for row in rows if row.origin in gone]
        done.leave_out(leaving, "leaks")
        rows[:] = [row for row in rows if row.origin not in gone]
        if leaving and not rows:
            raise DataError(f"all rows of {name} leak into a later split or an evaluation set; give other rows")
    counts = Counter((leak.kind, leak.split, leak.held_split) for leak in done.leaks)
    done.facts["leaks"] = [
        {"kind": kind, "split": split, "held_split": held, "rows": count}
        for (kind, split, held), count in counts.items()
    ]


def _mix(
    done: Prepared,
    files: Sequence[str],
    others: dict[str, list[Row]],
    weights: Sequence[float] | None,
    options: CurationOptions,
    seed: int,
    count_targets: Callable[[Sequence[Row]], dict[str, int]],
) -> None:
    """Draw the training rows, and note what was drawn of each source."""
    rows = {str(data_path(path)): [] for path in files}
    for row in done.splits[TRAIN]:
        rows[row.origin.rpartition(":")[0]].append(row)
    sizes = None
    if options.share_of == "target_tokens":
        sizes = count_targets([row for part in (done.splits[TRAIN], *others.values()) for row in part])
    extra = [(role, ", ".join(options.files_of(role)), part, options.shares[role]) for role, part in others.items()]
    portions = mixture(
        list(zip(files, rows.values(), strict=True)),
        weights,
        extra,
        (lambda row: 1) if sizes is None else (lambda row: sizes.get(row.origin, 0)),
        seed,
        options.shortage,
    )
    done.splits[TRAIN] = [row for portion in portions for row in portion.rows]
    done.facts["mixture"] = [
        {"role": p.role, "path": p.path, "rows": len(p.rows), "of": p.available, "share": p.share}
        | {options.share_of: p.amount}
        for p in portions
    ]
