"""Answers against references: every row is asked, and what the model writes is compared with the row's own answer.

A row is any that trains; its last answer is the reference, and what precedes it is asked as training asks it. An empty
answer is counted and scores nothing. One that was cut off at the limit is counted too: its words are compared as far
as they go, but it matches no reference and has no form, since more would have followed.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitune.data.examples import encode_record
from minitune.data.formats import Record
from minitune.decoding import Answer, Prompt, generate_texts
from minitune.errors import ConfigError, DataError, nearest
from minitune.evaluation.bleu import bleu_statistics
from minitune.evaluation.bootstrap import Statistics, mean_of, ratio, ratio_of
from minitune.evaluation.chrf import chrf_plus_plus_statistics, chrf_statistics
from minitune.evaluation.compliance import answer_form
from minitune.evaluation.likelihood import likelihoods
from minitune.evaluation.rouge import KINDS, rouge
from minitune.evaluation.scores import Measured, share
from minitune.evaluation.sets import Verifier, rows_of, verifier_of
from minitune.evaluation.text_metrics import distinct_n, exact_match, pass_at_k, repetition
from minitune.evaluation.verifier import load_verifier, takes_reference, verified
from minitune.model.transformer import Transformer
from minitune.sampling import Sampling
from minitune.text.tokenizer import Tokenizer

GROUPS = {"rouge": KINDS, "likelihood": ("token_accuracy", "perplexity", "bits_per_byte")}
VERIFIED = ("verified", "score")
METRICS = (
    "exact_match",
    *VERIFIED,
    *KINDS,
    "bleu",
    "chrf",
    "chrf++",
    "format",
    "length",
    "repetition",
    *GROUPS["likelihood"],
)
PASS = re.compile(r"pass@([1-9]\d{0,5})")
DEFAULT = "exact_match,rouge,bleu,chrf,length,repetition"
DEFAULT_VERIFIED = "verified,score,exact_match,length,repetition"


@dataclass(frozen=True)
class References:
    """What to measure: the rows, the names of the metrics, and the form that "format" asks of an answer.

    `verify` scores an answer to a row; 1 or more is right. For pass@k each row is answered `samples` times at a
    `temperature`; an answer passes where it is right, or where nothing verifies, where it is the reference.
    """

    rows: tuple[Record, ...]
    metrics: tuple[str, ...]
    form: Callable[[str], bool] | None = None
    verify: Verifier | None = None
    samples: int = 10
    temperature: float = 0.8

    @property
    def passes(self) -> tuple[int, ...]:
        """Every k of pass@k."""
        return tuple(int(name.removeprefix("pass@")) for name in self.metrics if PASS.fullmatch(name))

    @property
    def asks(self) -> bool:
        """Whether a metric needs the one greedy answer to each row."""
        return any(name not in GROUPS["likelihood"] and not PASS.fullmatch(name) for name in self.metrics)


def metric_names(text: str) -> tuple[str, ...]:
    """Return the metrics that a list such as rouge,bleu names, groups written out, each once.

    Raises ConfigError for an unknown name or none.
    """
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in METRICS and name not in GROUPS and not PASS.fullmatch(name):
            known = [*METRICS, "pass@1", *GROUPS]
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"there is no metric '{name}'{hint}")
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def read_references(
    path: str | Path,
    metrics: str | None = None,
    form: str | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    verifier: str | None = None,
) -> References:
    """Return what to measure of a data file or a set.

    Args:
        path: rows in any format that trains but text, or a set's name as `sets.rows_of` has it.
        metrics: their names, as rouge,bleu; None takes `DEFAULT`, or `DEFAULT_VERIFIED` where answers are verified,
            and "format" where there is a form.
        form: see `compliance.answer_form`; it belongs to the metric "format".
        samples: answers to each row, for pass@k (default 10).
        temperature: at which they are drawn (default 0.8, that of Chen et al. 2021 for k = 100), above 0.
        verifier: a function as package.module:function, for the metrics "verified" (1 or more), "score" and pass@k;
            None takes that of the set, if it brings one.

    Raises:
        DataError: a row is malformed or has no reference, with file:line and the number of others. ConfigError: an
        unknown metric, an option without the metric that it belongs to, or k over the samples.
    """
    verify = _verifier(verifier) if verifier else verifier_of(str(path))
    names = metric_names(metrics or (DEFAULT_VERIFIED if verify else DEFAULT) + ",format" * (form is not None))
    if verify is None and set(VERIFIED) & set(names):
        raise ConfigError(f"the metrics {' and '.join(VERIFIED)} need a verifier; name one, as package.module:function")
    if verifier and not (set(VERIFIED) & set(names) or any(map(PASS.fullmatch, names))):
        raise ConfigError(
            "verifier is set without a metric that it belongs to: verified, score or pass@k; leave it out"
        )
    if ("format" in names) != (form is not None):
        raise ConfigError("the metric format and the option answer_form belong together; give both or neither")
    complies = answer_form(form) if form else None
    rows = rows_of(path)
    if rows[0].text is not None:
        raise DataError(f"{rows[0].origin}: a text without question and answer; references need both")
    task = References(tuple(rows), names, complies, verify)
    given = {key: value for key, value in (("samples", samples), ("temperature", temperature)) if value is not None}
    if given and not task.passes:
        raise ConfigError(f"{next(iter(given))} is set without a metric pass@k, which it belongs to; leave it out")
    task = replace(task, **given)
    if not task.temperature > 0:
        raise ConfigError(f"temperature is {task.temperature}; above 0 only do samples differ")
    if task.samples < max(task.passes, default=1):
        raise ConfigError(f"samples is {task.samples}; pass@{max(task.passes)} needs at least {max(task.passes)}")
    return task


def _verifier(name: str) -> Verifier:
    """Return the user's function as a Verifier."""
    function = load_verifier(name)
    with_reference = takes_reference(function)

    def verify(row: Record, text: str) -> float:
        prompt = row.prompt if row.messages is None else list(row.messages[:-1])
        more = {"reference": reference_of(row)} if with_reference else {}
        return verified(function, row.origin, prompt, text, **more)

    return verify


