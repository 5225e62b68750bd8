"""Kind "general": what was forgotten of general text and general questions, a verdict for each and for all."""

from typing import Any

from minitune.evaluation.forgetting import (
    ACCURACY,
    MOST_TOKENS,
    PERPLEXITY,
    General,
    Retained,
    compare_general,
    general_lines,
    measure_general,
    read_general,
    worst,
)
from minitune.evaluation.kinds import named, progress

KEY = "forgetting"


def read(config: Any) -> list[General]:
    """Return the data, one for each name between commas; errors as `read_general`."""
    return [read_general(name, config.max_rows) for name in named("general", config.general)]


def measure(model: Any, tokenizer: Any, task: list[General], config: Any) -> list[Retained]:
    """Return what one model makes of each."""
    options = {"window": config.window or min(1024, model.config.longest), "batch_size": config.batch_size or 8}
    found = []
    for general in task:
        with progress(None, general.name, "choices" if general.questions else "tokens") as update:
            limit = config.max_tokens or MOST_TOKENS
            found.append(measure_general(model, tokenizer, general, max_tokens=limit, on_batch=update, **options))
    return found


def report(task: list[General], found: list[Retained], base: list[Retained] | None, config: Any) -> dict[str, Any]:
    """Return {"sets": {name: see `compare_general`}, "verdict": the worst, "bounds": (slight, severe) of each kind}."""
    sides = zip(task, found, base or [None] * len(task), strict=True)
    sets = {general.name: compare_general(general, ours, theirs) for general, ours, theirs in sides}
    verdict = worst(["undecided" if "problem" in one else one.get("verdict") for one in sets.values()])
    return {"sets": sets, "verdict": verdict, "bounds": {"perplexity": PERPLEXITY, "questions": ACCURACY}}


def lines(found: dict[str, Any]) -> list[str]:
    """Return a line for each set, and the verdict."""
    shown = [line for name, one in found["sets"].items() for line in general_lines(one, name)]
    return shown if found["verdict"] is None else [*shown, f"forgetting  verdict: {found['verdict']}"]
