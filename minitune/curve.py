"""Command: would more data help? Trains on 10, 30 and 100% of the rows, and says what the curve means.

    python -m minitune.curve --data rows.jsonl --output curve --repeats 3
    python -m minitune.curve --config sentiment --data rows.jsonl --labels positive,negative

All options of `python -m minitune.train` hold for every run. The parts are nested (10% is a part of 30%), drawn by a
hash of the rows; all runs are measured on the same validation rows: by their loss, or with --labels by the share of
answers that are not the right label. The passes over the data are the same for all, as they would be with more data;
with --max_steps the steps are. Repeats draw other parts and take other seeds; without them the interval leaves out
that luck. Runs that are done are not run again: the same command goes on after an interruption, and more --repeats or
--shares (with --overwrite) only add what is missing.
"""

import dataclasses
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.cli import parse
from minitune.errors import ConfigError, DataError, check_counts, counted, run_command
from minitune.training.config import TrainConfig

if TYPE_CHECKING:
    from minitune.curation.learning_curve import Curve

MADE = ("curve.json", "curve.html")
FEW_ROWS = 50  # of validation; fewer have hardly any say


@dataclass(frozen=True)
class CurveConfig(TrainConfig):
    """The options of training, and which parts of the data to train on."""

    output: str = "runs/curve"
    """The folder for the runs, curve.json and curve.html."""
    shares: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Parts of the training rows, three or more, growing to 1."""
    repeats: int = 1
    """Runs of each part, with other rows and another seed each; 3 measure how much luck there is."""
    labels: str | None = None
    """Measure the error rate of answers that must be one of these, as in positive,negative, instead of the loss."""
    max_new_tokens: int | None = None
    """With labels: an answer not ended by then is no label (default 16)."""
    overwrite: bool = False
    """Replace the curve that `output` holds; its runs are kept where the options are the same."""

    def __post_init__(self):
        """Refuse what training would, and parts of which there is no curve."""
        super().__post_init__()
        shares = self.shares
        if len(shares) < 3 or shares[-1] != 1 or min(shares) <= 0 or list(shares) != sorted(set(shares)):
            raise ConfigError(f"shares are {list(shares)}; give three or more that grow to 1, as [0.1,0.3,1]")
        check_counts(repeats=self.repeats, max_new_tokens=self.max_new_tokens)
        if self.max_new_tokens is not None and self.labels is None:
            raise ConfigError("max_new_tokens is set without labels, to which it belongs; leave it out")
        for name in ("resume", "require"):
            if getattr(self, name):
                raise ConfigError(f"{name} belongs to a single run; leave it out (a curve goes on by itself)")
        if self.validation_fraction == 0:
            raise ConfigError("validation_fraction is 0; a curve needs validation rows")
        if self.labels is not None and self.objective != "sft":
            raise ConfigError(f"labels are set but objective {self.objective} teaches no answers; leave them out")
        for name in MADE:
            if Path(self.output, name).exists() and not self.overwrite:
                place = f"{self.output}/{name} is there already"
                raise ConfigError(f"{place}; name another --output, or replace it with --overwrite")

    def training(self) -> TrainConfig:
        """Return the options of training alone."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})


@dataclass(frozen=True)
class Part:
    """A run to make: its name, number of rows, share, repeat, and the options it is trained with."""

    name: str
    rows: int
    share: float
    repeat: int
    config: TrainConfig


def main(argv: list[str] | None = None) -> int:
    """Parse the options, train what is missing, measure, fit, print, write; returns the exit code."""
    config = parse(CurveConfig, argv, prog="python -m minitune.curve", description=__doc__.split("\n")[0])
    from minitune.files import sole_writer

    resolved = config.training().resolved()
    rows = read_data(config, resolved)
    with sole_writer(Path(config.output)):
        parts = plan(config, resolved, rows)
        if config.labels is not None:
            _labelled(config, parts[0])  # refuses rows without a label before the work, not after
        found: dict[str, dict] = {}
        for part in parts:
            measured = measure(config, part)
            if isinstance(measured, int):
                print("stopped; the same command goes on from here", file=sys.stderr)
                return 128 + measured
            found[part.name] = measured
        return finish(config, parts, found, sum(len(lines) for _, lines in rows["validation"]))


