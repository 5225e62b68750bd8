"""Named metrics of one model, or of two on the same rows, as numbers for JSON and as lines for a reader."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minitune.evaluation.bootstrap import RESAMPLES, Statistics, interval, mean_of
from minitune.evaluation.comparison import compare, compare_right
from minitune.evaluation.metrics import wilson_interval


@dataclass(frozen=True)
class Measured:
    """A metric on rows: its statistics, what is `better`, and where each row is right or wrong, which ones are `right`.

    `better` is None where more is neither good nor bad, as of a length.
    """

    statistics: Statistics
    better: Literal["higher", "lower"] | None = "higher"
    right: tuple[bool, ...] | None = None


def share(right: Sequence[bool]) -> Measured:
    """Return the metric of a share of rows that are right."""
    return Measured(mean_of(right), right=tuple(right))


def numbers(metrics: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Return {name: {"value", "interval", "interval_by"}}, intervals of 95%.

    A share's is Wilson's: where no row is right, every resample agrees, and the bootstrap would claim certainty. For
    the same reason other metrics have None where all rows are alike.
    """
    found = {}
    for name, metric in metrics.items():
        if metric.right is not None:
            edges, by = wilson_interval(sum(metric.right), len(metric.right)), "Wilson"
        elif metric.statistics.alike:
            edges, by = None, "none: all rows are alike"
        else:
            edges, by = interval(metric.statistics), f"bootstrap, {RESAMPLES:,} resamples of rows"
        found[name] = {"value": metric.statistics.value, "interval": edges and list(edges), "interval_by": by}
    return found


def comparisons(tuned: dict[str, Measured], base: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Return {name: the fields of a Comparison} for the metrics of two models on the same rows."""
    found = {}
    for name, ours in tuned.items():
        theirs = base[name]
        if ours.right is not None:
            compared = compare_right(ours.right, theirs.right)
        else:
            compared = compare(ours.statistics, theirs.statistics, better=ours.better)
        found[name] = asdict(compared)
    return found


def report(
    tuned: tuple[dict[str, Any], dict[str, Measured]], base: tuple[dict[str, Any], dict[str, Measured]] | None = None
) -> dict[str, Any]:
    """Return what is written of one model, (counts of its answers, metrics), or of two on the same rows."""
    found = {"answers": tuned[0], "scores": numbers(tuned[1])}
    if base is None:
        return found
    return found | {
        "base_answers": base[0], "base": numbers(base[1]), "comparison": comparisons(tuned[1], base[1]),
    }  # fmt: skip


def count_lines(kind: str, found: dict[str, Any]) -> list[str]:
    """Return the counts of a `report`'s answers, a line for each model."""
    lines = []
    for name, counts in (("base", found.get("base_answers")), ("tuned" * ("base" in found), found["answers"])):
        if counts is not None:
            shown = ", ".join(f"{key} {value:,}" for key, value in counts.items() if isinstance(value, int | float))
            lines.append(" ".join(f"{kind:<12}{name} {shown}".split()))
    return lines


def score_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of a `report`, values with their 95% intervals."""
    if "comparison" not in found:
        return [f"{name:<19}{_score(one)}" for name, one in found["scores"].items()]
    lines = [f"{'':<19}{'base':<30}{'tuned':<30}{'difference':<34}tuned"]
    for name, one in found["scores"].items():
        compared = found["comparison"][name]
        low, high = compared["interval"]
        difference = f"{compared['difference']:+.4g} ({low:+.4g} to {high:+.4g})"
        p = "" if compared["p"] is None else f", p = {compared['p']:.2g}"
        verdict = f"{compared['verdict']}  ({compared['test']}{p})" if compared["verdict"] else "-"
        lines.append(f"{name:<19}{_score(found['base'][name]):<30}{_score(one):<30}{difference:<34}{verdict}")
    return [*lines, *conclusion(found["comparison"])]


def _score(one: dict[str, Any]) -> str:
    if one["interval"] is None:
        return f"{one['value']:.4g} (all rows alike)"
    low, high = one["interval"]
    return f"{one['value']:.4g} ({low:.4g} to {high:.4g})"


def conclusion(compared: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines that say of `comparisons` plainly where the tuned model does not win."""
    named = {}
    for verdict in ("wins", "loses", "undecided"):
        named[verdict] = ", ".join(name for name, one in compared.items() if one["verdict"] == verdict)
    first = next((name for name, one in compared.items() if one["verdict"]), None)
    lines = [] if first is None or compared[first]["verdict"] == "wins" else [_no_win(first, compared[first])]
    if named["loses"]:
        lines.append(f"the tuned model is WORSE than the base on {named['loses']}")
    if named["undecided"]:
        lines.append(f"the tuned model does not win on {named['undecided']}: the rows show no difference")
    if named["wins"]:
        lines.append(f"the tuned model wins on {named['wins']}")
    elif lines:
        lines.append("the tuned model does not win on any metric")
    return lines


def _no_win(name: str, one: dict[str, Any]) -> str:
    """Say of the metric that counts first, with the evidence, that the tuned model is not better."""
    low, high = one["interval"]
    evidence = f"95% interval {low:+.4g} to {high:+.4g}" if one["p"] is None else f"p = {one['p']:.2g}"
    found = f"{name}: difference {one['difference']:+.4g}, {evidence}"
    return f"the tuned model does not beat the base on {found} ({one['test']})"
