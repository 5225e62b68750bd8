"""What the kinds have in common whose base is asked in its best way: rows, ways to ask, and the choice among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minitune.errors import DataError, counted
from minitune.evaluation import scores
from minitune.evaluation.prompting import Row, Search, as_text, choose, search_of
from minitune.evaluation.sets import provenance


@dataclass(frozen=True)
class Prompted:
    """The rows of a kind, what else it knows of them (`about`), how to ask the base, and where the rows come from.

    `stop` ends an answer before these strings, which examples in a text ask for.
    """

    rows: tuple[Row, ...]
    about: Any
    search: Search | None
    data: dict[str, str]
    stop: tuple[str, ...] = ()


def prompted(
    path: str, rows: Sequence[Row], config: Any, read: Callable[[str], Sequence[Row]], about: Any = None,
    labels: Sequence[str] = (),
) -> Prompted:  # fmt: skip
    """Return the task of a kind: the first `max_rows` of `rows`, which came from `path`.

    `read` reads rows to choose the base's prompt by. Errors as in `search_of`.
    """
    rows = tuple(rows[: config.max_rows])
    validation = read(config.validation) if config.validation else ()
    search = search_of(config.base_prompts, validation, rows, labels)
    if search is not None and config.max_rows is not None:  # beside those that examples are taken from
        search = replace(search, rows=search.rows[: config.max_rows + max(way.shots for way in search.ways)])
    return Prompted(rows, about, search, provenance(path))


def measure_best(
    measure: Callable[..., tuple[dict, dict]], model: Any, tokenizer: Any, task: Prompted, config: Any
) -> tuple[dict, dict]:
    """Return what `measure` returns for the rows asked in the way that is best for this model, which is "prompt".

    Where examples leave a test row no room, that is the best way that does.
    """
    if task.search is None:
        return measure(model, tokenizer, task, config)
    chat, search = tokenizer.chat_template is not None, task.search
    if not chat:
        task = replace(task, rows=tuple(map(as_text, task.rows)))
        search = replace(search, rows=tuple(map(as_text, search.rows)))

    def measured(rows: Sequence[Row], stop: tuple[str, ...]) -> tuple[dict, dict]:
        return measure(model, tokenizer, replace(task, rows=tuple(rows), stop=stop), config)

    chosen = choose(search, lambda *asked: measured(*asked)[1], chat=chat, say=print)
    while True:
        try:
            counts, metrics = measured([chosen.ask(row, chat=chat) for row in task.rows], chosen.stop)
            return counts | {"prompt": chosen.described()}, metrics
        except DataError as error:
            if not chosen.way.shots or not chosen.next_best:
                raise
            print(f"  {chosen.way.title}: not for the test rows ({error}); the next best is taken")
            chosen = replace(chosen, way=chosen.next_best[0], next_best=chosen.next_best[1:])


def report(task: Prompted, found: tuple, base: tuple | None, config: Any) -> dict[str, Any]:
    """Return "answers" and "scores", and of the base "base_answers", "base" and "comparison"."""
    return scores.report(found, base) | {"data": task.data}


def score_lines(kind: str, found: dict[str, Any]) -> list[str]:
    """Return the counts and the metrics of such a report."""
    return [*prompt_lines(kind, found), *scores.count_lines(kind, found), *scores.score_lines(found)]


def prompt_lines(kind: str, found: dict[str, Any]) -> list[str]:
    """Return the lines that say where a report's rows come from and how the base was asked."""
    data = found["data"]
    lines = [f"{kind:<11} {data['set']} ({data['licence']})"] if "set" in data else []
    asked = (found.get("base_answers") or found.get("answers") or found).get("prompt")
    if asked is None:
        plain = "base asked  as the rows ask; with --validation rows it is asked in its best way"
        return [*lines, *[plain] * ("base" in found)]
    name, tried = asked["name"], asked["tried"]
    if tried:
        (metric, value), *_ = tried[name].items()
        ways, rows = counted(len(tried), "way"), counted(asked["validation_rows"], "validation row")
        return [*lines, f"base asked  {name} (best of {ways} on {rows}: {metric} {value:.4g})"]
    return [*lines, f"base asked  {name} (as given)"]
