"""Kind "safety": refusals of harmful requests and of harmless ones, the base beside the tuned model."""

from typing import Any

from minitune.evaluation import safety
from minitune.evaluation.kinds import named, progress

KEY = "safety"
HARMLESS = "alpaca-en-demo"
lines = safety.safety_lines


def read(config: Any) -> safety.Requests:
    """Return the requests, of the files or sets between commas; errors as `read_requests`."""
    harmful, harmless = named("safety", config.safety), named("harmless", config.harmless or HARMLESS)
    return safety.read_requests(harmful, harmless, config.max_rows)


def measure(model: Any, tokenizer: Any, task: safety.Requests, config: Any) -> safety.Behaviour:
    """Return what one model answers."""
    with progress(len(task.harmful) + len(task.harmless), "safety", "requests") as update:
        return safety.measure_safety(
            model, tokenizer, task, max_new_tokens=config.max_new_tokens or 64,
            batch_size=config.batch_size or 32, on_batch=update,
        )  # fmt: skip


def report(task: safety.Requests, found: Any, base: Any, config: Any) -> dict[str, Any]:
    """Return what `compare_safety` finds."""
    return safety.compare_safety(task, found, base)
