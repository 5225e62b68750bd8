"""Kind "perplexity": how well a model predicts a text."""

from dataclasses import asdict
from typing import Any

from minitune.evaluation.kinds import progress
from minitune.evaluation.perplexity import check_finite, perplexity, read_text
from minitune.sources import resolve

KEY = "perplexity"


def read(config: Any) -> str:
    """Return the text; errors as `read_text`."""
    return read_text(resolve(config.perplexity))


def measure(model: Any, tokenizer: Any, text: str, config: Any) -> dict[str, Any]:
    """Return the fields of a Perplexity; errors as `perplexity` and `check_finite`."""
    window = config.window or min(1024, model.config.longest)
    with progress(None, "perplexity", "tokens") as update:
        found = perplexity(
            model, tokenizer, text, window=window, stride=config.stride, max_tokens=config.max_tokens,
            batch_size=max(1, 4096 // window), on_batch=update,
        )  # fmt: skip
    check_finite([found.loss])
    return asdict(found)


def report(text: str, found: dict[str, Any], base: None, config: Any) -> dict[str, Any]:
    """Return the fields as they are."""
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return perplexity and bits per byte."""
    note = f"{found['tokens']:,} tokens, window {found['window']}, stride {found['stride']}"
    if found["interval"]:
        note += "; 95% interval {:.3f} to {:.3f}".format(*found["interval"])
    shown = [f"perplexity  {found['perplexity']:.3f}  (loss {found['loss']:.4f}; {note})"]
    if found["bits_per_byte"] is not None:
        shown.append(f"bits/byte   {found['bits_per_byte']:.4f}")
    return shown
