"""Multiple choice by log-likelihood: the model is not asked to write, it says which of the given answers is likeliest.

    plain     argmax_j log p(a_j | x)
    norm      argmax_j log p(a_j | x) / characters of a_j        lm-evaluation-harness: acc_norm
    bytes     argmax_j log p(a_j | x) / UTF-8 bytes of a_j                              acc_bytes

Plain favours short answers, as every token costs probability. These are lm-evaluation-harness's acc, acc_norm and
acc_bytes: of equal scores the first counts, the lengths are of the choices without the space before them. As there,
a text is continued by " " + choice, both encoded together, and what the ids have beyond the prompt's is the choice;
with a chat template the choice is the assistant's answer, without its end-of-turn token.

A model's confidence is the softmax of the plain scores over the choices of a row; calibration compares it with how
often the likeliest one is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitune.data.examples import Example, encode_record
from minitune.data.formats import Format, Record, RowSource, check_chat, filled, read_records, read_turns, text_field
from minitune.data.reading import RowError
from minitune.decoding import Prompt
from minitune.errors import DataError
from minitune.evaluation.calibration import calibration_statistics
from minitune.evaluation.likelihood import likelihoods
from minitune.evaluation.scores import Measured, share
from minitune.model.transformer import Transformer
from minitune.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A question, what may be answered, and the number, from 0, of the right choice. The others are as in Record."""

    origin: str
    prompt: Prompt
    choices: tuple[str, ...]
    answer: int
    format: str = ""
    document: bool = False
    unread: tuple[str, ...] = ()
    source: RowSource | None = None


def read_choices(path: str | Path) -> list[Question]:
    """Return the questions of a file: rows {"prompt", "choices", "answer"}.

    The prompt is a text or a list of turns that ends with the user's; the answer is one of the choices, or its number
    from 0. Raises DataError with file:line for the first bad row and the number of others.
    """
    return read_records(path, formats={"choices": Format(("prompt", "choices", "answer"), (), _parse)})


def _parse(fields: dict[str, Any], origin: str) -> Question:
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise RowError(origin, "the field 'choices' is no list of two texts or more", 'write ["one", "another"]')
    if len(set(choices)) < len(choices):
        raise RowError(origin, "a choice is given twice", "remove one of them or the row")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise RowError(origin, "the field 'answer' is none of the choices", "write its text, or its number from 0")
    if isinstance(fields.get("prompt"), list):
        turns = [*read_turns(fields["prompt"], "prompt", origin), {"role": "assistant", "content": choices[0]}]
        prompt = check_chat(turns, "", origin)[:-1]
    else:
        prompt = filled(text_field(fields, "prompt", origin), "a question", "prompt", origin)
    return Question(origin, prompt, tuple(choices), answer)


def score_choices(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    """Return accuracy, accuracy_norm, accuracy_bytes and calibration_error by name.

    Args:
        model: the model.
        tokenizer: its tokenizer; texts are asked as a user's message where it has a chat template.
        questions: the rows.
        batch_size: choices read at once.
        on_batch: called after each batch with its number of choices.

    Raises:
        DataError: a question does not fit the model, or turns are given to a tokenizer without chat template.
    """
    examples = [encode_choice(tokenizer, row, choice) for row in questions for choice in row.choices]
    found = iter(likelihoods(model, examples, batch_size=batch_size, on_batch=on_batch))
    scores = [[next(found).log_probability for _ in row.choices] for row in questions]
    return measure_choices(scores, [row.choices for row in questions], [row.answer for row in questions])


def measure_choices(
    scores: Sequence[Sequence[float]], choices: Sequence[Sequence[str]], answers: Sequence[int]
) -> dict[str, Measured]:
    """Return the metrics of log-likelihoods, a list for each row's choices; a pure function."""
    sizes: dict[str, Callable[[str], int]] = {
        "accuracy": lambda choice: 1, "accuracy_norm": len, "accuracy_bytes": lambda choice: len(choice.encode()),
    }  # fmt: skip
    made = {}
    for name, size in sizes.items():
        normed = [[s / size(c) for s, c in zip(*row, strict=True)] for row in zip(scores, choices, strict=True)]
        made[name] = share([row.index(max(row)) == answer for row, answer in zip(normed, answers, strict=True)])
    confidences = [torch.tensor(row, dtype=torch.float64).softmax(0).max().item() for row in scores]
    calibration = calibration_statistics(confidences, made["accuracy"].right)
    return made | {"calibration_error": Measured(calibration, better="lower")}


def encode_choice(tokenizer: Tokenizer, row: Question, choice: str) -> Example:
    """Return the ids of a question with one of its choices, whose tokens are the targets."""
    if isinstance(row.prompt, str) and tokenizer.chat_template is None:
        bare = row.prompt.rstrip()  # white space at the prompt's end begins the choice
        ids, context = tokenizer.encode(f"{row.prompt} {choice}"), len(tokenizer.encode(bare))
        if context >= len(ids):
            raise DataError(f"{row.origin}: the choice {choice!r} adds no token to the prompt; reword the row")
        return Example(tuple(ids), tuple(place >= max(context, 1) for place in range(len(ids))), row.origin)
    prompt = ({"role": "user", "content": row.prompt},) if isinstance(row.prompt, str) else row.prompt
    answer = {"role": "assistant", "content": choice}
    example = encode_record(Record(row.origin, "", messages=(*prompt, answer)), tokenizer, "last")
    targets = [target and id not in tokenizer.end_ids for id, target in zip(example.ids, example.targets, strict=True)]
    end = len(targets) - targets[::-1].index(True) if True in targets else 0
    return Example(example.ids[:end], tuple(targets[:end]), row.origin)
