"""Forgetting: what a model could do before its training, on general text and general questions, and can do no more.

    rise = perplexity of the tuned model / perplexity of the base - 1        on the same windows of text
    drop = accuracy of the base - accuracy of the tuned model                on the same questions

A verdict is one of

    kept                 the 95% interval of the loss ends below SLIGHT: more than that was surely not lost
    forgotten            the loss is sure, and above SEVERE
    slightly forgotten   the loss is sure, and not above that
    undecided            else: the rows are too few to tell

with (SLIGHT, SEVERE) of 5% and 20% of perplexity, 3 and 10 points of accuracy: conventions, below which hardly anybody
and above which everybody would notice. A rise is sure where the paired bootstrap over windows leaves out 0, a drop
where McNemar's test has p < 0.05. One threshold on the difference was rejected: it calls noise forgetting where there
are few rows.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minitune.data.reading import RowError, read_rows
from minitune.errors import DataError, counted
from minitune.evaluation.bootstrap import Statistics, paired_difference, ratio_of
from minitune.evaluation.choices import Question, score_choices
from minitune.evaluation.comparison import FEWEST, compare_right
from minitune.evaluation.perplexity import check_finite, window_losses
from minitune.evaluation.sets import is_set, provenance, questions_of
from minitune.model.transformer import Transformer
from minitune.sources import resolve
from minitune.text.tokenizer import Tokenizer

PERPLEXITY, ACCURACY = (0.05, 0.20), (0.03, 0.10)  # SLIGHT, SEVERE
MOST_TOKENS = 32768  # of one text, unless told
Verdict = Literal["kept", "undecided", "slightly forgotten", "forgotten"]
ORDER: tuple[Verdict, ...] = ("kept", "undecided", "slightly forgotten", "forgotten")


@dataclass(frozen=True)
class General:
    """Something that a base can do: predict `documents`, each a text of its own, or answer `questions`."""

    name: str
    data: dict[str, str]
    documents: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Retained:
    """What one model makes of it: of each window its loss in nats and its tokens, or of each question whether right.

    `tokens_digest` tells whether two models read the same tokens; `skipped` documents had under two.
    """

    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    right: tuple[bool, ...] = ()
    tokens_digest: str = ""
    skipped: int = 0

    @property
    def statistics(self) -> Statistics:
        """The loss per token."""
        return ratio_of(self.losses, self.tokens)

    @property
    def value(self) -> float:
        """Perplexity, or accuracy."""
        return sum(self.right) / len(self.right) if self.right else math.exp(self.statistics.value)


def read_general(name: str, max_rows: int | None = None) -> General:
    """Return the text or the questions of a file or a set.

    A .txt file is one text; rows with "text" are documents; rows with "choices", and sets, are questions.
    Raises DataError for other rows, and as their readers do.
    """
    if is_set(name):
        return General(name, provenance(name), questions=tuple(questions_of(name)[:max_rows]))
    rows = list(read_rows(resolve(name)))
    first = next((fields for _, fields in rows if not isinstance(fields, RowError)), {})
    if "choices" in first:
        return General(name, provenance(name), questions=tuple(questions_of(name)[:max_rows]))
    if "text" not in first:
        raise DataError(
            f'{name}: general data are a .txt file, rows {{"text"}}, or rows {{"prompt", "choices", "answer"}}'
        )
    for origin, fields in rows:
        if isinstance(fields, RowError):
            raise fields
        if not isinstance(fields.get("text"), str):
            raise RowError(origin, "a row without 'text'", "write it, or remove the row")
    return General(name, provenance(name), documents=tuple(fields["text"] for _, fields in rows[:max_rows]))


def measure_general(
    model: Transformer,
    tokenizer: Tokenizer,
    general: General,
    *,
    window: int = 1024,
    max_tokens: int = MOST_TOKENS,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Retained:
    """Return what a model makes of general data.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        general: the data.
        window: tokens that the model sees of a text at once.
        max_tokens: tokens of all documents together; the last one is cut there.
        batch_size: choices read at once.
        on_batch: called with the tokens, or choices, of each batch.

    Raises:
        ConfigError, DataError: as `window_losses` and `score_choices`; DataError where no document has two tokens.
        CheckpointError: a loss is not finite.
    """
    if general.questions:
        found = score_choices(model, tokenizer, general.questions, batch_size=batch_size, on_batch=on_batch)
        return Retained(right=found["accuracy"].right)
    losses, tokens, digest, left, skipped = [], [], hashlib.blake2b(), max_tokens, 0
    for document in general.documents:
        ids = tokenizer.encode(document)[:left]
        if left < 2:
            break
        if len(ids) < 2:
            skipped += 1
            continue
        found = window_losses(
            model, ids, window=window, stride=window, batch_size=max(1, 4096 // window), on_batch=on_batch
        )
        check_finite(found[0])
        losses += found[0]
        tokens += found[1]
        digest.update(repr(ids).encode())
        left -= len(ids)
    if not losses:
        raise DataError(f"{general.name}: no text of two tokens or more; give a longer one")
    return Retained(tuple(losses), tuple(tokens), tokens_digest=digest.hexdigest(), skipped=skipped)


def verdict_of(loss: float, high: float, sure: bool, bounds: tuple[float, float]) -> Verdict:
    """Return the verdict on a loss whose 95% interval ends at `high`; `sure`: it is no accident of the rows."""
    if high < bounds[0]:
        return "kept"
    if not sure:
        return "undecided"
    return "forgotten" if loss > bounds[1] else "slightly forgotten"


def compare_general(general: General, tuned: Retained, base: Retained | None) -> dict[str, Any]:
    """Return what two models make of the same data, for JSON: values, the difference, its interval and a verdict.

    Of one model alone the value. Models that cut a text into other tokens are not compared: "verdict" is None then.
    """
    kind = "questions" if general.questions else "perplexity"
    size = (
        {"questions": len(tuned.right)} if tuned.right else {"windows": len(tuned.losses), "tokens": sum(tuned.tokens)}
    )
    found = {"kind": kind, "data": general.data, **size, "value": tuned.value}
    found |= {"skipped": tuned.skipped} if tuned.skipped else {}
    if base is None:
        return found
    found["base"] = base.value
    if tuned.tokens_digest != base.tokens_digest:
        return found | {"verdict": None, "problem": "the models read other tokens, so that perplexity does not compare"}
    if general.questions:
        compared = compare_right(tuned.right, base.right)
        drop, high = -compared.difference, -compared.interval[0]
        verdict = verdict_of(drop, high, compared.verdict == "loses", ACCURACY)
        edges = [compared.difference, *compared.interval]
        found |= {"test": compared.test, "p": compared.p, "gained": compared.gained, "lost": compared.lost}
    else:
        edges = [math.expm1(value) for value in paired_difference(tuned.statistics, base.statistics)]
        sure = len(tuned.losses) >= FEWEST and edges[1] > 0
        few = len(tuned.losses) < FEWEST and edges[2] < PERPLEXITY[0]  # of few windows the interval is too narrow
        verdict = "undecided" if few else verdict_of(edges[0], edges[2], sure, PERPLEXITY)
        found["test"] = "paired bootstrap over windows"
    return found | {"difference": edges[0], "difference_interval": edges[1:], "verdict": verdict}


def worst(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """Return the verdict that counts for all; None where nothing was compared."""
    known = [verdict for verdict in verdicts if verdict]
    return max(known, key=ORDER.index) if known else None


def general_lines(found: dict[str, Any], name: str) -> list[str]:
    """Return the lines of what `compare_general` found of the data called `name`."""
    questions = found["kind"] == "questions"
    size = counted(found["questions"], "question") if questions else counted(found["windows"], "window")

    def shown(value: float) -> str:
        return f"{value:.1%}" if questions else f"{value:.2f}"

    what = f"forgetting  {name}: {'accuracy' if questions else 'perplexity'}"
    if "base" not in found:
        return [f"{what} {shown(found['value'])} ({size})"]
    values = f"{what} {shown(found['base'])} -> {shown(found['value'])}"
    if found["verdict"] is None:
        return [f"{values} ({size}): {found['problem']}"]
    low, high = found["difference_interval"]
    unit = " points" if questions else "%"
    p = f"; p = {found['p']:.2g}, {found['test']}" if questions else ""
    change = f"{100 * found['difference']:+.1f}{unit}, 95% {100 * low:+.1f} to {100 * high:+.1f}{p}"
    return [f"{values} ({change}; {size}): {found['verdict']}"]
