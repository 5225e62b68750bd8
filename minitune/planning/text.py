"""A plan as lines to read: numbers with their units, tables with the words to the left."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minitune.planning.devices import DATE
from minitune.planning.questions import Verdict
from minitune.planning.run import MARGIN

SMALL = 1e9
"""Parameters below which a GPU waits for the processor more than it computes."""


def sized(count: float) -> str:
    """Return bytes as "1.3 GB" or "512 MB", of 10^9 and 10^6."""
    return f"{count / 1e9:,.1f} GB" if count >= 9.95e8 else f"{count / 1e6:,.0f} MB"


def timed(seconds: float) -> str:
    """Return seconds as "0.21 s", "3.1 min", "2.4 h" or "5.0 days"."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def ranged(low: str, high: str) -> str:
    """Return "1 to 2 s", or one of them where both are alike."""
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if unit and high.endswith(f" {unit}") else f"{low} to {high}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows under their heading, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def plan_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what `minitune.plan.plan` found."""
    return [line for part in (_run, _bytes, _time, _capacities, _remedies) for line in part(found)]


def _run(found: Mapping[str, Any]) -> Iterator[str]:
    run, model = found["run"], found["model"]
    flags = [name for name in ("packing", "gradient_checkpointing", "fused_backward") if run[name]]
    yield f"{model['name']}: {model['family']}, {model['parameters']:,} parameters"
    yield (f"{run['method']}, {run['objective']}, {run['optimizer']}, {run['dtype']}; {run['batch_size']} x "
           f"{run['max_length']:,} tokens, {run['accumulation_steps']} times a step"
           + "".join(f"; {flag.replace('_', ' ')}" for flag in flags))  # fmt: skip


def _bytes(found: Mapping[str, Any]) -> Iterator[str]:
    counted = dict(found["ledger"])
    yield "\nmemory"
    if not found["on_cpu"]:
        counted = {name: size for name, size in counted.items() if name not in ("allocator", "library", "resident")}
    names = {"held": "held all along", "peak": "peak of the tensors", "resident": "growth of the process"}
    shown = [(names.get(name, name.replace("_", " ")), sized(size)) for name, size in counted.items() if size]
    yield from columns(shown)
    more = f"{MARGIN - 1:.0%} for context and allocator"
    if found["on_cpu"]:
        more = f"{sized(found['needed'] - found['ledger']['resident'])} for Python and torch"
    yield f"  needed: {sized(found['needed'])}, with {more}"
    if found["generation"]:
        cache, peak = (sized(found["generation"][name]) for name in ("cache", "peak"))
        yield f"  to answer {found['run']['batch_size']} at once at this length: {peak}, of which the cache is {cache}"


def _time(found: Mapping[str, Any]) -> Iterator[str]:
    step, priced = found["step"], any(row["cost"] for row in found["time"])
    yield f"\ntime: {step['operations']:.3g} operations a step of {step['tokens']:,} tokens"
    if found["steps"]:
        yield f"  {found['steps']:,} steps"
    rows = [["device", "memory", "fits", "a step", *["the run"] * bool(found["steps"]), *["cost"] * priced]]
    for row in found["time"]:
        fits = {None: "-", True: "yes", False: "no"}[row["fits"]]
        cells = [row["device"], "-" if row["memory"] is None else sized(row["memory"]), fits]
        if row["step_seconds"] is None:
            rows.append([*cells, "no bf16", *["-"] * (len(rows[0]) - 4)])
            continue
        cells.append(ranged(*map(timed, row["step_seconds"])))
        cells += [ranged(*map(timed, row["run_seconds"]))] if row["run_seconds"] else []
        cells += (
            [ranged(*(f"{value:,.2f}" if value >= 0.01 else f"{value:.1g}" for value in row["cost"]))]
            if row["cost"]
            else []
        )
        rows.append(cells)
    yield from columns(rows)
    if len(rows) > 2 or rows[-1][0] != "here, measured":
        yield (f"  from data sheets ({DATE}) and a share of their peaks: a range, not a promise; --measured_step or "
               "--calibrate replace it")  # fmt: skip
        if found["model"]["parameters"] < SMALL:
            yield "  a model as small as this gets less of a GPU: count on several times as long there"


def _capacities(found: Mapping[str, Any]) -> Iterator[str]:
    memory, run = found["memory"], found["run"]
    if memory is None:
        return
    yield f"\nwhat fits into {sized(memory)}"
    head = ["method", "needs", "fits", f"largest batch at {run['max_length']:,}",
            f"longest row in batches of {run['batch_size']}"]  # fmt: skip
    rows = [
        [one["method"], sized(one["needed"]), "yes" if one["needed"] <= memory else "no",
         *(f"{number:,}" if number else "none" for number in (one["batch"], one["length"]))]
        for one in found["capacities"]
    ]  # fmt: skip
    yield from columns([head, *rows])


def _remedies(found: Mapping[str, Any]) -> Iterator[str]:
    if found["fits"] is not False:
        return
    yield "\nit does not fit; in order of least harm, each on top of those before it:"
    for number, one in enumerate(found["remedies"], 1):
        yield f"  {number}. {one['change']}: {one['cost']}; then {sized(one['needed'])}"
    if not found["remedies"] or found["remedies"][-1]["needed"] > found["memory"]:
        yield "  all of this is not enough: take a smaller model or more memory"


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return a verdict with its reasons."""
    lines = [verdict.advice, *(f"  - {reason}" for reason in verdict.reasons)]
    lines.append(f"measure first: {verdict.measure_first}")
    if verdict.method:
        lines.append(f"method: {verdict.method}, objective {verdict.objective}; aim for {verdict.examples:,} examples; "
                     "python -m minitune.plan --model ... says what it takes")  # fmt: skip
    return lines