def reference_of(record: Record) -> str:
    """Return the answer that a row gives, without what Alpaca's prompt text puts around it."""
    return record.completion if record.messages is None else record.messages[-1]["content"]


def prompt_of(record: Record, tokenizer: Tokenizer) -> tuple[Prompt, bool]:
    """Return what precedes a row's last answer and whether it is continued as plain text, as training has it.

    A row that ends with a question, as `data.prompts` reads it, is asked as it is.
    """
    if record.messages is not None and (tokenizer.chat_template is not None or record.prompt is None):
        return record.messages[: -1 if record.messages[-1]["role"] == "assistant" else None], False
    return record.prompt, True


def ask(
    model: Transformer, tokenizer: Tokenizer, rows: Sequence[Record], *, batch_size: int = 32, **options: Any
) -> list[Answer]:
    """Return an answer to every row's question, greedy by default.

    `options` are those of `generate_texts`, whose errors these are too; DataError where some rows are text to continue
    and others are messages.
    """
    prompts = [prompt_of(record, tokenizer) for record in rows]
    raw = prompts[0][1]
    for record, (_, other) in zip(rows, prompts, strict=True):
        if other != raw:
            kinds = ("messages", "a text to continue")
            found = f"{record.origin}: {kinds[other]} in a file that begins with {kinds[raw]}"
            raise DataError(f"{found}; the two are asked differently: keep them in two files")
    return generate_texts(
        model, tokenizer, [prompt for prompt, _ in prompts], raw=raw, batch_size=batch_size, **options
    )  # fmt: skip


def ask_repeatedly(model: Transformer, tokenizer: Tokenizer, task: References, **options: Any) -> list[list[Answer]]:
    """Return `task.samples` sampled answers to every row; arguments and errors as in `ask`."""
    rows = [record for record in task.rows for _ in range(task.samples)]
    found = ask(model, tokenizer, rows, sampling=Sampling(temperature=task.temperature), **options)
    return [found[start : start + task.samples] for start in range(0, len(found), task.samples)]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return counts of a model's answers: rows, empty and cut off ones, and the variety of all (no interval)."""
    texts = [answer.text for answer in answers]
    return {
        "rows": len(texts),
        "empty": sum(not text.strip() for text in texts),
        "cut_off": sum(not answer.finished for answer in answers),
        "distinct_1": round(distinct_n(texts, 1), 4),
        "distinct_2": round(distinct_n(texts, 2), 4),
    }


