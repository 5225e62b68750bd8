"""The report of a run: what was trained on what, with which result, and how to load it.

Everything in it is read from the run folder, so it says what happened and not what was intended, and it can be written
again at any time (`python -m minitune.report RUN`), with what was measured since. What was not measured is said to be
so, with the command that measures it: a report that is silent about forgetting reads as if there were none.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from minitune.errors import counted
from minitune.files import atomic_file
from minitune.reporting.before_after import after_parts, forgetting_parts, safety_parts
from minitune.reporting.diagnosis import diagnose
from minitune.reporting.document import Chart, Code, Paragraph, Part, Section, Table, html, markdown
from minitune.reporting.evidence import LINT
from minitune.reporting.record import EVALUATIONS, MEASURES, Run, read_run


def write_report(folder: Path) -> list[Path]:
    """Write `report.md`, `report.html` and, where matplotlib is installed, `loss.png`; returns the two reports' paths.

    Raises ConfigError where the folder is no run.
    """
    run = read_run(folder)
    picture = plot_losses(folder / "loss.png", run)
    title = f"{run.options['objective']}, {run.options['method']}, of {run.options['model']}"
    found = sections(run, picture)
    paths = []
    for name, render in (("report.md", markdown), ("report.html", html)):
        with atomic_file(folder / name) as place:
            place.write_text(render(title, found), encoding="utf-8")
        paths.append(folder / name)
    return paths


def sections(run: Run, picture: bool) -> list[Section]:
    """Return what the report says, in order; `picture` says whether there is a loss.png."""
    return [
        Section("Result", _result(run)),
        Section("Before and after", after_parts(run)),
        Section("Preferences", _preferences(run)),
        Section("Diagnosis", _diagnosis(run)),
        Section("Loss", [_chart(run, "loss.png" if picture else "")]),
        Section("Data", _data(run)),
        Section("More data", _more_data(run)),
        Section("Forgetting", forgetting_parts(run)),
        Section("Safety", safety_parts(run)),
        Section("Samples", _samples(run)),
        Section("Cost", _cost(run)),
        Section("Use it", _usage(run)),
        Section("Configuration", _configuration(run)),
    ]


def _chart(run: Run, picture: str) -> Chart:
    """Return the losses over the steps; on a logarithmic axis where a high start makes the rest a flat line."""
    unit = "pair or answer" if any("chosen_reward" in line for line in run.steps) else "target token"
    series = {
        "training": [(line["step"], line["loss"]) for line in run.steps],
        "validation": [(line["step"], line["validation_loss"]) for line in run.evaluations],
    }
    values = [value for points in series.values() for _, value in points if value > 0]
    log_y = bool(values) and max(values) > 10 * min(values)
    shown = {name: points for name, points in series.items() if points}
    return Chart("Loss", shown, "step", f"loss (nats per {unit})", log_y, picture)


def plot_losses(path: Path, run: Run) -> bool:
    """Draw training and validation loss over the steps; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    chart = _chart(run, path.name)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=chart.x_label, ylabel=chart.y_label)
    for name, points in chart.series.items():
        style = "o-" if name == "validation" else "-"
        axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1, markersize=4)
    if chart.log_y:
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half of a step
    axes.grid(alpha=0.3, which="both")
    if chart.series:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _result(run: Run) -> list[Part]:
    """Say how the run ended, and which gates it passed."""
    steps, best = run.steps, run.best
    how = run.outcome.get("status") or ("it still goes on" if run.running else "it did not finish")
    rows = {
        "how it ended": f"{how}, {counted(steps[-1]['step'] if steps else 0, 'step')}",
        "what it died of": run.outcome.get("error"),
        "validation loss before": run.base_loss and f"{run.base_loss:.4f}",
        "validation loss, best": best and f"{best['validation_loss']:.4f} at step {best['step']:,}",
        "validation loss, last": best and f"{run.evaluations[-1]['validation_loss']:.4f}",
        "training loss, last step": steps and f"{steps[-1]['loss']:.4f}",
    }
    parts: list[Part] = [Table(("", ""), [(name, value) for name, value in rows.items() if value])]
    gates = run.outcome.get("gates")
    if gates:
        shown = [(gate["gate"], gate["value"], "passed" if gate["passed"] else "FAILED") for gate in gates]
        parts.append(Table(("required", "measured", ""), shown))
    return parts


