"""Kind "references": what a model writes, compared with each row's own answer."""

from dataclasses import replace
from typing import Any

from minitune.evaluation import references, scores
from minitune.evaluation.kinds import progress

KEY = "references"


def read(config: Any) -> references.References:
    """Return the rows and what to measure of them; errors as `read_references`."""
    task = references.read_references(
        config.references, config.metrics, config.answer_form, config.samples, config.temperature
    )
    return replace(task, rows=task.rows[: config.max_rows])


def measure(model: Any, tokenizer: Any, task: references.References, config: Any) -> tuple[dict, dict]:
    """Return counts of the answers, and the metrics."""
    counts, measured = {"rows": len(task.rows)}, {}
    options = {"max_new_tokens": config.max_new_tokens or 256, "batch_size": config.batch_size or 32}
    if task.asks:
        with progress(len(task.rows), "answer", "rows") as update:
            answers = references.ask(model, tokenizer, task.rows, on_batch=update, **options)
        counts, measured = references.summary(answers), references.score_answers(task, answers)
    if task.passes:
        with progress(len(task.rows) * task.samples, "sample", "answers") as update:
            samples = references.ask_repeatedly(model, tokenizer, task, on_batch=update, **options)
        measured |= references.score_passes(task, samples)
    return counts, measured | references.score_likelihood(model, tokenizer, task, batch_size=config.batch_size or 8)


def report(task: Any, found: tuple, base: tuple | None, config: Any) -> dict[str, Any]:
    """Return "answers" and "scores", and of the base "base_answers", "base" and "comparison"."""
    return scores.report(found, base)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the counts and the metrics."""
    return [*scores.count_lines(KEY, found), *scores.score_lines(found)]