def read_data(config: CurveConfig, resolved: TrainConfig) -> dict[str, list[Any]]:
    """Return {"training", "validation"}: for each file (source, its rows' fields), held out as training would.

    Raises DataError for rows that training would refuse to read, and for text files, which have no rows to count.
    """
    from minitune.data.formats import scan_rows
    from minitune.data.preference_formats import FORMATS_OF
    from minitune.data.reading import RowError
    from minitune.data.splits import question_key, split_by_hash

    kind = {"sft": "examples", "kto": "judged"}.get(config.objective, "pairs")
    held = resolved.validation_fraction or 0.0
    found: dict[str, list[Any]] = {"training": [], "validation": []}
    given = [("training", one) for one in resolved.data] + [("validation", one) for one in resolved.validation or ()]
    for role, source in given:
        rows = list(scan_rows(source.path, source.format, source.columns, FORMATS_OF[kind]))
        for _, record in rows:
            if isinstance(record, RowError):
                raise record
            if record.document:
                raise DataError(f"{source.path}: a text has no rows to take a part of; give rows of a data file")
        if role == "training" and held and source.share is None:
            parts = split_by_hash(rows, {"training": 1 - held, "validation": held}, config.seed,
                                  lambda row: question_key(row[1]))  # fmt: skip
            found["validation"].append((source, [fields for fields, _ in parts["validation"]]))
            rows = parts["training"]
        found[role].append((source, [fields for fields, _ in rows]))
    count = sum(len(rows) for _, rows in found["validation"])
    if not count:
        raise DataError("no row was held out; raise validation_fraction, or name --validation files")
    if count < FEW_ROWS:
        print(f"only {counted(count, 'validation row')}: the curve will be uncertain; raise validation_fraction",
              file=sys.stderr)  # fmt: skip
    return found


def plan(config: CurveConfig, resolved: TrainConfig, rows: dict[str, list[Any]]) -> list[Part]:
    """Write the files of every run, and return the runs.

    Raises DataError where there are too few rows for parts of different sizes, ConfigError for a folder that holds
    the runs of another curve.
    """
    folder = Path(config.output)
    counted_rows = [sum(len(part_of(lines, share, 0)) for source, lines in rows["training"] if source.share is None)
                    for share in config.shares]  # fmt: skip
    if counted_rows != sorted(set(counted_rows)):
        raise DataError(
            f"the parts would have {', '.join(map(str, counted_rows))} rows; give more rows or other shares"
        )
    _check_plan(config, resolved, rows)
    validation = tuple(
        dataclasses.replace(
            source, path=_written(folder / f"data/validation-{i}.jsonl", lines), columns=None, weight=None
        )
        for i, (source, lines) in enumerate(rows["validation"]) if lines
    )  # fmt: skip
    parts = []
    for share, count in zip(config.shares, counted_rows, strict=True):
        for repeat in range(config.repeats):
            name, files = f"{share:g}-{repeat}", []
            for i, (source, lines) in enumerate(rows["training"]):
                chosen = lines if source.share is not None else part_of(lines, share, config.seed + repeat)
                path = _written(folder / f"data/{name}-{i}.jsonl", chosen)
                files.append(dataclasses.replace(source, path=path, columns=None))
            options = {"data": tuple(files), "validation": validation, "validation_fraction": None}
            place = {"output": str(folder / "runs" / name), "seed": config.seed + repeat, "overwrite": False}
            parts.append(Part(name, count, share, repeat, dataclasses.replace(resolved, **options, **place)))
    return parts


