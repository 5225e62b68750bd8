"""Records -> examples: token ids, and for each token whether it is learned.

A chat is rendered with the model's own template and its answers are the targets, each through its end-of-turn
token. Prompt and completion are encoded apart, as they are at inference, and the completion and its end token
are the targets. Of a text every token is a target. Token 0 of an example never is: nothing precedes it.
Without a chat template an alpaca row becomes Alpaca's prompt text and its answer; other chats are refused.

Nothing is cut by default. A row over `max_length` is an error that gives the count and the percentiles, as
peers' silent truncation loses the end-of-turn token, and with it the model's ability to stop. By choice:

- "prompt" cuts what precedes the first target, from its left: of a chat the oldest exchanges before that
  answer, whole, then the beginning of the last question (system and answers stay whole); of a prompt its
  beginning, after the BOS. At least one token stays before the answer, which itself is never cut.
- "split" cuts texts into windows, as is always done with a .txt file. Windows share one token, the last of
  one being the first of the next, so that every token is a target exactly once.
- "drop" leaves over-long rows out.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minitune.data.formats import Record
from minitune.data.reading import RowError, first_of
from minitune.errors import ConfigError, DataError, counted

Truncate = Literal["error", "prompt", "split", "drop"]
TrainOn = Literal["all", "last"]
_REMEDY = {
    "error": "raise max_length, choose truncate (prompt, split for texts, or drop), or shorten them",
    "prompt": "their answers alone do not fit: raise max_length, remove them, or (texts) choose truncate split",
    "split": "only texts are split: raise max_length, remove them, or choose truncate prompt or drop",
    "drop": "no row is left: raise max_length",
}


@dataclass(frozen=True)
class Example:
    """Token ids of one document; `targets[i]` says that token i is to be predicted from those before it."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    origin: str

    @property
    def documents(self) -> tuple["Example", ...]:
        """Return the documents of this item of the data: itself alone (a preference pair has two)."""
        return (self,)

    @property
    def scored(self) -> tuple["Example", ...]:
        """Return the documents that a reference model scores; see `preferences.Judged`."""
        return self.documents

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the ids before the first target."""
        return self.ids[: self.targets.index(True)]


@dataclass
class Survey:
    """What became of records: the examples, and what stands in the way.

    `lengths` holds the tokens of every row before anything is cut (of a .txt file: of its windows).
    """

    max_length: int
    truncate: Truncate
    examples: list[Any] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    over_long: list[tuple[str, int]] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    shortened: int = 0
    dropped: int = 0

    def __post_init__(self):
        """Refuse impossible options."""
        if self.max_length < 2:
            raise ConfigError(f"max_length {self.max_length}: must be at least 2, a token and the one it predicts")
        if self.truncate not in _REMEDY:
            raise ConfigError(f"truncate '{self.truncate}': choose one of {', '.join(_REMEDY)}")

    def collect(self, records: Iterable[Any], encode: Callable[[Any], list[Any]]) -> None:
        """Add what `encode` makes of each record, or the RowError that it raises."""
        from tqdm import tqdm

        for record in tqdm(records, desc="tokenise", unit=" rows", disable=None, leave=False, delay=0.5):
            try:
                self.examples += encode(record)
            except RowError as error:
                self.errors.append(error)
        if self.truncate == "drop" and self.examples:
            self.dropped, self.over_long = len(self.over_long), []

    @property
    def remedy(self) -> str:
        """What to do about rows that are still over-long."""
        return _REMEDY[self.truncate]

    def problem(self) -> str | None:
        """Return why these records cannot be trained on, in one line, or None."""
        if self.errors:
            return first_of(self.errors)
        if self.over_long:
            share = ", ".join(f"{p}% {n}" for p, n in percentiles(self.lengths).items())
            long, rows = len(self.over_long), counted(len(self.lengths), "row")
            count = f"{'all' if 1 < long == len(self.lengths) else f'{long} of'} {rows} {'is' if long == 1 else 'are'}"
            first = ", ".join(f"{origin} ({length})" for origin, length in self.over_long[:3])
            found = f"{count} over max_length {self.max_length} (tokens: {share}); first: {first}"
            return f"{found}; {self.remedy}"
        return None if self.examples else "no row to train on; give a file with rows"


def build_examples(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int,
    truncate: Truncate = "error",
    train_on: TrainOn = "all",
) -> list[Example]:
    """Return the examples of `records`, each of 2 to `max_length` tokens with at least one target.

    `train_on` "last" learns only the last answer of a chat. Raises DataError for rows that cannot be encoded
    and for those over `max_length` that `truncate` does not provide for, with count, percentiles and origins.
    """
    survey = survey_examples(records, tokenizer, max_length=max_length, truncate=truncate, train_on=train_on)
    if problem := survey.problem():
        raise DataError(problem)
    return survey.examples


def survey_examples(
    records: Iterable[Record], tokenizer: Any, *, max_length: int, truncate: Truncate, train_on: TrainOn
) -> Survey:
    """Do the work of `build_examples` but collect what is wrong instead of raising."""
    survey = Survey(max_length, truncate)

    def encode(record: Record) -> list[Example]:
        example = encode_record(record, tokenizer, train_on)
        parts = list(fitted(record, example, tokenizer, survey, train_on))
        survey.lengths += [len(part.ids) for part in parts] if record.document else [len(example.ids)]
        return parts

    survey.collect(records, encode)
    return survey


def encode_record(record: Record, tokenizer: Any, train_on: TrainOn = "all") -> Example:
    """Return the whole, uncut example of a record; raises RowError when it cannot be one."""
    try:
        ids, targets = _encode(record, tokenizer, train_on)
    except RowError:
        raise
    except DataError as error:  # the template refuses the row; a template that is itself at fault raises on
        raise RowError(record.origin, str(error), "correct the row") from None
    targets = [False, *targets[1:]]
    if not any(targets):
        raise RowError(record.origin, "a row without an answer", "nothing in it would be learned; remove it")
    shared = _shared_ids(tokenizer.vocab_size)
    return Example(tuple(shared[i] for i in ids), tuple(targets), record.origin)


@functools.lru_cache(maxsize=1)
def _shared_ids(vocab_size: int) -> list[int]:
    """Return one int object per id, for all examples: 8 bytes a token instead of 36."""
    return list(range(vocab_size))


def _encode(record: Record, tokenizer: Any, train_on: TrainOn) -> tuple[list[int], list[bool]]:
    """Return ids and targets by the kind of record."""
    if record.messages is not None and tokenizer.chat_template is not None:
        return _encode_chat(record, tokenizer, train_on)
    if record.prompt is None and record.text is None:
        remedy = "use an instruct model, or prompt/completion rows"
        raise RowError(record.origin, "a chat, but the tokenizer has no chat template", remedy)
    if record.text is not None:
        ids = tokenizer.encode(record.text) + [tokenizer.eos_id]
        return ids, [True] * len(ids)
    prompt = tokenizer.encode(record.prompt)
    answer = tokenizer.encode_run(record.completion, "inside") + [tokenizer.eos_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _encode_chat(record: Record, tokenizer: Any, train_on: TrainOn) -> tuple[list[int], list[bool]]:
    """Render a chat; the answers among its first `context` messages are no targets."""
    from minitune.text.chat import render_chat

    messages = list(record.messages)
    if record.context == len(messages) - 1:
        train_on = "last"
    rendered = render_chat(tokenizer, messages, train_on=train_on)
    start = 0
    if train_on == "all" and record.context:
        start = len(render_chat(tokenizer, messages[: record.context], add_generation_prompt=True).ids)
    return rendered.ids, [False] * start + rendered.targets[start:]


def fitted(record: Record, example: Example, tokenizer: Any, survey: Survey, train_on: TrainOn) -> Iterator[Example]:
    """Yield the example as it is, or what `truncate` makes of it; note it in `survey` when it does not fit."""
    limit = survey.max_length
    if len(example.ids) <= limit:
        yield example
    elif record.text is not None and (record.document or survey.truncate == "split"):
        survey.shortened += not record.document
        yield from _windows(example, limit)
    elif survey.truncate == "prompt" and (cut := _cut_prompt(record, example, tokenizer, limit, train_on)):
        survey.shortened += 1
        yield cut
    else:
        survey.over_long.append((example.origin, len(example.ids)))


def _windows(example: Example, limit: int) -> Iterator[Example]:
    """Cut a text into windows of at most `limit` tokens that share one token with the next."""
    for number, start in enumerate(range(0, len(example.ids) - 1, limit - 1), 1):
        part = slice(start, start + limit)
        targets = (False, *example.targets[part][1:])
        yield Example(example.ids[part], targets, f"{example.origin} (window {number})")


def row_origin(example: Example) -> str:
    """Return the origin of the row that an example, or the window that it is, comes from."""
    return re.sub(r" \(window \d+\)$", "", example.origin)


def _cut_prompt(record: Record, example: Example, tokenizer: Any, limit: int, train_on: TrainOn) -> Example | None:
    """Shorten what precedes the first target, or return None when that does not suffice."""
    if record.messages is not None and tokenizer.chat_template is not None:
        return _cut_chat(record, tokenizer, limit, train_on)
    if record.text is not None:
        return None
    head = int(example.ids[0] == tokenizer.bos_id)
    answer = len(example.ids) - example.targets.index(True)
    if answer + max(head, 1) > limit:
        return None
    start = len(example.ids) - (limit - head)
    return Example(
        example.ids[:head] + example.ids[start:], example.targets[:head] + example.targets[start:], example.origin
    )


def _cut_chat(record: Record, tokenizer: Any, limit: int, train_on: TrainOn) -> Example | None:
    """Drop exchanges before the first target, oldest first, then cut the last question from its left."""
    messages = list(record.messages)
    first = int(messages[0]["role"] == "system")
    answer = len(messages) - 1 if train_on == "last" else max(record.context, first + 1)

    def encoded(kept: list[dict[str, str]], context: int) -> Example:
        return encode_record(replace(record, messages=tuple(kept), context=context), tokenizer, train_on)

    while answer - first > 2:
        del messages[first : first + 2]
        answer -= 2
        example = encoded(messages, answer)
        if len(example.ids) <= limit:
            return example
    question = tokenizer.encode(messages[answer - 1]["content"], bos=False)
    keep = len(question)
    while keep > 0:
        text = tokenizer.decode(question[-keep:]).lstrip("\ufffd")  # a character may have been cut in two
        messages[answer - 1] = {"role": "user", "content": text}
        example = encoded(messages, answer)
        excess = len(example.ids) - limit
        if excess <= 0 and text.strip():
            return example
        keep -= max(excess, 1)
    return None


def percentiles(lengths: Sequence[int], shares: tuple[int, ...] = (50, 90, 99, 100)) -> dict[int, int]:
    """Return the nearest-rank percentiles: the smallest length that at least that share of rows is within."""
    ordered = sorted(lengths)
    return {share: ordered[max(-(-len(ordered) * share // 100) - 1, 0)] for share in shares if ordered}
