"""Kind "golden": rows with what is expected of their answers, and what changed between two models."""

from dataclasses import dataclass
from typing import Any

from minitune.endpoint import Reply
from minitune.errors import ConfigError
from minitune.evaluation import golden, golden_diff
from minitune.evaluation.answers import Asked, model_answers
from minitune.evaluation.kinds import progress
from minitune.evaluation.kinds.judge import asker, check_judge, model_names, problem_of
from minitune.files import atomic_file
from minitune.sources import resolve

KEY = "golden"


@dataclass(frozen=True)
class Task(Asked):
    """The rows, beside what is asked."""

    rows: tuple[golden.Row, ...] = ()


def read(config: Any) -> Task:
    """Return the golden set; errors as `read_golden`, and ConfigError where a row needs a judge and there is none."""
    rows = golden.read_golden(resolve(config.golden))[: config.max_rows]
    judged = next((row for row in rows if row.judge is not None), None)
    if judged is not None and config.judge.model is None:
        origin = judged.record.origin
        raise ConfigError(f"{origin} expects a judge's verdict; name a judge, as --judge.model smollm2-135m-instruct")
    if judged is None and config.judge.model is not None and not config.judge.asked:
        raise ConfigError(f"no row of {config.golden} expects a judge's verdict; leave out judge.model")
    if judged is not None:
        check_judge(config.judge)
    asked = Asked.of([row.record for row in rows], config.answers)
    return Task(asked.records, asked.given, tuple(rows))


def measure(model: Any, tokenizer: Any, task: Task, config: Any) -> list[Reply]:
    """Return the model's answers."""
    options = {"max_new_tokens": config.max_new_tokens or 256, "batch_size": config.batch_size or 32}
    with progress(len(task.records), "answer", "rows") as update:
        return model_answers(model, tokenizer, task.records, on_batch=update, **options)


def report(task: Task, found: list | None, base: list | None, config: Any) -> dict[str, Any]:
    """Return what `golden_diff.report` does, and write the page where one is asked for."""
    judge = asker(config) if any(row.judge is not None for row in task.rows) else None
    sides = [side for side in task.both(found, base) if side is not None]
    made = golden_diff.report(task.rows, *((side, golden.check(task.rows, side, judge)) for side in sides))
    both = [made[side] for side in ("tuned", "base") if side in made]
    judged, without = (sum(side[count] for side in both) for count in ("judged", "no_verdict"))
    if config.golden_page is not None:
        with atomic_file(config.golden_page) as path:
            path.write_text(golden_diff.page_of(made, model_names(config)), encoding="utf-8")
    return made | problem_of(without, judged, config.judge.max_missing)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the shares and the rows that changed."""
    return golden_diff.lines(found)