def part_of(rows: list[Any], share: float, seed: int) -> list[Any]:
    """Return the first `share` of rows in an order drawn by the seed, in the file's order: nested, never empty."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in sorted(order[: max(1, round(share * len(rows)))])]


def _check_plan(config: CurveConfig, resolved: TrainConfig, rows: dict[str, list[Any]]) -> None:
    """Keep runs that were made with the same options and rows; refuse, or with overwrite delete, those of others."""
    from minitune.files import atomic_file, read_json, write_json

    folder = Path(config.output)
    digest = hashlib.sha256(json.dumps([[lines for _, lines in rows[role]] for role in rows], sort_keys=True).encode())
    options = dataclasses.asdict(dataclasses.replace(resolved, overwrite=False))
    made = json.loads(json.dumps({"options": options, "rows_sha256": digest.hexdigest()}))
    before = read_json(folder / "plan.json", optional=True)
    if before and before != made:
        if not config.overwrite:
            raise ConfigError(f"{folder} holds runs with other options or rows; name another --output, or --overwrite")
        for name in ("runs", "data", "measured"):
            shutil.rmtree(folder / name, ignore_errors=True)
    with atomic_file(folder / "plan.json") as path:
        write_json(path, made)


def _written(path: Path, rows: list[dict[str, Any]]) -> str:
    from minitune.files import write_rows

    write_rows(path, rows)
    return str(path)


def measure(config: CurveConfig, part: Part) -> dict[str, Any] | int:
    """Return {"value", "rows"} of one run, training it unless that was done; the signal where it was stopped."""
    from minitune.files import atomic_file, read_json, write_json
    from minitune.reporting.journal import read_rows_of
    from minitune.training.run import train

    measure_name = "loss" if config.labels is None else "-".join(["labels", *config.labels.split(",")])
    path = Path(config.output, "measured", f"{part.name}-{measure_name}.json")
    if path.is_file():
        return read_json(path)
    folder = Path(part.config.output)
    outcome = read_json(folder / "outcome.json", optional=True)
    if outcome.get("status") not in ("finished", "no improvement"):
        print(f"run {part.name}: {part.share:.0%} of the data, {counted(part.rows, 'row')}", file=sys.stderr)
        resume = (folder / "config.yaml").is_file()
        result = train(dataclasses.replace(part.config, resume=resume))
        if result.signal is not None:
            return result.signal
        outcome = {"best_loss": result.best_loss, "best_step": result.best_step, "seconds": result.seconds}
    if config.labels is None:
        measured = {"value": outcome["best_loss"], "rows": read_rows_of(folder, outcome["best_step"])}
    else:
        wrong = _wrong(config, part)
        measured = {"value": sum(wrong) / len(wrong), "rows": [[float(one), 1] for one in wrong]}
    measured["seconds"] = outcome["seconds"]
    with atomic_file(path) as temporary:
        write_json(temporary, measured)
    return measured


def _labelled(config: CurveConfig, part: Part) -> list[Any]:
    """Return the validation rows, which all parts share, with their labels."""
    from minitune.evaluation.classification import read_labelled

    return [row for source in part.config.validation for row in read_labelled(source.path, config.labels.split(","))]


def _wrong(config: CurveConfig, part: Part) -> list[bool]:
    """Return for each validation row whether the trained model's answer is not its label."""
    from tqdm import tqdm

    from minitune.evaluation.classification import ask_labels, classification_metrics
    from minitune.loading import ModelOptions

    labels, rows = config.labels.split(","), _labelled(config, part)
    shared = {name: getattr(config, name) for name in ("dtype", "device", "backend")}
    folder = Path(part.config.output)
    adapted = (folder / "adapter").is_dir()
    options = (
        {"model": config.model, "adapter": str(folder / "adapter")} if adapted else {"model": str(folder / "model")}
    )
    model, tokenizer = ModelOptions(**options, **shared).load()
    with tqdm(total=len(rows), desc="classify", unit=" rows") as bar:
        answers = ask_labels(
            model, tokenizer, rows, labels, max_new_tokens=config.max_new_tokens or 16, on_batch=bar.update
        )
    right = classification_metrics([row.label for row in rows], answers, [label.strip() for label in labels])
    return [not one for one in right["accuracy"].right]


