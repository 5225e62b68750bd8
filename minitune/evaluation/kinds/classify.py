"""Kind "classify": rows whose last answer is a label, the base beside the tuned model."""

from dataclasses import asdict
from functools import partial
from typing import Any

from minitune.errors import ConfigError
from minitune.evaluation import scores
from minitune.evaluation.classification import (
    ask_labels,
    check_labels,
    classification_metrics,
    read_labelled,
    summarize,
)
from minitune.evaluation.kinds import progress
from minitune.evaluation.kinds.prompted import Prompted, measure_best, prompt_lines, prompted
from minitune.evaluation.scores import Measured
from minitune.evaluation.sets import labels_of

KEY = "classification"


def read(config: Any) -> Prompted:
    """Return the labelled rows; errors as `read_labelled` and `prompted`, ConfigError where the labels are missing."""
    given = config.labels or labels_of(config.classify)
    if given is None:
        raise ConfigError("labels are missing; name them, as in --labels positive,negative")
    labels = check_labels(given.split(","))
    rows = read_labelled(config.classify, labels)
    return prompted(config.classify, rows, config, lambda path: read_labelled(path, labels), labels, labels)


def measure(model: Any, tokenizer: Any, task: Prompted, config: Any) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Return the fields of a Classification and the metrics that are compared."""
    options = {"max_new_tokens": config.max_new_tokens or 16, "batch_size": config.batch_size or 32, "stop": task.stop}
    with progress(len(task.rows), "classify", "rows") as update:
        predicted = ask_labels(model, tokenizer, task.rows, task.about, on_batch=update, **options)
    expected = [row.label for row in task.rows]
    found = asdict(summarize(expected, predicted, task.about))
    return found, classification_metrics(expected, predicted, task.about)


measure_base = partial(measure_best, measure)


def report(task: Prompted, found: tuple, base: tuple | None, config: Any) -> dict[str, Any]:
    """Return the fields of the Classification with "scores", and of the base "base_answers", "base", "comparison"."""
    made = scores.report(found, base)
    return made.pop("answers") | made | {"data": task.data}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the metrics, of both models where there are two, and what each answered."""
    if "base" not in found:
        return [*prompt_lines(KEY, found), *_metric_lines(found), *_answer_lines(found, "right / answered")]
    return [
        *prompt_lines(KEY, found),
        f"rows        {found['rows']}",
        *scores.score_lines(found),
        *_answer_lines(found["base_answers"], "base: right / answered"),
        *_answer_lines(found, "tuned: right / answered"),
    ]


def _metric_lines(found: dict[str, Any]) -> list[str]:
    low, high = found["accuracy_interval"]
    lines = [f"rows        {found['rows']}"]
    lines.append(f"accuracy    {found['accuracy']:.1%}  (95% interval {low:.1%} to {high:.1%})")
    for average in ("macro", "micro"):
        edges = found[f"{average}_f1_interval"]
        note = "95% interval {:.3f} to {:.3f}".format(*edges) if edges else "no interval: all rows are alike"
        lines.append(f"{average}-F1    {found[f'{average}_f1']:.3f}  ({note})")
    return [*lines, f"compliance  {found['format_compliance']:.1%}  (answers that are exactly a label)"]


def _answer_lines(found: dict[str, Any], title: str) -> list[str]:
    """Return the confusion matrix under its title, and the most frequent other answers."""
    width, first = max(map(len, (*found["labels"], "other"))) + 2, max(map(len, (*found["labels"], title))) + 2
    lines = [f"{title:<{first}}" + "".join(f"{name:>{width}}" for name in (*found["labels"], "other"))]
    for label, counts in zip(found["labels"], found["confusion"], strict=True):
        lines.append(f"{label:<{first}}" + "".join(f"{count:>{width}}" for count in counts))
    if found["empty"]:
        lines.append(f"empty answers: {found['empty']}")
    if found["other_answers"]:
        lines.append("other answers: " + ", ".join(f"{text[:40]!r} x{count}" for text, count in found["other_answers"]))
    return lines
