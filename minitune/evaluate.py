"""Command: measure a model, beside its base: labels, answers against references, choices, perplexity; table and JSON.

    python -m minitune.evaluate --model M --adapter A --classify test.jsonl --labels positive,negative \\
        --perplexity wiki.txt --output result.json
    python -m minitune.evaluate --adapter A --references test.jsonl --metrics rouge,exact_match --choices quiz.jsonl
"""

import time
from dataclasses import asdict, dataclass, replace
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
    references: str | None = None
    """Rows whose last answer is what to write: .jsonl, .json or .csv in any format that trains but text."""
    metrics: str | None = None
    """With references: rouge,bleu,... (default exact_match,rouge,bleu,chrf,length,repetition; also rouge1, chrf++,
    format, pass@1, pass@5, ..., token_accuracy, perplexity, bits_per_byte, likelihood for these three)."""
    answer_form: str | None = None
    """With references: what the metric format asks for: regex:PATTERN, choices:a,b, json, or json:SCHEMA.json."""
    samples: int | None = None
    """With references: answers to each row for pass@k (default 10)."""
    temperature: float | None = None
    """With references: at which these are drawn (default 0.8)."""
    choices: str | None = None
    """Rows {"prompt", "choices": [...], "answer"} to choose from by likelihood."""
    base: str | None = None
    """With references or choices: the model to compare with (default: with an adapter, the model without it)."""
    perplexity: str | None = None
    """A .txt file (or a fetched one's name) whose perplexity to measure."""
    output: str | None = None
    """Write all results to this JSON file."""
    max_rows: int | None = None
    """With classify, references or choices: use only the first rows (default: all)."""
    max_new_tokens: int | None = None
    """An answer not ended by then is no label (with classify, default 16) or cut off (with references, 256)."""
    window: int | None = None
    """With perplexity: tokens that the model sees at once (default 1024, or what it can)."""
    stride: int | None = None
    """With perplexity: tokens between the starts of two windows (default: the window)."""
    max_tokens: int | None = None
    """With perplexity: use only the first tokens of the text (default: all)."""
    batch_size: int | None = None
    """Prompts read at once (default 32), or texts with their answers (8); a long text's windows come 4 x 1024 tokens
    at a time."""

    def __post_init__(self):
        """Refuse a run that measures nothing, and options that it would ignore."""
        kinds = ("classify", "references", "choices", "perplexity")
        if all(getattr(self, kind) is None for kind in kinds):
            raise ConfigError(
                "nothing to measure; give --classify FILE --labels a,b, --references FILE, --choices FILE or "
                "--perplexity FILE, or several"
            )
        if self.classify is not None and self.labels is None:
            raise ConfigError("labels are missing; name them, as in --labels positive,negative")
        belongs = {"labels": kinds[:1], "metrics": kinds[1:2], "answer_form": kinds[1:2],
                   "samples": kinds[1:2], "temperature": kinds[1:2], "base": kinds[1:3],
                   "max_rows": kinds[:3], "max_new_tokens": kinds[:2], "batch_size": kinds[:3],
                   "window": kinds[3:], "stride": kinds[3:], "max_tokens": kinds[3:]}  # fmt: skip
        for name, needed in belongs.items():
            if getattr(self, name) is not None and all(getattr(self, kind) is None for kind in needed):
                raise ConfigError(f"{name} is set without {' or '.join(needed)}, which it belongs to; leave it out")
        counts = ("samples", "max_rows", "max_new_tokens", "max_tokens", "batch_size", "window", "stride")
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
    """Return what was measured: {"model", "adapter", "seconds"} and "classification", "references", ... as asked."""
    tasks = read_tasks(config)  # first: an error in the data should not wait for the model
    model, tokenizer = config.load()
    start = time.monotonic()
    result: dict[str, Any] = {"model": config.model, "adapter": config.adapter}
    if "classify" in tasks:
        result["classification"] = _classify(model, tokenizer, tasks["classify"], config)
    scored = _scored(model, tokenizer, tasks, config)
    if "perplexity" in tasks:
        result["perplexity"] = _perplexity(model, tokenizer, tasks["perplexity"], config)
    if scored:
        from minitune.evaluation.scores import report

        del model  # two at once may not fit
        compared = config.base is not None or config.adapter is not None
        others = _scored(*_base(config).load(), tasks, config) if compared else {}
        result |= {"base": _base(config).model} if compared else {}
        result |= {name: report(found, others.get(name)) for name, found in scored.items()}
    return result | {"seconds": round(time.monotonic() - start, 2)}


def read_tasks(config: EvaluateConfig) -> dict[str, Any]:
    """Return the data of each kind of measurement that is asked for, by the option's name; errors as their readers."""
    from minitune.evaluation.choices import read_choices
    from minitune.evaluation.classification import read_labelled
    from minitune.evaluation.references import read_references
    from minitune.sources import resolve

    tasks: dict[str, Any] = {}
    if config.classify is not None:
        tasks["classify"] = read_labelled(resolve(config.classify), config.labels.split(","))[: config.max_rows]
    if config.references is not None:
        task = read_references(
            resolve(config.references), config.metrics, config.answer_form, config.samples, config.temperature
        )
        tasks["references"] = replace(task, rows=task.rows[: config.max_rows])
    if config.choices is not None:
        tasks["choices"] = read_choices(resolve(config.choices))[: config.max_rows]
    if config.perplexity is not None:
        tasks["perplexity"] = read_text(resolve(config.perplexity))
    return tasks