def finish(config: CurveConfig, parts: Sequence[Part], found: dict[str, dict], held: int) -> int:
    """Fit the curve, write it as JSON and as a page, print it; `held` is the number of validation rows."""
    from minitune.curation import learning_curve
    from minitune.files import atomic_file, write_json

    sizes = sorted({part.rows for part in parts})
    of_size = {size: [part for part in parts if part.rows == size] for size in sizes}
    losses = [[found[part.name]["value"] for part in of_size[size]] for size in sizes]
    per_row = [
        found[of_size[size][0].name]["rows"] for size in sizes
    ]  # of the first repeat, in one order for all sizes
    known = all(per_row) and len({len(rows) for rows in per_row}) == 1
    variance = learning_curve.row_variance(per_row) if known else 0.0
    curve = learning_curve.fit_curve(sizes, losses, row_variance=variance)
    said = learning_curve.advice(curve, runs=config.repeats, error_rate=config.labels is not None)
    result = {
        "measure": "loss" if config.labels is None else "error rate", "sizes": sizes, "values": losses,
        "validation_rows": held, "row_sigma": variance**0.5, "curve": learning_curve.as_json(curve),
        "advice": said, "seconds": sum(one["seconds"] for one in found.values()),
    }  # fmt: skip
    folder = Path(config.output)
    with atomic_file(folder / MADE[0]) as path:
        write_json(path, result)
    with atomic_file(folder / MADE[1]) as path:
        path.write_text(curve_page(result, curve), encoding="utf-8")
    print(table(result, curve))
    print(f"written   {folder / MADE[0]}, {folder / MADE[1]}")
    return 0


def _rows(result: dict[str, Any]) -> list[tuple]:
    """Return (rows, mean value, values) of each size."""
    return [
        (size, sum(values) / len(values), ", ".join(f"{value:.4f}" for value in values))
        for size, values in zip(result["sizes"], result["values"], strict=True)
    ]


def _law(curve: "Curve") -> str:
    """Say which law was taken, and why."""
    formula = f"{curve.a:.4f} + {curve.b:.4f} (n / {curve.rows})^-{curve.c:.3f}" if curve.b else f"{curve.a:.4f}"
    return f"no law: {curve.reason}" if curve.law == "none" else f"{curve.law}, {formula}: {curve.reason}"


def _forecasts(curve: "Curve") -> list[tuple[str, int, float, str, float, str]]:
    def shown(interval: tuple[float, float] | None) -> str:
        return "unknown" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"

    return [(f"{one.times:g}x", one.rows, one.value, shown(one.interval), one.gain, shown(one.gain_interval))
            for one in curve.forecasts]  # fmt: skip


def table(result: dict[str, Any], curve: "Curve") -> str:
    """Return the curve as lines for a reader."""
    lines = [f"{'rows':>8}  {result['measure']}"]
    lines += [f"{size:>8,}  {mean:.4f}  ({values})" for size, mean, values in _rows(result)]
    lines.append(f"law       {_law(curve)}")
    for times, rows, value, interval, gain, gain_interval in _forecasts(curve):
        lines.append(f"{times:>8}  {rows:,} rows: {value:.4f} ({interval}), lower by {gain:.4f} ({gain_interval})")
    return "\n".join([*lines, f"advice    {result['advice']}"])


def curve_page(result: dict[str, Any], curve: "Curve") -> str:
    """Return the curve as a page: advice, drawing, tables."""
    from minitune.reporting.page import chart, heading, page, prose
    from minitune.reporting.page import table as html_table

    measure = result["measure"]
    series = {"measured": [(size, value) for size, values in zip(result["sizes"], result["values"], strict=True)
                           for value in values]}  # fmt: skip
    bands = {}
    if curve.law != "none":
        first, last = result["sizes"][0], max(one.rows for one in curve.forecasts)
        grid = [first * (last / first) ** (step / 40) for step in range(41)]
        series["law"] = [(rows, curve.at(rows)) for rows in grid]
        now = curve.at(curve.rows)
        bands["law"] = [(curve.rows, now, now)]
        bands["law"] += [(one.rows, *one.interval) for one in curve.forecasts if one.interval is not None]
    title = f"{measure} by rows of training data"
    parts = [
        prose(result["advice"]),
        chart(title, series, "rows", measure, bands=bands, log_x=True),
        heading("Measured"),
        html_table(["rows", f"mean {measure}", "runs"], _rows(result)),
        heading("Forecast"),
        prose(f"Law: {_law(curve)}"),
        html_table(["data", "rows", measure, "95% interval", "lower by", "95% interval"], _forecasts(curve)),
        prose(f"{counted(result['validation_rows'], 'validation row')}, the same for all runs."),
    ]
    return page("Learning curve", parts)


if __name__ == "__main__":
    run_command(main)
