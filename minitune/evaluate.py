"""Command: measure a model, or several, beside their base on named sets, as a table and as JSON.

    python -m minitune.evaluate --model M --adapter A --classify test.jsonl --labels positive,negative \\
        --perplexity wiki.txt --output result.json
    python -m minitune.evaluate --adapter A --references test.jsonl --metrics rouge,exact_match --choices quiz.jsonl

What can be measured is a module each in `minitune.evaluation.kinds`. All models are measured on the same rows, one
after the other, so that two never have to fit in memory.
"""

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from minitune.cli import parse
from minitune.errors import ConfigError, check_counts, run_command
from minitune.loading import ModelOptions

KINDS = ("classify", "references", "choices", "perplexity")
BASED = ("classify", "references", "choices")  # those that have the base measured too
BELONGS = {  # an option and the kinds that read it
    "labels": ("classify",), "metrics": ("references",), "answer_form": ("references",), "samples": ("references",),
    "temperature": ("references",), "base": BASED, "max_rows": ("classify", "references", "choices"),
    "max_new_tokens": ("classify", "references"), "batch_size": ("classify", "references", "choices"),
    "window": ("perplexity",), "stride": ("perplexity",), "max_tokens": ("perplexity",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """What to measure, of which models."""

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
    """The model to compare with (default: with an adapter, the model without it)."""
    also: tuple[str, ...] | None = None
    """Other models or adapters to measure on the same rows, by name, as [low=runs/low/adapter,merged=runs/merged]."""
    perplexity: str | None = None
    """A .txt file (or a fetched one's name) whose perplexity to measure."""
    output: str | None = None
    """Write all results to this JSON file."""
    overwrite: bool = False
    """Replace the output if it is there."""
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
        """Refuse a run that measures nothing, options that it would ignore, and to lose a file."""
        if not self.kinds:
            raise ConfigError(
                "nothing to measure; give --classify FILE --labels a,b, --references FILE, --choices FILE or "
                "--perplexity FILE, or several"
            )
        if self.classify is not None and self.labels is None:
            raise ConfigError("labels are missing; name them, as in --labels positive,negative")
        for name, kinds in BELONGS.items():
            if getattr(self, name) is not None and not set(kinds) & set(self.kinds):
                raise ConfigError(f"{name} is set without {' or '.join(kinds)}, which it belongs to; leave it out")
        counts = ("samples", "max_rows", "max_new_tokens", "max_tokens", "batch_size", "window", "stride")
        check_counts(**{name: getattr(self, name) for name in counts})
        if self.output is not None and Path(self.output).is_file() and not self.overwrite:
            raise ConfigError(f"{self.output} is there already; name another file, or replace it with --overwrite")
        self.others  # noqa: B018 - refuses names that are none

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are asked for."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def others(self) -> dict[str, ModelOptions]:
        """The models of `also` by name; ConfigError for one without name or folder, or a name given twice."""
        pairs = [one.partition("=")[::2] for one in self.also or ()]
        if not all(name and path for name, path in pairs) or len(dict(pairs)) < len(pairs):
            raise ConfigError(f"also is {list(self.also)}; several need a name each, as [low=FOLDER,high=FOLDER]")
        return {name: self._options(path) for name, path in pairs}

    @property
    def reference(self) -> ModelOptions:
        """The base: as it is published, unless it is quantised by option."""
        return self._options(self.base or self.model)

    def _options(self, path: str) -> ModelOptions:
        given = {name: getattr(self, name) for name in ("dtype", "quantize", "device", "backend")}
        adapter = (Path(path) / "adapter_config.json").is_file()
        return ModelOptions(model=self.model if adapter else path, adapter=path if adapter else None, **given)


def main(argv: list[str] | None = None) -> None:
    """Parse the options, read the data, load the models, measure, print, write."""
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
    """Return what was measured: {"model", "adapter", "seconds"}, "classification", "references", ... as asked.

    Compared with a base it has "base" too, and with `also` "others": {name: the same of that model}.
    """
    kinds = {name: load_kind(name) for name in config.kinds}
    tasks = {name: kind.read(config) for name, kind in kinds.items()}  # first: an error should not wait for the model
    start = time.monotonic()
    models = {"": config, **config.others}
    found = {name: _found(options, kinds, tasks, config) for name, options in models.items()}
    based = {name: kind for name, kind in kinds.items() if name in BASED}
    alone = config.base is None and config.adapter is None  # the model is the base, for the others if there are some
    base = found[""] if alone else _found(config.reference, based, tasks, config) if based else {}
    described = {}
    for name, options in models.items():
        against = {} if alone and not name else base
        described[name] = {"model": options.model, "adapter": options.adapter}
        described[name] |= {"base": config.reference.model} if against else {}
        for key, kind in kinds.items():
            described[name][kind.KEY] = kind.report(tasks[key], found[name][key], against.get(key), config)
    result = described.pop("")
    result |= {"others": described} if described else {}
    return result | {"seconds": round(time.monotonic() - start, 2)}


def load_kind(name: str) -> Any:
    """Return the module of a kind, one of `KINDS`; it may load torch, which a door does not before it works."""
    return import_module(f"minitune.evaluation.kinds.{name}")


def _found(
    options: ModelOptions, kinds: dict[str, Any], tasks: dict[str, Any], config: EvaluateConfig
) -> dict[str, Any]:
    """Return what each kind measured of one model, which is gone then: two at once may not fit."""
    model, tokenizer = options.load()
    return {name: kind.measure(model, tokenizer, tasks[name], config) for name, kind in kinds.items()}


def table(result: dict[str, Any]) -> str:
    """Return the results as lines for a reader."""
    lines = [f"model       {result['model']}" + (f" + {result['adapter']}" if result["adapter"] else "")]
    if "base" in result:
        lines.append(f"base        {result['base']}")
    for kind in map(load_kind, KINDS):
        if kind.KEY in result:
            lines += kind.lines(result[kind.KEY])
    for name, other in result.get("others", {}).items():
        lines += ["", f"{name}:", table(other)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
