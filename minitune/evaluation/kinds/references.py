"""Kind "references": what a model writes, compared with each row's own answer."""

from dataclasses import replace
from functools import partial
from typing import Any

from minitune.evaluation import references
from minitune.evaluation.kinds import progress
from minitune.evaluation.kinds import prompted as common
from minitune.evaluation.kinds.prompted import Prompted, measure_best, prompted
from minitune.evaluation.sets import rows_of

KEY = "references"


def read(config: Any) -> Prompted:
    """Return the rows and what to measure of them; errors as `read_references` and `prompted`."""
    task = references.read_references(
        config.references, config.metrics, config.answer_form, config.samples, config.temperature, config.verifier
    )
    return prompted(config.references, task.rows, config, rows_of, task)


def measure(model: Any, tokenizer: Any, task: Prompted, config: Any) -> tuple[dict, dict]:
    """Return counts of the answers, and the metrics."""
    asked = replace(task.about, rows=task.rows)
    counts, measured = {"rows": len(asked.rows)}, {}
    options = {"max_new_tokens": config.max_new_tokens or 256, "batch_size": config.batch_size or 32, "stop": task.stop}
    if asked.asks:
        with progress(len(asked.rows), "answer", "rows") as update:
            answers = references.ask(model, tokenizer, asked.rows, on_batch=update, **options)
        counts, measured = references.summary(answers), references.score_answers(asked, answers)
    if asked.passes:
        with progress(len(asked.rows) * asked.samples, "sample", "answers") as update:
            samples = references.ask_repeatedly(model, tokenizer, asked, on_batch=update, **options)
        measured |= references.score_passes(asked, samples)
    measured |= references.score_likelihood(model, tokenizer, asked, batch_size=config.batch_size or 8)
    return counts, {name: measured[name] for name in asked.metrics}


measure_base = partial(measure_best, measure)
report = common.report
lines = partial(common.score_lines, KEY)
