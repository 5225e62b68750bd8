"""The data of a run: files -> training and validation examples -> an endless, seekable stream of batches.

Rows held out for validation are chosen by a hash of their question, so duplicates never stand on both sides,
and adding rows to a file moves none of the old ones. The stream is a function of (seed, epoch, index) alone:
a resumed run asks for batch i and gets the same rows as a run that was never interrupted. A loader with workers
and a position of its own was rejected: batches of token ids are made in a millisecond.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minitune.data.batching import Batch, collate, collate_preferences, mix, plan_items
from minitune.data.examples import Example, Survey, TrainOn, Truncate, row_origin
from minitune.data.formats import FormatName, Kind, RowSource, read_records
from minitune.data.pairing import PreferenceSurvey, checked_preferences, preference_counts, survey_records
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.preferences import Item, item_ids
from minitune.data.reading import data_path
from minitune.data.splits import question_key, split_by_hash
from minitune.errors import DataError
from minitune.files import file_sha256


@dataclass(frozen=True)
class Source:
    """One data file of a mixture."""

    path: str
    """The file: .jsonl, .json, .csv or .txt; or a fetched data set's name."""
    weight: float | None = None
    """Its share of the rows of an epoch, relative to the other files' (default: every row once)."""
    format: FormatName = "auto"
    """Kind of its rows; auto is told by their fields."""
    columns: dict[str, str] | None = None
    """Other names of fields: {prompt: question, completion: answer} reads `question` as the prompt."""
    share: float | None = None
    """Rehearsal: its rows are this share of an epoch, beside those of the other files; none is held out."""


@dataclass(frozen=True)
class Encoding:
    """How rows become examples: the arguments of `build_examples`."""

    max_length: int
    truncate: Truncate = "error"
    train_on: TrainOn = "all"


@dataclass(frozen=True)
class Corpus:
    """Training items by source with their weights, validation items, and one entry per file.

    Items are examples, pairs or judged examples, all of one kind. `shares` are as in `mix`.
    """

    training: list[tuple[list[Item], float | None]]
    validation: list[Item]
    files: list[dict[str, Any]]
    shares: tuple[float | None, ...] = ()

    def leaked(self) -> int:
        """Return how many validation items are training items too."""
        learned = {item_ids(item) for items, _ in self.training for item in items}
        return sum(item_ids(item) in learned for item in self.validation)


