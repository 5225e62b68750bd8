"""The report of a run: what was trained on what, with which result, and how to load it.

Everything in it is read from the run folder, so it says what happened and not what was intended.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from minitune.errors import counted
from minitune.reporting import watch
from minitune.reporting.journal import read_metrics


def write_report(folder: Path, options: dict[str, Any], outcome: dict[str, Any]) -> Path:
    """Write `report.md` and, where matplotlib is installed, `loss.png`; returns the report's path.

    `options` and `outcome` are the fields of the run's configuration and of its result.
    """
    lines = read_metrics(folder)
    evaluations = [line for line in lines if "validation_loss" in line]
    files = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    picture = plot_losses(folder / "loss.png", lines)
    parts = [
        f"# {options['objective']}, {options['method']}, of {options['model']}\n",
        _result(outcome, evaluations, [line for line in lines if "loss" in line]),
        _preferences(evaluations, outcome["best_step"]),
        "![loss](loss.png)\n" if picture else "",
        _data(files),
        _usage(options, outcome),
        _samples(evaluations, outcome["best_step"]),
        _settings(options, environment),
    ]
    path = folder / "report.md"
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def plot_losses(path: Path, lines: list[dict[str, Any]]) -> bool:
    """Draw training and validation loss over the steps; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    unit = "pair or answer" if any("chosen_reward" in line for line in lines) else "target token"
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss (nats per {unit})")
    for name, style, label in (("loss", "-", "training"), ("validation_loss", "o-", "validation")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    values = [line[name] for line in lines for name in ("loss", "validation_loss") if line.get(name, 0) > 0]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")  # else a high start makes the rest a flat line
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half of a step
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _result(outcome: dict[str, Any], evaluations: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Say how the run ended, in a table, and what to think of it."""
    base, best, tokens = outcome["base_loss"], outcome["best_loss"], outcome["target_tokens"]
    rows = {
        "how it ended": f"{outcome['status']}, {counted(outcome['steps'], 'step')}",
        "validation loss before": base and f"{base:.4f}",
        "validation loss, best": best and f"{best:.4f} at step {outcome['best_step']:,}",
        "validation loss, last": best and f"{evaluations[-1]['validation_loss']:.4f}",
        "training loss, last step": steps and f"{steps[-1]['loss']:.4f}",
        "target tokens": f"{tokens:,} ({tokens / max(outcome['seconds'], 1e-9):,.0f} per second)",
        "training time": f"{outcome['seconds']:,.1f} s",
        "peak memory": f"{outcome['peak_rss_mb']:,.0f} MB",
    }
    text = "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    if outcome["parted_step"] is not None:
        text += (
            f"\n**Over-fitting**: after step {outcome['parted_step']:,} the validation loss rose while the training "
            "loss went on falling. More data, fewer epochs, a lower rank or dropout help.\n"
        )
    if best and base and best >= base:
        text += "\n**No gain**: no step had a lower validation loss than the base model.\n"
    return text


_MEASURES = {
    "accuracy": "accuracy (chosen has the higher reward)",
    "prefers_chosen": "chosen has the higher log-probability",
    "accuracy_chosen_longer": "accuracy where chosen is longer",
    "accuracy_chosen_shorter": "accuracy where chosen is shorter",
    "margin": "margin of the rewards",
    "chosen_reward": "reward of chosen answers",
    "rejected_reward": "reward of rejected answers",
    "chosen_log_probability": "log-probability of chosen answers (nats)",
    "rejected_log_probability": "log-probability of rejected answers (nats)",
    "kl": "log-ratio to the reference (nats an answer)",
    "chosen_length": "length of chosen answers (tokens)",
    "rejected_length": "length of rejected answers (tokens)",
}


def _preferences(evaluations: list[dict[str, Any]], best_step: int | None) -> str:
    """Compare what preferences are watched by, before training and at the weights that were kept; "" for other runs."""
    last = next((line for line in evaluations if line["step"] == best_step), None)
    if last is None or "validation_chosen_length" not in last:
        return ""
    text = f"## Preferences\n\n| on the validation rows | before | step {best_step:,} |\n|---|---|---|\n"
    for name, title in _MEASURES.items():
        values = [line.get(f"validation_{name}") for line in (evaluations[0], last)]
        if None not in values:
            text += f"| {title} | {values[0]:.3f} | {values[1]:.3f} |\n"
    return text + "".join(f"\n**Warning**: {warning}.\n" for warning in watch.preferences(evaluations[0], last))


def _data(files: list[dict[str, Any]]) -> str:
    """List the data files."""
    names = ("file", "sha256", "training examples", "validation examples", "target tokens")
    head = f"## Data\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
    return head + "".join(
        f"| {f['path']} | {f['sha256'][:16]}... | {f['training_examples']:,} | {f['validation_examples']:,} "
        f"| {f['target_tokens']:,} |\n"
        for f in files
    )


def _usage(options: dict[str, Any], outcome: dict[str, Any]) -> str:
    """Say how to load the result, here and elsewhere."""
    result = outcome["result"]
    model, folder, quoted = shlex.quote(options["model"]), str(result), shlex.quote(str(result))
    if options["objective"] == "reward":
        return _reward_usage(result, model, quoted)
    commands = [f"python -m minitune.generate --model {quoted} --chat"]
    if result.name == "adapter":
        folder = str(result.with_name("merged"))
        commands = [
            f"python -m minitune.generate --model {model} --adapter {quoted} --chat",
            f"python -m minitune.export --model {model} --adapter {quoted} --merge --output {shlex.quote(folder)}",
        ]
    which = "the best validation loss" if outcome["best_step"] is not None else "the last step"
    theirs = f"import transformers\n\nmodel = transformers.AutoModelForCausalLM.from_pretrained({folder!r})"
    after = "Elsewhere, once that export is written:" if result.name == "adapter" else "Elsewhere:"
    shell, python = "\n".join(commands), f"```python\n{theirs}\n```"
    return f"## Use it\n\nThe weights of {which}:\n\n```\n{shell}\n```\n\n{after}\n\n{python}\n"


def _reward_usage(result: Path, model: str, quoted: str) -> str:
    """Say how to score answers with a reward model."""
    which = f"--model {model} --adapter {quoted}" if result.name == "adapter" else f"--model {quoted}"
    command = f"python -m minitune.score {which} --data pairs.jsonl"
    theirs = "transformers.AutoModelForSequenceClassification (an adapter through PEFT, task type SEQ_CLS)"
    return f"## Use it\n\n```\n{command}\n```\n\nElsewhere: {theirs}.\n"


def _samples(evaluations: list[dict[str, Any]], best_step: int | None) -> str:
    """Show the sampled answers before training, and those of the weights that were kept."""
    if not evaluations or not evaluations[-1]["samples"]:
        return ""
    first = evaluations[0]
    last = next((evaluation for evaluation in evaluations if evaluation["step"] == best_step), evaluations[-1])
    before = {sample["prompt"]: sample["answer"] for sample in first["samples"]}  # a resumed run may ask others
    text = "## Samples\n"
    for after in last["samples"]:
        shown = {"Prompt": after["prompt"], "Expected": after["expected"]}
        shown |= {f"Step {first['step']}": before.get(after["prompt"], "not asked")}
        shown |= {f"Step {last['step']}": after["answer"]}
        for name, value in shown.items():
            text += f"\n**{name}**\n\n" + "".join(f"    {line}\n" for line in value.splitlines() or [""])
        text += "\n---\n"
    return text


def _settings(options: dict[str, Any], environment: dict[str, Any]) -> str:
    """Point at the rest."""
    machine = ", ".join(f"{name} {environment[name]}" for name in ("minitune", "torch", "dtype", "device", "threads"))
    rows = f"{options['batch_size']} x {options['accumulation_steps']} rows"
    return (
        f"## Settings\n\nLearning rate {options['optimizer']['learning_rate']:g} ({options['schedule']['kind']}), "
        f"{rows} of at most {options['max_length']} tokens a step, seed {options['seed']}. All options: `config.yaml`. "
        f"Every step: `metrics.jsonl`.\n\n{machine}; {environment['processor']}\n"
    )