def score_answers(task: References, answers: Sequence[Answer]) -> dict[str, Measured]:
    """Return the metrics that need answers, by name; a pure function of texts."""
    texts, references = [answer.text.strip() for answer in answers], [[reference_of(row)] for row in task.rows]
    overlaps = [rouge(*pair) for pair in zip(texts, references, strict=True)] if set(KINDS) & {*task.metrics} else []

    def ended(test: Callable[[int], bool]) -> Measured:
        return share([answer.finished and bool(texts[row]) and test(row) for row, answer in enumerate(answers)])

    verifies = bool({*VERIFIED} & {*task.metrics})
    scores = [score_of(task, *pair) for pair in zip(task.rows, answers, strict=True)] if verifies else []
    makers: dict[str, Callable[[], Measured]] = {
        "exact_match": lambda: ended(lambda row: exact_match(texts[row], references[row])),
        "verified": lambda: share([score >= 1 for score in scores]),
        "score": lambda: Measured(mean_of(scores)),
        "format": lambda: ended(lambda row: task.form(texts[row])),
        "bleu": lambda: Measured(bleu_statistics(texts, references)),
        "chrf": lambda: Measured(chrf_statistics(texts, references)),
        "chrf++": lambda: Measured(chrf_plus_plus_statistics(texts, references)),
        "length": lambda: Measured(mean_of([answer.tokens for answer in answers]), better=None),
        "repetition": lambda: Measured(mean_of([repetition(text) for text in texts]), better="lower"),
    } | {kind: lambda kind=kind: Measured(mean_of([found[kind].f for found in overlaps])) for kind in KINDS}
    return {name: makers[name]() for name in task.metrics if name in makers}


def score_of(task: References, row: Record, answer: Answer) -> float:
    """Return how right an answer is, 0 to 1, by the verifier or, without one, by being the reference.

    One that is empty or was cut off is not right, whatever a verifier would say; scores outside count as 0 or 1.
    """
    if not answer.finished or not answer.text.strip():
        return 0.0
    if task.verify is None:
        return float(exact_match(answer.text, [reference_of(row)]))
    return min(1.0, max(0.0, task.verify(row, answer.text.strip())))


def score_passes(task: References, samples: Sequence[Sequence[Answer]]) -> dict[str, Measured]:
    """Return pass@k for every k asked for, from several answers to each row."""
    right = [
        sum(score_of(task, row, one) >= 1 for one in answers) for row, answers in zip(task.rows, samples, strict=True)
    ]
    chances = {k: [pass_at_k(len(samples[0]), count, k) for count in right] for k in task.passes}
    return {f"pass@{k}": Measured(mean_of(found)) for k, found in chances.items()}


def score_likelihood(
    model: Transformer,
    tokenizer: Tokenizer,
    task: References,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    """Return the metrics that read the references themselves, by name; nothing is read where none is asked for.

    Token accuracy and perplexity count a reference's tokens with the one that ends it; bits per byte divides the same
    loss by the bytes of its text, so that models with other tokenizers compare:

        perplexity = exp(loss / tokens),   bits per byte = loss / (ln 2 bytes)

    Errors as in `encode_record` and `likelihoods`.
    """
    names = [name for name in task.metrics if name in GROUPS["likelihood"]]
    if not names:
        return {}
    examples = [encode_record(record, tokenizer, "last") for record in task.rows]
    found = likelihoods(model, examples, batch_size=batch_size, on_batch=on_batch)
    losses, tokens = [-one.log_probability for one in found], [one.tokens for one in found]
    per_token, bits = ratio_of(losses, tokens), [loss / math.log(2) for loss in losses]
    sizes = [len(reference_of(record).encode()) for record in task.rows]
    made = {
        "token_accuracy": Measured(ratio_of([one.right for one in found], tokens)),
        "perplexity": Measured(Statistics(per_token.rows, lambda sums: torch.exp(ratio(sums))), better="lower"),
        "bits_per_byte": Measured(ratio_of(bits, sizes), better="lower"),
    }
    return {name: made[name] for name in names}