def _preferences(run: Run) -> list[Part]:
    """Compare what preferences are watched by, before training and at the weights that were kept."""
    best = run.best
    if best is None or "validation_chosen_length" not in best:
        return []
    rows = []
    for name, title in MEASURES.items():
        values = [line.get(f"validation_{name}") for line in (run.evaluations[0], best)]
        if None not in values:
            rows.append((title, f"{values[0]:.3f}", f"{values[1]:.3f}"))
    return [Table(("on the validation rows", "before", f"step {best['step']:,}"), rows)]


def _diagnosis(run: Run) -> list[Part]:
    """Say what `python -m minitune.doctor` finds."""
    found = diagnose(run)
    parts: list[Part] = [] if any(one.alarm for one in found) else [Paragraph("Nothing that looks like a fault.")]
    for finding in found:
        lead = finding.name.capitalize() + ("" if finding.alarm else " (a note)")
        parts.append(Paragraph(f"{finding.evidence}. To do: {finding.remedy}.", lead))
    return parts


def _data(run: Run) -> list[Part]:
    """List the data files, what was counted in them, and where their rows came from."""
    head = ("file", "sha256", "used for", "training examples", "validation examples", "target tokens")
    files = [
        (file["path"], f"{file['sha256'][:16]}...", file.get("role", ""), file["training_examples"],
         file["validation_examples"], file["target_tokens"])
        for file in run.files
    ]  # fmt: skip
    parts: list[Part] = [Table(head, files)]
    origins = [(file["path"], one["path"], one["role"], one["examples"])
               for file in run.files for one in file.get("origins") or ()]  # fmt: skip
    if origins:
        parts.append(Table(("file", "origin of its rows", "role", "examples"), origins))
    lint = {
        "rows equal to another": "copies", "rows whose question has another answer too": "contradicted",
        "validation rows that are training rows": "leaked", "documents without an end of turn": "unended",
    }  # fmt: skip
    counts = [(title, run.data[name]) for title, name in lint.items() if name in run.data]
    counts += [(f"rows {what}", sum(file.get(name, 0) for file in run.files))
               for name, what in (("dropped", "left out as too long"), ("shortened", "shortened to fit"))]  # fmt: skip
    parts.append(Table(("lint of the training rows", "count"), counts))
    if labels := run.data.get("labels"):
        parts.append(Table(("answer", "training rows"), list(labels.items())))
    if lint := run.facts.get("lint"):
        names = ("path", *LINT)
        return [*parts, Table(("prepared file", *LINT), [[one.get(name) for name in names] for one in lint])]
    return [*parts, Paragraph("Near duplicates, mixed formats, personal data and more are found by:"),
            Code(f"python -m minitune.prepare {' '.join(map(shlex.quote, _training_files(run)))}", "sh")]  # fmt: skip


def _training_files(run: Run) -> list[str]:
    return [file["path"] for file in run.files if file.get("role") == "training"]


def _more_data(run: Run) -> list[Part]:
    """Say what `python -m minitune.curve` found, or how to find it."""
    parts: list[Part] = []
    for found in (one for one in run.measured.values() if "advice" in one):
        forecasts = (found["curve"] or {}).get("forecasts", ())
        rows = [(one["times"], one["rows"], one["value"], "{:.4g} to {:.4g}".format(*one["interval"]))
                for one in forecasts]  # fmt: skip
        parts += [Paragraph(found["advice"])]
        parts += [Table(("times the data", "rows", found["measure"], "95% interval"), rows)] if rows else []
    if parts:
        return parts
    files = ",".join(_training_files(run))
    options = (
        f"--data {shlex.quote(f'[{files}]' if ',' in files else files)} --model {shlex.quote(run.options['model'])}"
    )
    folder = shlex.quote(str(run.folder / EVALUATIONS / "curve"))
    return [Paragraph("Whether more data would help is not measured:"),
            Code(f"python -m minitune.curve {options} --output {folder}", "sh")]  # fmt: skip


