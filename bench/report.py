"""The results as a table and as a picture."""

from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.measure import summary

_COLOURS = {"aim met": "#1a7f37", "met": "#6cc070", "missed": "#cf5c5c", "-": "#9aa4ad"}


def table(results: dict[str, Any]) -> str:
    """Return all measured cases as aligned text."""
    head = ("case", "peer", "unit", "ours", "(best)", "peer", "(best)", "time", "bar", "aim", "", "ours MB", "peer MB",
            "memory", "bar", "aim", "", "floor", "load")  # fmt: skip
    rows = [head, *(_row(case, results["cases"][case.name]) for case in CASES if case.name in results["cases"])]
    widths = [max(len(row[i]) for row in rows if len(row) > 3) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    rates = [result["rates"] for result in results["cases"].values() if "rates" in result]
    if rates:
        best = {
            name: max(rate[name] for rate in rates) / 1e9 for name in ("float32", "medium", "bfloat16", "copy", "read")
        }
        error = rates[-1]["medium_error"]
        lines.append(
            f"matmul GFLOP/s: {best['float32']:.0f} fp32, {best['medium']:.0f} fp32 'medium' (error {error:.0e}), "
            f"{best['bfloat16']:.0f} bf16; copy {best['copy']:.0f} GB/s, read {best['read']:.0f}"
        )
    lines.append(f"{results['date']}: {machine['processor']}, {machine['threads']} threads on each side; {versions}")
    lines.append("times are medians; ratios are ours / peer, of seconds and of peak resident memory; "
                 "floor: share of the machine's own limit that we reach")  # fmt: skip
    return "\n".join(lines)


def _row(case: Any, result: dict[str, Any]) -> tuple[str, ...]:
    if "not_measured" in result:
        return case.name, case.title, f"not measured: {result['not_measured']}"
    if result["disagreement"]:
        return case.name, case.title, f"INVALID: {result['disagreement']}"
    numbers = summary(case, result)
    share = numbers["floor_share"]
    return (
        case.name, case.title, case.unit, *(f"{value:.2f}" for value in (*numbers["ours"], *numbers["peer"])),
        f"{numbers['time_ratio']:.2f}x", _bar(case.time_least), _bar(case.time_aim), numbers["time"],
        f"{result['ours']['peak_mb']:,.0f}", f"{result['peer']['peak_mb']:,.0f}", f"{numbers['memory_ratio']:.2f}x",
        _bar(case.memory_least), _bar(case.memory_aim), numbers["memory"],
        "-" if share is None else f"{share:.0%}", "{:.1f}-{:.1f}".format(*sorted(load[0] for load in result["load"])),
    )  # fmt: skip


def _bar(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the ratios as bars beside their marks; False where matplotlib or a valid case is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    counted = [(c, results["cases"].get(c.name, {})) for c in CASES]
    counted = [(c, summary(c, r)) for c, r in counted if "ours" in r and not r["disagreement"]][::-1]
    if not counted:
        return False
    figure = Figure(figsize=(12, 1.6 + 0.34 * len(counted)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("time", "memory"), strict=True):
        ratios = [numbers[f"{kind}_ratio"] for _, numbers in counted]
        axes.barh(range(len(counted)), ratios, color=[_COLOURS[numbers[kind]] for _, numbers in counted], height=0.62)
        for y, ((case, _), ratio) in enumerate(zip(counted, ratios, strict=True)):
            least, aim = getattr(case, f"{kind}_least"), getattr(case, f"{kind}_aim")
            for mark, style in ((least, "-"), (aim, ":")):
                if mark is not None:
                    axes.plot([mark, mark], [y - 0.42, y + 0.42], color="black", linestyle=style, linewidth=1.6)
            axes.text(max(ratio, least or 0) + 0.015, y, f"{ratio:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="#555", linewidth=0.8)
        axes.set_xlim(0, max(1.12, *(ratio + 0.12 for ratio in ratios)))
        axes.set_xlabel(f"{'seconds' if kind == 'time' else 'peak memory'}, ours / peer (less is better)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(counted)), [f"{case.title}  ({case.name})" for case, _ in counted], fontsize=8)
    machine = results["machine"]
    figure.suptitle(
        f"minitune against its peers: {machine['processor']}, {machine['threads']} threads, {results['date']}\n"
        "black line: the bar that was set, dotted: the aim; dark green: aim met, green: met, red: missed, grey: no bar",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
