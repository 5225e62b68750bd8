"""Command: measure a model. Classification by generated answer, perplexity of a text; a table and JSON.

    python -m minitune.evaluate --model M --adapter A --classify test.jsonl --labels positive,negative \\
        --perplexity wiki.txt --output result.json
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from minitune.cli import parse
from minitune.errors import ConfigError, DataError, check_counts, run_command
from minitune.loading import ModelOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """What to measure, of which model."""

    classify: str | None = None
    """Rows whose last answer is a label: .jsonl, .json or .csv in any format that trains."""
    labels: str | None = None
    """With classify: the labels, as positive,negative."""
    perplexity: str | None = None
    """A .txt file (or a fetched one's name) whose perplexity to measure."""
    output: str | None = None
    """Write all results to this JSON file."""
    max_rows: int | None = None
    """With classify: use only the first rows (default: all)."""
    max_new_tokens: int | None = None
    """With classify: an answer not ended by then is no label (default 16)."""
    window: int | None = None
    """With perplexity: tokens that the model sees at once (default 1024, or what it can)."""
    stride: int | None = None
    """With perplexity: tokens between the starts of two windows (default: the window)."""
    max_tokens: int | None = None
    """With perplexity: use only the first tokens of the text (default: all)."""
    batch_size: int | None = None
    """With classify: prompts read at once (default 32); texts are read 4 x 1024 tokens at a time."""

    def __post_init__(self):
        """Refuse a run that measures nothing, and options that it would ignore."""
        if self.classify is None and self.perplexity is None:
            raise ConfigError("nothing to measure; give --classify FILE --labels a,b or --perplexity FILE, or both")
        if self.classify is not None and self.labels is None:
            raise ConfigError("labels are missing; name them, as in --labels positive,negative")
        belongs = {"labels": "classify", "max_rows": "classify", "max_new_tokens": "classify",
                   "batch_size": "classify", "window": "perplexity", "stride": "perplexity",
                   "max_tokens": "perplexity"}  # fmt: skip
        for name, needed in belongs.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ConfigError(f"{name} is set without {needed}, which it belongs to; leave it out")
        counts = ("max_rows", "max_new_tokens", "max_tokens", "batch_size", "window", "stride")
        check_counts(**{name: getattr(self, name) for name in counts})


def main(argv: list[str] | None = None) -> None:
    """Parse the options, read the data, load the model, measure, print, write."""
    config = parse(EvaluateConfig, argv, prog="python -m minitune.evaluate", description=__doc__.split("\n")[0])
    from minitune.files import atomic_file, write_json

    if config.output is None:
        print(table(measure(config)))
        return
    with atomic_file(config.output) as path:  # fails before the work, not after
        result = measure(config)
        print(table(result))
        write_json(path, result)
    print(f"written to {config.output}")


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Return what was measured: {"model", "adapter", "classification", "perplexity", "seconds"}."""
    from minitune.evaluation.classification import read_labelled
    from minitune.sources import resolve

    rows = []
    if config.classify is not None:  # read first: an error in the data should not wait for the model
        rows = read_labelled(resolve(config.classify), config.labels.split(","))[: config.max_rows]
    text = "" if config.perplexity is None else read_text(resolve(config.perplexity))
    model, tokenizer = config.load()
    start = time.monotonic()
    result: dict[str, Any] = {"model": config.model, "adapter": config.adapter}
    if rows:
        result["classification"] = _classify(model, tokenizer, rows, config)
    if text:
        result["perplexity"] = _perplexity(model, tokenizer, text, config)
    return result | {"seconds": round(time.monotonic() - start, 2)}


def _classify(model: Any, tokenizer: Any, rows: list, config: EvaluateConfig) -> dict[str, Any]:
    from tqdm import tqdm

    from minitune.evaluation.classification import classify

    with tqdm(total=len(rows), desc="classify", unit=" rows") as bar:
        return asdict(
            classify(
                model, tokenizer, rows, config.labels.split(","), max_new_tokens=config.max_new_tokens or 16,
                batch_size=config.batch_size or 32, on_batch=bar.update,
            )
        )  # fmt: skip


def _perplexity(model: Any, tokenizer: Any, text: str, config: EvaluateConfig) -> dict[str, Any]:
    from tqdm import tqdm

    from minitune.evaluation.perplexity import perplexity

    window = config.window or min(1024, model.config.longest)
    with tqdm(desc="perplexity", unit=" tokens") as bar:
        return asdict(
            perplexity(
                model, tokenizer, text, window=window, stride=config.stride, max_tokens=config.max_tokens,
                batch_size=max(1, 4096 // window), on_batch=bar.update,
            )
        )  # fmt: skip


def read_text(path: Any) -> str:
    """Return the content of a UTF-8 text file; raises DataError for another kind, an empty or a broken one."""
    from minitune.data.reading import read_rows

    if path.suffix != ".txt":
        raise DataError(f"{path}: perplexity reads plain text; give a .txt file")
    ((_, fields),) = read_rows(path)
    return fields["text"]


def table(result: dict[str, Any]) -> str:
    """Return the results as lines for a reader."""
    lines = [f"model       {result['model']}" + (f" + {result['adapter']}" if result["adapter"] else "")]
    if "classification" in result:
        lines += _classification_lines(result["classification"])
    if "perplexity" in result:
        found = result["perplexity"]
        note = f"{found['tokens']:,} tokens, window {found['window']}, stride {found['stride']}"
        lines.append(f"perplexity  {found['perplexity']:.3f}  (loss {found['loss']:.4f}; {note})")
    return "\n".join(lines)


def _classification_lines(found: dict[str, Any]) -> list[str]:
    low, high = found["accuracy_interval"]
    width = max(map(len, (*found["labels"], "other"))) + 2
    heads = "".join(f"{name:>{width}}" for name in (*found["labels"], "other"))
    lines = [
        f"rows        {found['rows']}",
        f"accuracy    {found['accuracy']:.1%}  (95% interval {low:.1%} to {high:.1%})",
        f"macro-F1    {found['macro_f1']:.3f}",
        f"compliance  {found['format_compliance']:.1%}  (answers that are exactly a label)",
        f"{'right / answered':<18}{heads}",
    ]
    for label, counts in zip(found["labels"], found["confusion"], strict=True):
        lines.append(f"{label:<18}" + "".join(f"{count:>{width}}" for count in counts))
    if found["other_answers"]:
        lines.append("other answers: " + ", ".join(f"{text[:40]!r} x{count}" for text, count in found["other_answers"]))
    return lines


if __name__ == "__main__":
    run_command(main)
