"""The comparisons of a report: what was measured before and after, with intervals, and what was not measured.

A result of `python -m minitune.evaluate` holds objects with "scores", and where there was a base "base" and
"comparison", by names that this file need not know; so metrics that are yet to come stand in the report too.
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
        for kind, found in _kinds(result):
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
    """Yield a row for each metric; what is no metric, or only part of one, is left to the result's own file."""
    scores = found.get("scores")
    if not isinstance(scores, dict):
        value, interval = found.get("perplexity"), found.get("interval")
        if isinstance(value, int | float):
            yield title, None, _spread({"value": value, "interval": interval}), None, None
        return
    for name, score in scores.items():
        before = (found.get("base") or {}).get(name)
        compared = (found.get("comparison") or {}).get(name)
        difference = test = None
        if compared:
            low, high = compared["interval"]
            difference = f"{compared['difference']:+.4g} ({low:+.4g} to {high:+.4g})"
            p = "" if compared.get("p") is None else f", p = {compared['p']:.2g}"
            test = f"{compared.get('verdict') or 'no better or worse'} ({compared['test']}{p})"
        yield f"{title}: {name}", before and _spread(before), _spread(score), difference, test


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
    parts = _section_parts(run, FORGETTING)
    general = run.general
    if general:
        before, after = general["before"], general["after"]
        ratio = None if general["ratio"] is None else f"x {general['ratio']:.3f}"
        note = f"{after['tokens']:,} tokens of {general['text']}, window {after['window']}"
        parts.append(Table(_HEAD[:3] + ("after / before", ""),
                           [("perplexity", before and _spread(before), _spread(after), ratio, note)]))  # fmt: skip
    if not parts and run.options["objective"] != "reward":
        parts = [Paragraph("Not measured. To measure it now, or in a next run by --evaluation.general wiki-demo:"),
                 Code(_command(run, "--perplexity wiki-demo", FORGETTING), "sh")]  # fmt: skip
    return parts


def safety_parts(run: Run) -> list[Part]:
    """Return what was measured of refusals, or how to measure it."""
    if run.options["objective"] == "reward":
        return []
    return _section_parts(run, SAFETY) or [
        Paragraph("Not measured. To measure refusals of harmful prompts, and of harmless ones, beside the base's:"),
        Code(_command(run, "--safety donotanswer", SAFETY), "sh"),
    ]


def _section_parts(run: Run, kind: str) -> list[Part]:
    """Return the tables of one kind in all results."""
    parts: list[Part] = []
    for name, result in run.measured.items():
        found = dict(_kinds(result)).get(kind)
        if found is not None:
            parts.append(Table(_HEAD, list(_score_rows(name, found))))
            parts += [Paragraph(found["verdict"], "Verdict")] if isinstance(found.get("verdict"), str) else []
    return parts
