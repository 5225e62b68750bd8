"""What the model will see of some data files, and whether training would refuse them.

The work is done by the functions that training calls (`scan_records`, `survey_records`, `mix`,
`plan_items`); where those raise at the first problem, this collects all of them by kind. A separate checker
was rejected: it would sooner or later accept what training refuses.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minitune.data.batching import efficiency, mix, mixed_counts, plan_items
from minitune.data.examples import Survey, TrainOn, Truncate, percentiles
from minitune.data.formats import FormatName, Kind, read_records, scan_records
from minitune.data.pairing import checked_preferences, contradictions, preference_summary, survey_records
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.preferences import Item
from minitune.data.reading import RowError
from minitune.data.splits import duplicates, question_key, row_key, row_parts
from minitune.errors import ConfigError, DataError, counted

_SHOWN_ORIGINS = 3
_BINS = 12


@dataclass
class Problem:
    """One kind of thing that training would refuse: how often, where first, and what to do about it."""

    kind: str
    remedy: str
    count: int = 0
    origins: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `inspect_files` found; lengths in tokens, `histogram` as (from, to, rows), efficiencies 0 to 1.

    `examples` counts pairs or judged answers where `kind` says so; `preferences` is empty unless it does, and the
    lengths of a pair are then those of its longer side.
    """

    kind: Kind = "examples"
    files: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    empty: int = 0
    over_long: int = 0
    shortened: int = 0
    dropped: int = 0
    tied: int = 0
    equal: int = 0
    duplicates: dict[str, Any] = field(default_factory=dict)
    preferences: dict[str, Any] = field(default_factory=dict)
    percentiles: dict[int, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    batches: int = 0
    efficiency: dict[str, float] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return asdict(self)


def refuse_beyond(report: Report, items: Sequence[Item], positions: int | None) -> None:
    """Add the problem of documents with more tokens than the model has positions, which training refuses too."""
    longest = ((item.origin, max(len(document.ids) for document in item.scored if document)) for item in items)
    beyond = [origin for origin, length in longest if positions and length > positions]
    if beyond:
        kind, remedy = f"a row over the model's {positions} positions", f"set max_length to {positions} or less"
        report.problems.append(Problem(kind, remedy, len(beyond), beyond[:_SHOWN_ORIGINS]))


def refuse_validation(report: Report, items: Sequence[Item], path: str, tokenizer: Any, **encoding: Any) -> None:
    """Add what training would refuse of a validation file beside `items`; `encoding` is that of `inspect_files`."""
    try:
        records = read_records(path, formats=FORMATS_OF[report.kind])
        survey = survey_records(report.kind, records, tokenizer, **encoding)
        if problem := survey.problem():
            raise DataError(problem)
        if report.kind != "examples" and items:
            checked_preferences([list(items)], survey.examples)
    except DataError as error:
        report.problems.append(Problem(str(error), "", 1, [path]))


def inspect_files(
    files: Sequence[str],
    tokenizer: Any,
    *,
    weights: Sequence[float | None],
    format: FormatName,
    columns: dict[str, str] | None,
    max_length: int,
    truncate: Truncate,
    train_on: TrainOn,
    batch_size: int,
    packing: bool,
    seed: int,
    kind: Kind = "examples",
) -> tuple[Report, list[Item]]:
    """Return the report on `files` and the items of the first epoch; raises only for impossible options.

    `kind` says what the rows are to be, as in `load_corpus`.
    """
    check_weights(weights, len(files))
    report, kinds, sources, records, lengths = Report(kind), {}, [], [], []
    for path, weight in zip(files, weights, strict=True):
        good, errors, whole = _scan(path, format, columns, kind)
        survey = survey_records(kind, good, tokenizer, max_length=max_length, truncate=truncate, train_on=train_on)
        for error in errors + survey.errors:
            _note(kinds, error.problem, error.remedy, error.origin)
        for error in whole:
            _note(kinds, str(error), "", path)
        for origin, _ in survey.over_long:
            _note(kinds, f"a row over max_length {max_length}", survey.remedy, origin)
        if survey.examples:
            sources.append((survey.examples, weight))
        elif not (errors or survey.errors or survey.over_long or whole):
            _note(kinds, survey.problem(), "", path)
        records += good
        lengths += survey.lengths
        _add_file(report, path, good, len(errors), survey)
    if kind != "examples" and sources:
        sources = _checked(report, kinds, sources)
    report.problems = list(kinds.values())
    report.empty = sum(p.count for p in report.problems if p.kind.startswith("a row without"))
    report.duplicates = _duplicates(records)
    report.percentiles, report.histogram = percentiles(lengths), histogram(lengths)
    epoch = mix(sources, seed=seed) if sources else []
    _add_epoch(report, epoch, batch_size=batch_size, max_length=max_length, packing=packing, seed=seed)
    return report, epoch


def check_weights(weights: Sequence[float | None], files: int) -> None:
    """Raise ConfigError unless there is a weight above 0 for each file, or None for each."""
    if len(weights) != files:
        raise ConfigError(f"{counted(len(weights), 'weight')} for {counted(files, 'file')}; give one for each")
    mixed_counts([1] * files, weights)


def _scan(
    path: str, format: FormatName, columns: dict[str, str] | None, kind: Kind
) -> tuple[list[Any], list[RowError], list[DataError]]:
    """Return a file's records, its broken rows, and what is wrong with it as a whole."""
    rows: list[Any] = []
    whole = []
    try:
        rows.extend(scan_records(path, format, columns, FORMATS_OF[kind]))
    except DataError as error:
        whole.append(error)
    return [r for r in rows if not isinstance(r, RowError)], [r for r in rows if isinstance(r, RowError)], whole


def _note(kinds: dict[str, Problem], kind: str, remedy: str, origin: str) -> None:
    """Count one more problem of a kind."""
    problem = kinds.setdefault(kind, Problem(kind, remedy))
    problem.count += 1
    if len(problem.origins) < _SHOWN_ORIGINS:
        problem.origins.append(origin)


def _checked(report: Report, kinds: dict[str, Problem], sources: list[tuple]) -> list[tuple]:
    """Add what preferences have in common and what training refuses of them together; return them as it has them."""
    parts, weights = zip(*sources, strict=True)
    items = [item for part in parts for item in part]
    report.preferences = preference_summary(items)
    errors = contradictions(items)
    for error in errors:
        _note(kinds, error.problem, error.remedy, error.origin)
    try:
        return sources if errors else list(zip(checked_preferences(parts, [])[0], weights, strict=True))
    except DataError as error:
        _note(kinds, str(error), "", items[0].origin)
        return sources


def _add_file(report: Report, path: str, records: list[Any], broken: int, survey: Survey) -> None:
    """Add one file's counts to the report."""
    unread = Counter(name for record in records for name in record.unread)
    kind = records[0].format if records else "unknown"
    file = {"path": path, "format": kind, "rows": len(records) + broken, "examples": len(survey.examples)}
    report.files.append(file | {"unread_fields": dict(unread)})
    report.rows += len(records) + broken
    report.over_long += sum(length > survey.max_length for length in survey.lengths)
    report.shortened += survey.shortened
    report.dropped += survey.dropped
    report.tied += getattr(survey, "tied", 0)
    report.equal += getattr(survey, "equal", 0)


def _add_epoch(report: Report, epoch: list[Item], *, packing: bool, **options: int) -> None:
    """Add what one epoch of training goes through."""
    documents = [document for item in epoch for document in item.documents]
    lengths = [len(document.ids) for document in documents]
    report.examples, report.tokens = len(epoch), sum(lengths)
    report.target_tokens = sum(sum(document.targets) for document in documents)
    each = len(documents) // max(len(epoch), 1)  # documents an item
    for name, packed in (("packed", True), ("padded", False)):
        plan = plan_items(epoch, packing=packed, epoch=0, **options)
        laid = [[[i * each + k for i in row for k in range(each)] for row in batch] for batch in plan]
        if not packed:
            laid = [[[document] for row in batch for document in row] for batch in laid]
        report.efficiency[name] = efficiency(laid, lengths)
        if packed == packing:
            report.batches = len(plan)


def _duplicates(records: list[Any]) -> dict[str, Any]:
    """Count rows that came before, exactly or normalised, and questions that came before with another answer."""
    exact = duplicates(map(row_parts, records))
    alike = duplicates(map(row_key, records))
    asked = duplicates(map(question_key, records))
    first = [f"{records[i].origin} = {records[j].origin}" for i, j in alike[:_SHOWN_ORIGINS]]
    counts = {"exact": len(exact), "normalised": len(alike), "other_answer": len(asked) - len(alike)}
    return counts | {"first": first}


def histogram(lengths: Sequence[int], bins: int = _BINS) -> list[tuple[int, int, int]]:
    """Return up to `bins` (from, to, count) of equal width that hold every length, `to` included."""
    if not lengths:
        return []
    low = min(lengths)
    width = -(-(max(lengths) - low + 1) // bins)
    counts = Counter((length - low) // width for length in lengths)
    return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]