def _base(config: EvaluateConfig) -> ModelOptions:
    """Return the options of the model to compare with: as it is published, unless it is quantised by option."""
    given = {name: getattr(config, name) for name in ("dtype", "quantize", "device", "backend")}
    return ModelOptions(model=config.base or config.model, **given)


def _scored(model: Any, tokenizer: Any, tasks: dict[str, Any], config: EvaluateConfig) -> dict[str, Any]:
    """Return (counts of answers, metrics) of one model for the references and the choices, where asked for."""
    from tqdm import tqdm

    found = {}
    if "references" in tasks:
        found["references"] = _references(model, tokenizer, tasks["references"], config)
    if "choices" in tasks:
        from minitune.evaluation.choices import score_choices

        rows = tasks["choices"]
        with tqdm(total=sum(len(row.choices) for row in rows), desc="choose", unit=" choices") as bar:
            scores = score_choices(model, tokenizer, rows, batch_size=config.batch_size or 8, on_batch=bar.update)
        found["choices"] = {"rows": len(rows)}, scores
    return found


def _references(model: Any, tokenizer: Any, task: Any, config: EvaluateConfig) -> tuple[dict, dict]:
    from tqdm import tqdm

    from minitune.evaluation import references

    counts, measured = {"rows": len(task.rows)}, {}
    options = {"max_new_tokens": config.max_new_tokens or 256, "batch_size": config.batch_size or 32}
    if task.asks:
        with tqdm(total=len(task.rows), desc="answer", unit=" rows") as bar:
            answers = references.ask(model, tokenizer, task.rows, on_batch=bar.update, **options)
        counts, measured = references.summary(answers), references.score_answers(task, answers)
    if task.passes:
        with tqdm(total=len(task.rows) * task.samples, desc="sample", unit=" answers") as bar:
            samples = references.ask_repeatedly(model, tokenizer, task, on_batch=bar.update, **options)
        measured |= references.score_passes(task, samples)
    return counts, measured | references.score_likelihood(model, tokenizer, task, batch_size=config.batch_size or 8)


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
    if "base" in result:
        lines.append(f"base        {result['base']}")
    if "classification" in result:
        lines += _classification_lines(result["classification"])
    for kind in ("references", "choices"):
        if kind in result:
            lines += _scored_lines(kind, result[kind])
    if "perplexity" in result:
        found = result["perplexity"]
        note = f"{found['tokens']:,} tokens, window {found['window']}, stride {found['stride']}"
        if found["interval"]:
            note += "; 95% interval {:.3f} to {:.3f}".format(*found["interval"])
        lines.append(f"perplexity  {found['perplexity']:.3f}  (loss {found['loss']:.4f}; {note})")
        if found["bits_per_byte"] is not None:
            lines.append(f"bits/byte   {found['bits_per_byte']:.4f}")
    return "\n".join(lines)


def _scored_lines(kind: str, found: dict[str, Any]) -> list[str]:
    from minitune.evaluation.scores import score_lines

    lines = []
    for name, counts in (("base", found.get("base_answers")), ("tuned" * ("base" in found), found["answers"])):
        if counts is not None:
            shown = ", ".join(f"{key} {value:,}" for key, value in counts.items())
            lines.append(" ".join(f"{kind:<12}{name} {shown}".split()))
    return [*lines, *score_lines(found)]


def _classification_lines(found: dict[str, Any]) -> list[str]:
    low, high = found["accuracy_interval"]
    width = max(map(len, (*found["labels"], "other"))) + 2
    heads = "".join(f"{name:>{width}}" for name in (*found["labels"], "other"))
    lines = [
        f"rows        {found['rows']}",
        f"accuracy    {found['accuracy']:.1%}  (95% interval {low:.1%} to {high:.1%})",
        _f1_line(found, "macro"),
        _f1_line(found, "micro"),
        f"compliance  {found['format_compliance']:.1%}  (answers that are exactly a label)",
        f"{'right / answered':<18}{heads}",
    ]
    for label, counts in zip(found["labels"], found["confusion"], strict=True):
        lines.append(f"{label:<18}" + "".join(f"{count:>{width}}" for count in counts))
    if found["other_answers"]:
        lines.append("other answers: " + ", ".join(f"{text[:40]!r} x{count}" for text, count in found["other_answers"]))
    return lines


def _f1_line(found: dict[str, Any], average: str) -> str:
    low, high = found[f"{average}_f1_interval"]
    return f"{average}-F1    {found[f'{average}_f1']:.3f}  (95% interval {low:.3f} to {high:.3f})"


if __name__ == "__main__":
    run_command(main)
