"""Kind "choices": which of the given answers a model finds likeliest."""

from functools import partial
from typing import Any

from minitune.evaluation.choices import score_choices
from minitune.evaluation.kinds import progress
from minitune.evaluation.kinds import prompted as common
from minitune.evaluation.kinds.prompted import Prompted, measure_best, prompted
from minitune.evaluation.sets import questions_of

KEY = "choices"


def read(config: Any) -> Prompted:
    """Return the questions; errors as `questions_of` and `prompted`."""
    return prompted(config.choices, questions_of(config.choices), config, questions_of)


def measure(model: Any, tokenizer: Any, task: Prompted, config: Any) -> tuple[dict, dict]:
    """Return the number of rows, and the metrics."""
    with progress(sum(len(row.choices) for row in task.rows), "choose", "choices") as update:
        found = score_choices(model, tokenizer, task.rows, batch_size=config.batch_size or 8, on_batch=update)
    return {"rows": len(task.rows)}, found


measure_base = partial(measure_best, measure)
report = common.report
lines = partial(common.score_lines, KEY)
