"""Classification by generated answer: the model is asked, and what it writes must be a label.

Two questions are kept apart. Accuracy asks whether the answer is the right label when case, white space and
punctuation around it are not looked at: "Positive." is positive, "It is positive" is no label and never right.
Format compliance asks for exactly a label. Counting "Positive." as wrong was rejected: it makes a base model look
worse than it is, and the gain of fine-tuning bigger. So was scoring the labels' probabilities: it hides that a
model does not answer in the form that was asked for.
"""

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.formats import Record
from minitune.decoding import Prompt, generate_texts
from minitune.errors import ConfigError, DataError, nearest
from minitune.evaluation.bootstrap import interval
from minitune.evaluation.metrics import (
    OTHER,
    accuracy,
    confusion_matrix,
    f1_statistics,
    macro_f1,
    micro_f1,
    wilson_interval,
)
from minitune.evaluation.scores import Measured, share
from minitune.evaluation.sets import rows_of
from minitune.model.transformer import Transformer
from minitune.text.tokenizer import Tokenizer

CUT = " [cut off]"


@dataclass(frozen=True)
class LabelledPrompt:
    """A question whose right answer is `label`; `raw` prompts are continued without a chat template."""

    prompt: Prompt
    label: str
    origin: str
    raw: bool = False


@dataclass(frozen=True)
class Classification:
    """How well answers match labels.

    `confusion` has a row per right label and a column per answered label, the last column for any other
    answer, read without case and punctuation; `format_compliance` is the share of answers that are exactly a
    label but for white space around them; `accuracy_interval` is Wilson's 95% interval, those of F1 are by bootstrap
    over rows, None where all rows are alike; `other_answers` are the most frequent answers that are not exactly a
    label, with counts; `empty` counts those that said nothing, which are among them.
    """

    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float] | None
    micro_f1: float
    micro_f1_interval: tuple[float, float] | None
    format_compliance: float
    labels: tuple[str, ...]
    confusion: list[list[int]]
    other_answers: list[tuple[str, int]]
    empty: int


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels without white space around them; raises ConfigError for under two, empty or doubled."""
    cleaned = tuple(label.strip() for label in labels)
    if len(cleaned) < 2 or "" in cleaned or len(set(cleaned)) < len(cleaned) or OTHER in cleaned:
        raise ConfigError(
            f"labels are {', '.join(map(repr, cleaned)) or 'missing'}; give at least two different ones, "
            f"as in positive,negative ('{OTHER}' is the name for answers outside them)"
        )
    return cleaned


def read_labelled(path: str | Path, labels: Sequence[str]) -> list[LabelledPrompt]:
    """Return the rows of a data file, or of a set as `sets.rows_of` has it, whose answers are labels.

    The last answer of a chat, or the completion of a prompt, is the label; any format but text will do.
    Raises DataError with file:line for a row without one, ConfigError for bad labels.
    """
    labels = check_labels(labels)
    return [_labelled(record, labels) for record in rows_of(path)]


def _labelled(record: Record, labels: tuple[str, ...]) -> LabelledPrompt:
    """Split a record into question and label."""
    if record.messages is None and record.prompt is None:
        raise DataError(f"{record.origin}: a text without question and answer; classification needs both")
    raw = record.messages is None
    prompt, answer = (
        (record.prompt, record.completion) if raw else (record.messages[:-1], record.messages[-1]["content"])
    )
    label = answer.strip()
    if label not in labels:
        raise DataError(
            f"{record.origin}: the answer '{label[:60]}' is not one of the labels {', '.join(labels)}"
            f"{nearest(label, labels)}; correct the row or the labels"
        )
    return LabelledPrompt(prompt, label, record.origin, raw)


def classify(
    model: Transformer, tokenizer: Tokenizer, rows: Sequence[LabelledPrompt], labels: Sequence[str], **options: Any
) -> Classification:
    """Ask every question and compare the answers with the labels; arguments and errors as in `ask_labels`."""
    predicted = ask_labels(model, tokenizer, rows, labels, **options)
    return summarize([row.label for row in rows], predicted, check_labels(labels))


def ask_labels(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[LabelledPrompt],
    labels: Sequence[str],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Return what the model answers to every question, without white space around it.

    An answer that was cut off ends in `CUT`, so that its beginning is never taken for a label.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rows: the questions, all of one kind (`raw` or not).
        labels: the L labels.
        max_new_tokens: an answer that has not ended by then is no label; room for the longest label and more.
        batch_size: questions read at once.
        stop: an answer ends before the first of these strings too.
        on_batch: called after each batch with its number of rows.

    Raises:
        DataError: there are no rows, some are messages and others text to continue, or one does not fit the model.
        ConfigError: bad labels.
    """
    check_labels(labels)
    if not rows:
        raise DataError("there are no rows to classify; give a file with at least one")
    mixed = next((row for row in rows if row.raw != rows[0].raw), None)
    if mixed is not None:
        raise DataError(f"{mixed.origin}: messages and text to continue in one file; keep them in two files")
    answers = generate_texts(
        model, tokenizer, [row.prompt for row in rows],
        max_new_tokens=max_new_tokens, raw=rows[0].raw, batch_size=batch_size, stop=stop, on_batch=on_batch,
    )  # fmt: skip
    return [answer.text.strip() + ("" if answer.finished else CUT) for answer in answers]


def classification_metrics(
    expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, Measured]:
    """Return accuracy, macro_f1, micro_f1 and format_compliance by name, for comparing two models; a pure function."""
    meant = [_read(answer, labels) for answer in predicted]
    found = {"accuracy": share([answer == right for answer, right in zip(meant, expected, strict=True)])}
    for average, statistics in f1_statistics(expected, meant, labels).items():
        found[f"{average}_f1"] = Measured(statistics)
    return found | {"format_compliance": share([answer in labels for answer in predicted])}


def summarize(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Classification:
    """Count answers against the right labels and return every metric; a pure function."""
    meant = [_read(answer, labels) for answer in predicted]
    confusion = confusion_matrix(expected, meant, labels)
    statistics = f1_statistics(expected, meant, labels).items()
    f1 = {average: None if found.alike else interval(found) for average, found in statistics}
    rows, right = len(expected), sum(row[i] for i, row in enumerate(confusion))
    others = Counter(answer for answer in predicted if answer not in labels)
    exact = rows - others.total()
    return Classification(
        rows=rows,
        accuracy=accuracy(confusion),
        accuracy_interval=wilson_interval(right, rows),
        macro_f1=macro_f1(confusion),
        macro_f1_interval=f1["macro"],
        micro_f1=micro_f1(confusion),
        micro_f1_interval=f1["micro"],
        format_compliance=exact / rows,
        labels=tuple(labels),
        confusion=confusion,
        other_answers=others.most_common(5),
        empty=others[""],
    )


def _read(answer: str, labels: Sequence[str]) -> str:
    """Return the one label that the answer is but for case and what surrounds it, else the answer itself.

    Of labels that differ in such marks alone, as C and C++, it is the longest one that the answer has.
    """
    if answer in labels or answer.endswith(CUT):
        return answer
    meant = [label for label in labels if _bare(label) == _bare(answer) and label.casefold() in answer.casefold()]
    longest = [label for label in meant if len(label) == max(map(len, meant))]
    return longest[0] if len(longest) == 1 else answer


def _bare(text: str) -> str:
    """Return a text in lower case without the marks and white space around it, but with the minus of a number."""
    bare = text.strip(string.punctuation + string.whitespace)
    minus = "-" if bare[:1].isdigit() and text[: text.index(bare)].endswith("-") else ""
    return (minus + bare).casefold()