@dataclass(frozen=True)
class Stream:
    """The batches of a run. `pad_id` fills short rows; the rest is as in `plan_items`."""

    corpus: Corpus
    batch_size: int
    max_length: int
    packing: bool
    seed: int
    pad_id: int

    def count(self, epochs: float) -> int:
        """Return the number of batches in so many epochs, at least 1."""
        whole, part = int(epochs), epochs % 1
        count = sum(len(self._epoch(epoch)[1]) for epoch in range(whole))
        return max(1, count + (round(part * len(self._epoch(whole)[1])) if part else 0))

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield batches without end, epoch after epoch, beginning with number `start` of the run."""
        epoch = 0
        while True:
            examples, plan = self._epoch(epoch)
            for rows in plan[start:]:
                yield self._collate(examples, rows)
            start, epoch = max(0, start - len(plan)), epoch + 1

    def validation(self) -> Iterator[Batch]:
        """Yield the validation examples, each once, always in the same batches."""
        for rows in self._plan(self.corpus.validation, 0):
            yield self._collate(self.corpus.validation, rows)

    def _epoch(self, epoch: int) -> tuple[list[Item], list[list[list[int]]]]:
        items = mix(self.corpus.training, seed=self.seed, epoch=epoch, shares=self.corpus.shares)
        return items, self._plan(items, epoch)

    def _plan(self, items: list[Item], epoch: int) -> list[list[list[int]]]:
        options = {"batch_size": self.batch_size, "max_length": self.max_length, "packing": self.packing}
        return plan_items(items, seed=self.seed, epoch=epoch, **options)

    def _collate(self, items: list[Item], rows: list[list[int]]) -> Batch:
        chosen = [[items[i] for i in row] for row in rows]
        if isinstance(chosen[0][0], Example):
            return collate(chosen, self.pad_id)
        return collate_preferences(chosen, self.pad_id, packing=self.packing)


def load_corpus(
    training: Sequence[Source],
    validation: Sequence[Source],
    tokenizer: Any,
    encoding: Encoding,
    *,
    held_out: float = 0.0,
    seed: int = 0,
    kind: Kind = "examples",
) -> Corpus:
    """Read, split and encode data files; the share `held_out` of the training rows becomes validation.

    `kind` says what the rows are to be: "examples" for supervised training, preference "pairs", or "judged" ones.
    Raises DataError for a file or row that cannot be used, and when no row is left to train on.
    """
    taught, held, files = [], [], []
    for source in training:
        learned, kept, survey, origins = _split(
            source, tokenizer, encoding, kind, held_out * (source.share is None), seed
        )
        taught.append((learned, source.weight))
        held += kept
        files.append(_entry(source, "training", learned, kept, survey, origins))
    for source in validation:
        _, kept, survey, origins = _split(source, tokenizer, encoding, kind, 1, seed)
        held += kept
        files.append(_entry(source, "validation", [], kept, survey, origins))
    shares = tuple(source.share for source, (items, _) in zip(training, taught, strict=True) if items)
    taught = [(items, weight) for items, weight in taught if items]
    if not taught:
        raise DataError("no row is left to train on; lower validation_fraction or give more rows")
    if kind != "examples":
        parts, held = checked_preferences([items for items, _ in taught], held)
        taught = [(items, weight) for items, (_, weight) in zip(parts, taught, strict=True)]
    return Corpus(taught, held, files, shares)


def _split(
    source: Source, tokenizer: Any, encoding: Encoding, kind: Kind, share: float, seed: int
) -> tuple[list[Item], list[Item], Survey, dict[str, RowSource]]:
    """Return (training, validation) items by their rows' questions, a text file's windows by their place in it.

    The rows are encoded before they are split: a part whose rows are all left out is empty, not an error. Last come
    the places at which rows that `prepare` wrote were first read, by their origins.
    """
    records = read_records(source.path, source.format, source.columns, FORMATS_OF[kind])
    survey = survey_records(kind, records, tokenizer, **vars(encoding))
    if problem := survey.problem():
        raise DataError(problem)
    items = survey.examples
    sources = {record.origin: record.source for record in records if record.source}
    if share in (0, 1):
        return (items, [], survey, sources) if share == 0 else ([], items, survey, sources)
    questions = {record.origin: question_key(record) for record in records if not record.document}
    parts = split_by_hash(
        items,
        {"training": 1 - share, "validation": share},
        seed,
        lambda item: questions.get(row_origin(item), item.origin),
    )
    return parts["training"], parts["validation"], survey, sources


def _entry(
    source: Source, role: str, learned: list[Item], held: list[Item], survey: Survey, sources: dict[str, RowSource]
) -> dict[str, Any]:
    """Describe a file for the run folder; of preferences also the answers' tokens and what was left out.

    Of a file that `prepare` wrote, `origins` counts the examples (training ones, else those held out) by the file and
    the role that they had there.
    """
    documents = [document for item in learned for document in item.documents]
    entry = {
        "path": source.path,
        "role": role,
        "sha256": file_sha256(data_path(source.path)),
        "weight": source.weight,
        "share": source.share,
        "format": source.format,
        "columns": source.columns,
        "training_examples": len(learned),
        "validation_examples": len(held),
        "training_tokens": sum(len(document.ids) for document in documents),
        "target_tokens": sum(sum(document.targets) for document in documents),
        "shortened": survey.shortened,
        "dropped": survey.dropped,
    }
    if sources:
        rows = [sources[row] for row in map(row_origin, learned or held) if row in sources]
        counts = Counter((row.file, row.role) for row in rows)
        entry["origins"] = [{"path": path, "role": role, "examples": n} for (path, role), n in counts.items()]
    if isinstance(survey, PreferenceSurvey):
        entry |= preference_counts(learned or held)
        entry |= {name: getattr(survey, name) for name in ("tied", "equal")}
    return entry
