"""The data of a run: files -> training and validation examples -> an endless, seekable stream of batches.

Rows held out for validation are chosen by a hash of their question, so duplicates never stand on both sides,
and adding rows to a file moves none of the old ones. The stream is a function of (seed, epoch, index) alone:
a resumed run asks for batch i and gets the same rows as a run that was never interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitune.data.batching import Batch, collate, mix, plan_batches
from minitune.data.examples import Example, build_examples
from minitune.data.formats import Record, read_records
from minitune.data.splits import question_key, split_by_hash
from minitune.errors import DataError
from minitune.training.config import Source, TrainConfig
from minitune.training.state import file_sha256


@dataclass(frozen=True)
class Corpus:
    """Training examples by source with their weights, validation examples, and one entry per file."""

    training: list[tuple[list[Example], float | None]]
    validation: list[Example]
    files: list[dict[str, Any]]


def load_corpus(config: TrainConfig, tokenizer: Any) -> Corpus:
    """Read, split and encode the files of a resolved config.

    Raises DataError for a file or row that cannot be used, and when no row is left to train on.
    """
    training, validation, files = [], [], []
    for source in config.data:
        learned, held = _split(_records(source), source, config, tokenizer)
        training.append((learned, source.weight))
        validation += held
        files.append(_entry(source, "training", learned, held))
    for source in config.validation or ():
        held = _encode(_records(source), config, tokenizer)
        validation += held
        files.append(_entry(source, "validation", [], held))
    if not any(examples for examples, _ in training):
        raise DataError("no row is left to train on; lower validation_fraction or give more rows")
    return Corpus([(examples, weight) for examples, weight in training if examples], validation, files)


def epoch_batches(corpus: Corpus, config: TrainConfig, epoch: int) -> tuple[list[Example], list[list[list[int]]]]:
    """Return an epoch's examples and its plan: batches of rows of indices into them."""
    examples = mix(corpus.training, seed=config.seed, epoch=epoch)
    return examples, _plan(examples, config, config.seed, epoch)


def count_batches(corpus: Corpus, config: TrainConfig) -> int:
    """Return the number of micro-batches of the whole run."""
    if config.max_steps is not None:
        return config.max_steps * config.accumulation_steps
    sizes = [len(epoch_batches(corpus, config, epoch)[1]) for epoch in range(-int(-config.epochs // 1))]
    partial = config.epochs % 1
    return max(1, sum(sizes) if not partial else sum(sizes[:-1]) + round(partial * sizes[-1]))


def stream_batches(corpus: Corpus, config: TrainConfig, pad_id: int, start: int) -> Iterator[Batch]:
    """Yield micro-batches without end, epoch after epoch, beginning with number `start` of the run."""
    epoch = 0
    while True:
        examples, plan = epoch_batches(corpus, config, epoch)
        for rows in plan[start:]:
            yield collate([[examples[i] for i in row] for row in rows], pad_id)
        start, epoch = max(0, start - len(plan)), epoch + 1


def validation_batches(corpus: Corpus, config: TrainConfig, pad_id: int) -> Iterator[Batch]:
    """Yield the validation examples, each once, always in the same batches."""
    for rows in _plan(corpus.validation, config, 0, 0):
        yield collate([[corpus.validation[i] for i in row] for row in rows], pad_id)


def _plan(examples: list[Example], config: TrainConfig, seed: int, epoch: int) -> list[list[list[int]]]:
    return plan_batches(
        [len(example.ids) for example in examples],
        batch_size=config.batch_size,
        max_length=config.max_length,
        packing=config.packing,
        seed=seed,
        epoch=epoch,
    )


def _records(source: Source) -> list[Record]:
    return read_records(source.path, source.format, source.columns)


def _encode(records: list[Record], config: TrainConfig, tokenizer: Any) -> list[Example]:
    return build_examples(
        records, tokenizer, max_length=config.max_length, truncate=config.truncate, train_on=config.train_on
    )


def _split(records: list[Record], source: Source, config: TrainConfig, tokenizer: Any) -> tuple[list, list]:
    """Return (training, validation) examples; windows of one long text are held out by their place in it."""
    share = config.validation_fraction
    if not share:
        return _encode(records, config, tokenizer), []
    fractions = {"training": 1 - share, "validation": share}
    if any(record.document for record in records):
        parts = split_by_hash(_encode(records, config, tokenizer), fractions, config.seed, lambda e: e.origin)
        return parts["training"], parts["validation"]
    parts = split_by_hash(records, fractions, config.seed, question_key)
    learned, held = (_encode(part, config, tokenizer) if part else [] for part in parts.values())
    return learned, held


def _entry(source: Source, role: str, learned: list[Example], held: list[Example]) -> dict[str, Any]:
    """Describe a file for the run folder."""
    return {
        "path": source.path,
        "role": role,
        "sha256": file_sha256(source.path),
        "weight": source.weight,
        "format": source.format,
        "columns": source.columns,
        "training_examples": len(learned),
        "validation_examples": len(held),
        "training_tokens": sum(len(example.ids) for example in learned),
        "target_tokens": sum(sum(example.targets) for example in learned),
    }
