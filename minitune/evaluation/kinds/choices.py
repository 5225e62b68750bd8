"""Kind "choices": which of the given answers a model finds likeliest."""

from typing import Any

from minitune.evaluation import scores
from minitune.evaluation.choices import Question, read_choices, score_choices
from minitune.evaluation.kinds import progress
from minitune.evaluation.kinds.references import report  # noqa: F401 - the same for both
from minitune.sources import resolve

KEY = "choices"


def read(config: Any) -> list[Question]:
    """Return the questions; errors as `read_choices`."""
    return read_choices(resolve(config.choices))[: config.max_rows]


def measure(model: Any, tokenizer: Any, rows: list[Question], config: Any) -> tuple[dict, dict]:
    """Return the number of rows, and the metrics."""
    with progress(sum(len(row.choices) for row in rows), "choose", "choices") as update:
        found = score_choices(model, tokenizer, rows, batch_size=config.batch_size or 8, on_batch=update)
    return {"rows": len(rows)}, found


def lines(found: dict[str, Any]) -> list[str]:
    """Return the counts and the metrics."""
    return [*scores.count_lines(KEY, found), *scores.score_lines(found)]
