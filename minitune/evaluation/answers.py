"""What models answer to the same prompts, from a model or from a file, as a reader and a judge see it.

A file of answers is what `python -m minitune.generate --input ... --output FILE` writes, a row for each prompt in
their order: {"answer"}, and if it is there "finished" and the "prompt" or "messages" that it answers, which must be
those of the row. Answers are paired by place: matching them by prompt alone was rejected, as prompts can repeat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.formats import Record
from minitune.data.reading import RowError, read_rows
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError, counted
from minitune.evaluation.references import ask
from minitune.model.transformer import Transformer
from minitune.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Duel:
    """Two answers to one prompt (as a reader sees it)."""

    prompt: str
    tuned: Reply
    base: Reply

    @property
    def identical(self) -> bool:
        """Whether nobody could tell them apart: equal but for white space around them, and in being whole."""
        return shown_answer(self.tuned) == shown_answer(self.base)


def shown_prompt(record: Record) -> str:
    """Return what a row asks: a single message's text, or the conversation with its roles."""
    return record.prompt if record.messages is None else shown_messages(record.messages)


def shown_messages(messages: Sequence[dict[str, Any]]) -> str:
    """Return a conversation as text; a single message without its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def shown_answer(reply: Reply) -> str:
    """Return an answer as a reader and a judge see it, with a mark where it is empty or was cut off."""
    text = reply.text.strip() or "[empty answer]"
    return text if reply.finished else f"{text} [cut off]"


def duels(records: Sequence[Record], tuned: Sequence[Reply], base: Sequence[Reply]) -> list[Duel]:
    """Return two models' answers to the same prompts, together."""
    return [Duel(shown_prompt(record), *pair) for record, *pair in zip(records, tuned, base, strict=True)]


def model_answers(
    model: Transformer, tokenizer: Tokenizer, records: Sequence[Record], *, max_new_tokens: int, batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Reply]:  # fmt: skip
    """Return a model's greedy answer to each prompt; errors as in `references.ask`."""
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "on_batch": on_batch}
    return [Reply(one.text, one.finished) for one in ask(model, tokenizer, records, **options)]


def read_answers(path: str | Path, records: Sequence[Record]) -> list[Reply]:
    """Return the answers of a file, one to each prompt.

    Raises DataError, naming the row, where one is malformed or answers another prompt, and for another number of rows.
    """
    rows = list(read_rows(path))
    if len(rows) != len(records):
        found = f"{counted(len(rows), 'answer')} to {counted(len(records), 'prompt')}"
        raise DataError(f"{path}: {found}; give one to each, in their order")
    return [_answer(origin, row, record) for (origin, row), record in zip(rows, records, strict=True)]


def _answer(origin: str, row: dict[str, Any] | RowError, record: Record) -> Reply:
    if isinstance(row, RowError):
        raise row
    text, finished = row.get("answer"), row.get("finished", True)
    if not isinstance(text, str) or not isinstance(finished, bool):
        raise DataError(f'{origin}: no answer; write {{"answer": text}}, with "finished": false where it was cut off')
    if isinstance(row.get("messages"), list):
        said = _said(row["messages"])
    else:
        said = [row["prompt"]] if isinstance(row.get("prompt"), str) else None
    if said not in (None, [record.prompt], _said(record.messages or ())):
        raise DataError(f"{origin}: the answer is to another prompt than that of {record.origin}; keep their order")
    return Reply(text, finished)


def _said(messages: Sequence[Any]) -> list[Any]:
    """Return what the turns say, but for the system's: it can be given apart."""
    return [turn.get("content") for turn in messages if isinstance(turn, dict) and turn.get("role") != "system"]


@dataclass(frozen=True)
class Asked:
    """Prompts and, where files give them, the answers: the tuned model's, or those and the base's; else models do."""

    records: Sequence[Record]
    given: tuple[list[Reply], ...] = ()

    @property
    def needs_model(self) -> bool:
        """Whether a model has to be loaded."""
        return not self.given

    @classmethod
    def of(cls, records: Sequence[Record], files: tuple[str, ...] | str | None) -> "Asked":
        """Read the answers from `files`; errors as `read_answers`, and ConfigError for more than two."""
        files = (files,) if isinstance(files, str) else tuple(files or ())
        if len(files) > 2:
            raise ConfigError(f"answers names {len(files)} files; give the tuned model's, or [tuned.jsonl,base.jsonl]")
        return cls(records, tuple(read_answers(file, records) for file in files))

    def both(self, tuned: list[Reply] | None, base: list[Reply] | None) -> tuple[list[Reply], list[Reply] | None]:
        """Return the answers of both models, from the files or as measured; None where there is no second one."""
        return (self.given[0], self.given[1] if self.given[1:] else None) if self.given else (tuned, base)
