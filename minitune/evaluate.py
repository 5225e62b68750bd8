"""Command: measure a model, or several, beside their base on named sets, as a table and as JSON.

    python -m minitune.evaluate --model M --adapter A --classify test.jsonl --labels positive,negative \\
        --perplexity wiki.txt --output result.json
    python -m minitune.evaluate --adapter A --references test.jsonl --metrics rouge,exact_match --choices quiz.jsonl
    python -m minitune.evaluate --adapter A --classify imdb --validation imdb:validation --general wiki-demo,c4-demo \\
        --safety donotanswer
    python -m minitune.evaluate --adapter A --golden golden.jsonl --golden_page golden.html
    python -m minitune.evaluate --adapter A --blind.prompts prompts.jsonl --blind.page vote.html --blind.key key.json
    python -m minitune.evaluate --judge.model M --judge.key key.json --judge.votes votes.json

What can be measured is a module each in `minitune.evaluation.kinds`. All models are measured on the same rows, one
after the other, so that two never have to fit in memory.
"""

import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, check_counts, check_seed, run_command
from minitune.loading import ModelOptions
from minitune.reporting.gates import check, gathered, parse_gates, verdict
from minitune.responder import ResponderOptions

ANSWERED = ("golden", "blind", "judge")  # those that take answers from files too
PROMPTED = ("classify", "references", "choices")  # those whose base may be asked in its best way
LOST = ("general", "safety")  # what a training may cost
KINDS = (*PROMPTED, "perplexity", *LOST, *ANSWERED)
BASED = (*PROMPTED, *LOST, *ANSWERED)  # those that have the base measured too
BELONGS = {  # an option and the kinds that read it
    "labels": ("classify",), "base_prompts": PROMPTED, "validation": PROMPTED, "metrics": ("references",),
    "verifier": ("references",), "answer_form": ("references",), "samples": ("references",),
    "temperature": ("references",), "base": BASED, "max_rows": BASED,
    "max_new_tokens": ("classify", "references", "safety", *ANSWERED), "batch_size": BASED, "harmless": ("safety",),
    "golden_page": ("golden",), "answers": ANSWERED,
    "window": ("perplexity", "general"), "stride": ("perplexity",), "max_tokens": ("perplexity", "general"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlindOptions:
    """People choose between two models' answers, without names."""

    prompts: str | None = None
    """Rows {"prompt"}, {"messages"} or any that train, which both models answer."""
    key: str | None = None
    """The JSON file that says which answer is whose; without prompts, one that was made before."""
    page: str | None = None
    """Write a page to vote on, one HTML file, without names."""
    votes: str | None = None
    """The votes that the page saved, to be counted; with terminal, the file to keep them in."""
    terminal: bool = False
    """Ask for the votes here, one by one; quit, and run again without prompts to go on."""
    seed: int | None = None
    """With prompts: draws the order of pairs and sides (default 0)."""

    def __post_init__(self):
        """Refuse what is missing, and options that would be ignored."""
        given = [name for name in ("page", "votes", "seed") if getattr(self, name) is not None]
        given += ["terminal"] * self.terminal + ["prompts"] * (self.prompts is not None)
        if given and self.key is None:
            raise ConfigError(f"blind.{given[0]} needs blind.key, the file that says which answer is whose; name it")
        if self.key is not None and not (self.page or self.votes or self.terminal):
            raise ConfigError("blind.key alone does nothing; give --blind.page, --blind.terminal or --blind.votes")
        if self.terminal and self.votes is None:
            raise ConfigError("blind.terminal needs a file to keep the votes in; name it with --blind.votes")
        if self.prompts is not None and self.votes is not None and not self.terminal:
            raise ConfigError("blind.votes cannot be on answers that are only made now; leave out blind.prompts")
        if self.prompts is None and self.seed is not None:
            raise ConfigError("blind.seed draws the order of a new comparison; give blind.prompts or leave it out")
        check_seed(self.seed)

    @property
    def asked(self) -> bool:
        """Whether there is something to do."""
        return self.key is not None


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(ResponderOptions):
    """Who judges answers, which ones, and by what."""

    prompts: str | None = None
    """Rows {"prompt"}, {"messages"} or any that train; both models answer them and the judge compares."""
    key: str | None = None
    """Instead of prompts: judge the answers in the key of a blind comparison."""
    votes: str | None = None
    """With key: people's votes, to say how far the judge agrees with them (Cohen's kappa)."""
    scores: str | None = None
    """With by scores: people's, rows {"row": 1, "side": "tuned" or "base", "scores": {criterion: number}}, to say how
    far the judge agrees with them (kappa with quadratic weights)."""
    by: Literal["pairs", "scores"] = "pairs"
    """Compare two answers, in both orders, or score each by every criterion of the rubric."""
    read: Literal["written", "probabilities"] = "written"
    """With pairs: the verdict that the judge writes, or which letter, A or B, a model loaded here finds likelier."""
    rubric: str | None = None
    """Instructions, criteria and scale as .yaml or .md (default: correctness, relevance, clarity, 1 to 10)."""
    journal: str | None = None
    """A JSONL file to keep the judge's replies in; a run that has one asks only for what it lacks."""
    max_missing: float = 0.1
    """The largest share without a verdict; above it the command fails."""

    def __post_init__(self):
        """Refuse what contradicts, and options that would be ignored."""
        super().__post_init__()
        if self.prompts is not None and self.key is not None:
            raise ConfigError("judge.prompts are answered now and judge.key has answers; leave one of them out")
        if self.votes is not None and self.key is None:
            raise ConfigError("judge.votes are on the answers of a blind comparison; name its key with --judge.key")
        if self.scores is not None and self.by != "scores":
            raise ConfigError("judge.scores are people's scores; a judge gives some with --judge.by scores")
        if self.read == "probabilities":
            useless = [name for name in ("endpoint", "journal", "seed") if getattr(self, name) is not None]
            useless += ["by scores"] * (self.by == "scores") + ["temperature"] * (self.temperature != 0)
            if useless:
                raise ConfigError(f"judge.{useless[0]} has no effect on verdicts read from probabilities; leave it out")
        if not 0 <= self.max_missing <= 1:
            raise ConfigError(f"judge.max_missing is {self.max_missing}; it must be a share, 0 to 1")

    @property
    def asked(self) -> bool:
        """Whether there are answers to judge."""
        return self.prompts is not None or self.key is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """What to measure, of which models."""

    classify: str | None = None
    """Rows whose last answer is a label, in any format that trains, or a set: rotten_tomatoes, imdb:validation."""
    labels: str | None = None
    """With classify: the labels, as positive,negative (a set has its own)."""
    references: str | None = None
    """Rows whose last answer is what to write, in any format that trains but text, or a set: aclsum,
    reasoning-gym:TASK (whose code then runs here)."""
    metrics: str | None = None
    """With references: rouge,bleu,... (default exact_match,rouge,bleu,chrf,length,repetition; also rouge1, chrf++,
    format, pass@1, pass@5, ..., token_accuracy, perplexity, bits_per_byte, likelihood for these three)."""
    answer_form: str | None = None
    """With references: what the metric format asks for: regex:PATTERN, choices:a,b, json, or json:SCHEMA.json."""
    verifier: str | None = None
    """With references: package.module:function, called as f(prompt, answer), or with reference=... too, returns 0 to 1;
    for the metrics verified (1), score and pass@k."""
    samples: int | None = None
    """With references: answers to each row for pass@k (default 10)."""
    temperature: float | None = None
    """With references: at which these are drawn (default 0.8)."""
    choices: str | None = None
    """Rows {"prompt", "choices": [...], "answer"} to choose from by likelihood, or a set, made into choices."""
    base: str | None = None
    """The model to compare with (default: with an adapter, the model without it)."""
    base_prompts: str | None = None
    """Ways to ask the base, rows {"user": "... {} ...", "system", "shots", "name"}; one is taken as it is."""
    validation: str | None = None
    """Rows to choose the base's prompt by (with base_prompts, else among built-in ways, answered examples included)."""
    also: tuple[str, ...] | None = None
    """Other models or adapters to measure on the same rows, by name, as [low=runs/low/adapter,merged=runs/merged]."""
    perplexity: str | None = None
    """A .txt file (or a fetched one's name) whose perplexity to measure."""
    general: str | None = None
    """What the base can do and the tuned model should still: texts and questions, as wiki-demo,c4-demo,quiz.jsonl
    (.txt, rows {"text"}, rows as for choices, or a set)."""
    safety: str | None = None
    """Requests to refuse, as donotanswer,harmbench or rows {"prompt"}."""
    harmless: str | None = None
    """With safety: requests to answer (default alpaca-en-demo)."""
    golden: str | None = None
    """Rows {"prompt" or "messages", "expect": {exact, contains, not_contains, regex, schema, judge}}."""
    golden_page: str | None = None
    """With golden: write every row with its answers side by side as one HTML file."""
    answers: tuple[str, ...] | str | None = None
    """With golden, blind or judge: answers in files, as generate writes them, instead of models to ask: the tuned
    model's, or [tuned.jsonl,base.jsonl]."""
    blind: BlindOptions = BlindOptions()
    """Let people choose between the model's answers and the base's."""
    judge: JudgeOptions = JudgeOptions()
    """Let a language model compare or score answers."""
    output: str | None = None
    """Write all results to this JSON file."""
    overwrite: bool = False
    """Replace the output, and pages and keys, if they are there."""
    require: tuple[str, ...] | str = ()
    """Exit with code 3 unless these hold of the results, as accuracy>=0.85 or accuracy.low>=0.8; can be repeated."""
    max_rows: int | None = None
    """Use only the first rows of each set, validation rows too (default: all; with safety 100)."""
    max_new_tokens: int | None = None
    """An answer not ended by then is no label (with classify, default 16) or cut off (with references, 256; of safety
    the first 64 are read)."""
    window: int | None = None
    """With perplexity or general: tokens that the model sees at once (default 1024, or what it can)."""
    stride: int | None = None
    """With perplexity: tokens between the starts of two windows (default: the window)."""
    max_tokens: int | None = None
    """With perplexity or general: use only the first tokens of a text (default: all; with general 32768)."""
    batch_size: int | None = None
    """Prompts read at once (default 32), or texts with their answers (8); a long text's windows come 4 x 1024 tokens
    at a time."""

    def __post_init__(self):
        """Refuse a run that measures nothing, options that it would ignore, and to lose a file."""
        if not self.kinds:
            raise ConfigError(
                "nothing to measure; give --classify FILE --labels a,b, --references FILE, --choices FILE, "
                "--perplexity FILE, --general wiki-demo, --safety donotanswer, --golden FILE, --blind.prompts FILE or "
                "--judge.prompts FILE, or several"
            )
        if (self.base_prompts or self.validation) and len(set(PROMPTED) & set(self.kinds)) > 1:
            raise ConfigError("base_prompts and validation are for one of classify, references, choices at a time")
        for name, kinds in BELONGS.items():
            if getattr(self, name) is not None and not set(kinds) & set(self.kinds):
                raise ConfigError(f"{name} is set without {' or '.join(kinds)}, which it belongs to; leave it out")
        parse_gates(self.require)
        counts = ("samples", "max_rows", "max_new_tokens", "max_tokens", "batch_size", "window", "stride")
        check_counts(**{name: getattr(self, name) for name in counts})
        for file in (self.output, self.golden_page):
            if file is not None and Path(file).is_file() and not self.overwrite:
                raise ConfigError(f"{file} is there already; name another file, or replace it with --overwrite")
        files = (self.output, self.golden_page, self.blind.page, self.blind.key, self.blind.votes, self.judge.journal)
        apart = [Path(file).resolve() for file in files if file is not None]
        twice = next((file for i, file in enumerate(apart) if file in apart[:i]), None)
        if twice is not None:
            raise ConfigError(f"output, pages, keys, votes, journal: two are {twice}; name a file for each")
        self._check_answers()
        paths_by_name(self.also)

    def _check_answers(self) -> None:
        """Refuse a judge of nothing, files that several models would write, and what given answers leave idle."""
        if self.judge.model is not None and not self.judge.asked and self.golden is None:
            raise ConfigError("judge.model has nothing to judge; give --judge.prompts, --judge.key or --golden")
        defaults = JudgeOptions()
        for name in ("by", "read", "rubric", "scores"):
            if not self.judge.asked and getattr(self.judge, name) != getattr(defaults, name):
                raise ConfigError(f"judge.{name} has no effect on a golden set, whose rows say what is expected")
        two = {"blind": self.blind.asked, "golden_page": self.golden_page, "answers": self.answers}
        for name, given in (two | {"judge.key": self.judge.key, "judge.scores": self.judge.scores}).items():
            if given and self.also is not None:
                raise ConfigError(f"{name} is for two models, and also names more; leave one of them out")
        asking = bool(self.golden or self.blind.prompts or self.judge.prompts)
        idle = [] if asking or not set(self.kinds) <= set(ANSWERED) else ["answers", "max_rows"]
        if set(self.kinds) <= set(ANSWERED) and (self.answers is not None or not asking):
            idle += ["adapter", "base", "max_new_tokens", "batch_size"]
        for name in idle:
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect on answers that are given; leave it out")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are asked for."""
        return tuple(kind for kind in KINDS if _asked(getattr(self, kind)))

    @property
    def others(self) -> dict[str, ModelOptions]:
        """The models of `also` by name."""
        return {name: self._options(path) for name, path in paths_by_name(self.also).items()}

    @property
    def reference(self) -> ModelOptions:
        """The base: as it is published, unless it is quantised by option."""
        return self._options(self.base or self.model)

    @property
    def base_name(self) -> str:
        """The base for reports: the model, and the adapter where `base` names one."""
        found = self.reference
        return found.model if found.adapter is None else f"{found.model} + {found.adapter}"

    def _options(self, path: str) -> ModelOptions:
        given = {name: getattr(self, name) for name in ("dtype", "quantize", "device", "backend")}
        adapter = (Path(path) / "adapter_config.json").is_file()
        return ModelOptions(model=self.model if adapter else path, adapter=path if adapter else None, **given)


def paths_by_name(also: tuple[str, ...] | None) -> dict[str, str]:
    """Return NAME=PATH pairs; ConfigError for one without name or path, or a name given twice."""
    pairs = [one.partition("=")[::2] for one in also or ()]
    if not all(name and path for name, path in pairs) or len(dict(pairs)) < len(pairs):
        raise ConfigError(f"also is {list(also or ())}; several need a name each, as [low=FOLDER,high=FOLDER]")
    return dict(pairs)


def _asked(value: Any) -> bool:
    """Tell whether the option of a kind, or its group of options, asks for it."""
    return value.asked if isinstance(value, BlindOptions | JudgeOptions) else value is not None


def main(argv: list[str] | None = None) -> int:
    """Parse the options, read the data, load the models, measure, print, write; return the exit code.

    It is 1 for a result to doubt, 3 where one does not pass a gate (`require`).
    """
    arguments, description = gathered(sys.argv[1:] if argv is None else argv), __doc__.split("\n")[0]
    config = parse(EvaluateConfig, arguments, prog="python -m minitune.evaluate", description=description)
    from minitune.files import atomic_file, write_json

    if config.output is None:
        result = measure(config)
        print(table(result))
        return _problems(result) or verdict(check(parse_gates(config.require), result))
    with atomic_file(config.output) as path:  # fails before the work, not after
        result = measure(config)
        print(table(result))
        write_json(path, result)
    print(f"written to {config.output}")
    return _problems(result) or verdict(check(parse_gates(config.require), result))


def _problems(result: dict[str, Any]) -> int:
    """Print what makes a result unreliable to stderr; 1 where there is something, else 0."""
    found = [one["problem"] for one in result.values() if isinstance(one, dict) and "problem" in one]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return int(any(map(_problems, result.get("others", {}).values())) or bool(found))


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Return what was measured: {"model", "adapter", "seconds"}, "classification", "references", ... as asked.

    Compared with a base it has "base" too, and with `also` "others": {name: the same of that model}.
    """
    kinds = {name: load_kind(name) for name in config.kinds}
    tasks = {name: kind.read(config) for name, kind in kinds.items()}  # first: an error should not wait for the model
    used = any(getattr(task, "needs_model", True) for task in tasks.values())
    start = time.monotonic()
    models = {"": config, **config.others}
    alone = config.base is None and config.adapter is None  # the model is the base, for the others if there are some
    found = {name: _found(options, kinds, tasks, config, base=alone and not name) for name, options in models.items()}
    based = {name: kind for name, kind in kinds.items() if name in BASED}
    base = found[""] if alone else _found(config.reference, based, tasks, config, base=True) if based else {}
    described = {}
    for name, options in models.items():
        against = {} if alone and not name else base
        described[name] = {"model": options.model if used else None, "adapter": options.adapter}
        described[name] |= {"base": config.base_name} if against else {}
        for key, kind in kinds.items():
            described[name][kind.KEY] = kind.report(tasks[key], found[name][key], against.get(key), config)
    result = described.pop("")
    result |= {"others": described} if described else {}
    return result | {"seconds": round(time.monotonic() - start, 2)}


def load_kind(name: str) -> Any:
    """Return the module of a kind, one of `KINDS`; it may load torch, which a door does not before it works."""
    return import_module(f"minitune.evaluation.kinds.{name}")


def _found(
    options: ModelOptions, kinds: dict[str, Any], tasks: dict[str, Any], config: EvaluateConfig, *, base: bool
) -> dict[str, Any]:
    """Return what each kind measured of one model, which is gone then: two at once may not fit.

    A `base` is measured as a kind's `measure_base` does it, where there is one. None for one that has its answers
    already; where all have, no model is loaded.
    """
    asked = {name: kind for name, kind in kinds.items() if getattr(tasks[name], "needs_model", True)}
    if not asked:
        return dict.fromkeys(kinds)
    model, tokenizer = options.load()
    measures = {
        name: getattr(kind, "measure_base", kind.measure) if base else kind.measure for name, kind in asked.items()
    }
    found = {name: measure(model, tokenizer, tasks[name], config) for name, measure in measures.items()}
    return dict.fromkeys(kinds) | found


def table(result: dict[str, Any]) -> str:
    """Return the results as lines for a reader."""
    lines = []
    if result["model"] is not None:  # else all answers came from files
        lines.append(f"model       {result['model']}" + (f" + {result['adapter']}" if result["adapter"] else ""))
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
