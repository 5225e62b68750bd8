"""The comparisons of a report: what was measured before and after, with intervals, and what was not measured.

A result of `python -m minitune.evaluate` holds an object for each kind of measurement. Of one with "scores" every
metric is shown, before and after where there was a base; forgetting and safety have tables of their own; of any other
every number is, by its path, so that kinds that are yet to come stand in the report too.
"""

import shlex
from collections.abc import Iterator
from typing import Any

from minitune.reporting.document import Code, Paragraph, Part, Table
from minitune.reporting.record import EVALUATIONS, Run

SAFETY, FORGETTING = "safety", "forgetting"  # sections of a result that have a place of their own
_HEAD = ("", "before", "after", "difference (95% interval)", "test")


def after_parts(run: Run) -> list[Part]:
    """Return the table of losses and of all that was evaluated, and how to evaluate more."""
    rows = list(_loss_rows(run))
    for name, result in run.measured.items():
        for kind, found in () if "advice" in result else _kinds(result):  # a curve has a section of its own
            if kind not in (SAFETY, FORGETTING):
                rows += _score_rows(f"{name}, {kind}", found)
    parts: list[Part] = [Table(_HEAD, rows)] if rows else []
    if not run.measured:
        parts += [Paragraph("The task itself was not measured. To do so, on rows that no step has seen:"),
                  Code(_command(run, "--classify test.jsonl --labels a,b", "task"), "sh")]  # fmt: skip
    return parts


def _loss_rows(run: Run) -> Iterator[tuple]:
    base, best = run.base_loss, run.best
    if base is None or best is None:
        return
    gain = run.outcome.get("gain")
    after, test = best["validation_loss"], "no interval: the rows' own losses are not known"
    difference = f"{after - base:+.4f}"
    if gain and gain["interval"]:
        low, high = gain["interval"]  # of the fall
        difference, test = (
            f"{-gain['value']:+.4f} ({-high:+.4f} to {-low:+.4f})",
            f"paired bootstrap, {gain['rows']} rows",
        )
    elif gain:
        test = f"no interval: {gain['rows']} rows are too few"
    yield "validation loss (nats a target)", f"{base:.4f}", f"{after:.4f}", difference, test


def _kinds(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and content of each object of a result that was measured."""
    for kind, found in result.items():
        if isinstance(found, dict) and kind != "others":
            yield kind, found


def _score_rows(title: str, found: dict[str, Any]) -> Iterator[tuple]:
    """Yield a row for each metric."""
    scores, comparison = found.get("scores"), found.get("comparison") or {}
    if isinstance(scores, dict):
        for name, score in scores.items():
            before = (found.get("base") or {}).get(name)
            yield f"{title}: {name}", before and _spread(before), _spread(score), *_compared(comparison.get(name))
        return
    before, after = (dict(_measures(found.get(side))) for side in ("base", "tuned"))
    compared = _compared(comparison)  # of the first measure
    for path, value in after.items():
        yield f"{title}: {path}", before.get(path), value, *compared
        compared = None, None
    rest = {name: value for name, value in found.items() if name not in ("base", "tuned", "comparison")}
    for path, value in _measures(rest):
        yield f"{title}: {path}", None, value, None, None


def _measures(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number below `found` by its dotted path, those that have an interval with it."""
    if isinstance(found, dict) and isinstance(found.get("value"), int | float):
        yield path, _spread(found)
    elif isinstance(found, dict):
        for name, value in found.items():
            yield from _measures(value, f"{path}.{name}" if path else name)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, found


def _compared(one: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return the difference with its interval, and the verdict with its test, of a comparison where there is one."""
    if not one or "difference" not in one:
        return None, None
    low, high = one["interval"]
    p = "" if one.get("p") is None else f", p = {one['p']:.2g}"
    verdict = one.get("verdict") or "no better or worse"
    return f"{one['difference']:+.4g} ({low:+.4g} to {high:+.4g})", f"{verdict} ({one['test']}{p})"


def _spread(score: dict[str, Any]) -> str:
    """Return a value with its interval."""
    edges = score.get("interval")
    return f"{score['value']:.4g}" + (f" ({edges[0]:.4g} to {edges[1]:.4g})" if edges else "")


def _command(run: Run, options: str, name: str) -> str:
    """Return the command that measures the run's result into its folder, and the one that writes the report again."""
    result, model = run.outcome.get("result") or str(run.folder / "adapter"), run.options["model"]
    which = f"--model {shlex.quote(model)} --adapter {shlex.quote(result)}"
    if not result.endswith("adapter"):
        which = f"--model {shlex.quote(result)} --base {shlex.quote(model)}"
    place = shlex.quote(str(run.folder / EVALUATIONS / f"{name}.json"))
    again = f"python -m minitune.report {shlex.quote(str(run.folder))}"
    return f"python -m minitune.evaluate {which} {options} --output {place}\n{again}"


def forgetting_parts(run: Run) -> list[Part]:
    """Return the perplexity of general text before and after, or how to measure it."""
    parts, general = [], run.general
    for name, found in _found(run, FORGETTING):
        sets = found.get("sets", {}).items()
        rows = [
            (f"{name}: {title}, {one['kind']}", one.get("base"), one["value"], *_forgotten(one)) for title, one in sets
        ]
        parts += [Table(_HEAD, rows), Paragraph(str(found.get("verdict") or "not compared"), "Verdict")]
    if general:
        before, after = general["before"], general["after"]
        ratio = None if general["ratio"] is None else f"x {general['ratio']:.3f}"
        note = f"{after['tokens']:,} tokens of {general['text']}, window {after['window']}"
        parts.append(Table(_HEAD[:3] + ("after / before", ""),
                           [("perplexity", before and _spread(before), _spread(after), ratio, note)]))  # fmt: skip
    if not parts and run.options["objective"] != "reward":
        parts = [Paragraph("Not measured. To measure it now, or in a next run by --evaluation.general wiki-demo:"),
                 Code(_command(run, "--general wiki-demo", FORGETTING), "sh")]  # fmt: skip
    return parts


def _forgotten(one: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the difference in percent, of the base's perplexity or in points of accuracy, and verdict and test."""
    if "difference" not in one:
        return None, None
    change, low, high = (f"{100 * edge:+.1f}" for edge in (one["difference"], *one["difference_interval"]))
    unit = " %" if one["kind"] == "perplexity" else " points"
    return f"{change}{unit} ({low} to {high})", f"{one['verdict']} ({one['test']})"


def safety_parts(run: Run) -> list[Part]:
    """Return what was measured of refusals, or how to measure it."""
    if run.options["objective"] == "reward":
        return []
    parts: list[Part] = []
    for name, found in _found(run, SAFETY):
        rows = []
        for side, measure in (("harmful", "refusal_rate"), ("harmless", "over_refusal")):
            before, after = (found.get(model, {}).get(side, {}).get(measure) for model in ("base", "tuned"))
            compared = _compared(found.get("comparison", {}).get(side))
            rows.append((f"{name}: {measure.replace('_', ' ')} of {side} requests", before, after, *compared))
        parts += [Table(_HEAD, rows), Paragraph("Differences are of the share of requests that were taken rightly.")]
    return parts or [
        Paragraph("Not measured. To measure refusals of harmful prompts, and of harmless ones, beside the base's:"),
        Code(_command(run, "--safety donotanswer", SAFETY), "sh"),
    ]


def _found(run: Run, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each result that measured a kind, and what it found."""
    for name, result in run.measured.items():
        if isinstance(result.get(kind), dict):
            yield name, result[kind]