def _samples(run: Run) -> list[Part]:
    """Show the sampled answers before training, and those of the weights that were kept."""
    if not run.evaluations or not run.evaluations[-1].get("samples"):
        return []
    first, last = run.evaluations[0], run.best or run.evaluations[-1]
    before = {sample["prompt"]: sample["answer"] for sample in first["samples"]}  # a resumed run may ask others
    parts: list[Part] = []
    for after in last["samples"]:
        shown = {"Prompt": after["prompt"], "Expected": after["expected"]}
        shown |= {f"Step {first['step']}": before.get(after["prompt"], "not asked")}
        shown |= {f"Step {last['step']}": after["answer"]}
        for name, value in shown.items():
            parts += [Paragraph("", name), Code(value or " ")]
    return parts


def _cost(run: Run) -> list[Part]:
    """Say what the run took."""
    last = run.steps[-1] if run.steps else {}
    seconds, targets = last.get("seconds", 0), last.get("target_tokens", 0)
    rows = [
        ("training time", f"{seconds:,.1f} s"),
        ("tokens", f"{last.get('tokens', 0):,}"),
        ("target tokens", f"{targets:,} ({targets / max(seconds, 1e-9):,.0f} per second)"),
        ("peak memory", f"{run.outcome.get('peak_rss_mb') or last.get('peak_rss_mb', 0):,.0f} MB"),
        ("energy", "unknown"),
    ]
    names = ("minitune", "torch", "dtype", "device", "threads", "processor")
    rows.append(("machine", ", ".join(f"{name} {run.environment[name]}" for name in names if name in run.environment)))
    plan = f"python -m minitune.plan --recipe {shlex.quote(str(run.folder / 'config.yaml'))}"
    return [Table(("", ""), rows), Paragraph("What it takes by part, elsewhere, and what else would fit:"),
            Code(plan, "sh")]  # fmt: skip


def _usage(run: Run) -> list[Part]:
    """Say how to load the result, here and elsewhere."""
    result = Path(run.outcome["result"]) if run.outcome.get("result") else None
    if result is None:
        return [Paragraph("There is no result to load.")]
    model, folder, quoted = shlex.quote(run.options["model"]), str(result), shlex.quote(str(result))
    adapter = result.name == "adapter"
    if run.options["objective"] == "reward":
        which = f"--model {model} --adapter {quoted}" if adapter else f"--model {quoted}"
        theirs = "transformers.AutoModelForSequenceClassification (an adapter through PEFT, task type SEQ_CLS)"
        return [Code(f"python -m minitune.score {which} --data pairs.jsonl", "sh"), Paragraph(f"Elsewhere: {theirs}.")]
    raw = 2 * (run.data.get("untemplated") or 0) > run.data.get("asked", 0)  # as in training
    how = "--raw --prompt '...'" if raw else "--chat"
    commands = [f"python -m minitune.generate --model {quoted} {how}"]
    if adapter:
        folder = str(result.with_name("merged"))
        commands = [
            f"python -m minitune.generate --model {model} --adapter {quoted} {how}",
            f"python -m minitune.export --model {model} --adapter {quoted} --merge --output {shlex.quote(folder)}",
        ]
    which = "the best validation loss" if run.outcome.get("best_step") is not None else "the last step"
    theirs = f"import transformers\n\nmodel = transformers.AutoModelForCausalLM.from_pretrained({folder!r})"
    return [
        Paragraph(f"The weights of {which}:"),
        Code("\n".join(commands), "sh"),
        Paragraph("Elsewhere, once that export is written:" if adapter else "Elsewhere:"),
        Code(theirs, "python"),
    ]


def _configuration(run: Run) -> list[Part]:
    """Say what matters most, and give all options as they were resolved."""
    options = run.options
    rows = f"{options['batch_size']} x {options['accumulation_steps']} rows"
    text = (
        f"Learning rate {options['optimizer']['learning_rate']:g} ({options['schedule']['kind']}), {rows} of at most "
        f"{options['max_length']} tokens a step, seed {options['seed']}. Every step: metrics.jsonl."
    )
    return [Paragraph(text), Code(yaml.safe_dump(_given(options), sort_keys=False), "yaml", folded="All options")]


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return nested options without those that are None or empty."""
    found = {name: _given(value) if isinstance(value, dict) else value for name, value in options.items()}
    return json.loads(json.dumps({name: value for name, value in found.items() if value not in (None, {}, [], ())}))
