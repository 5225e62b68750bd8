"""The roofline: each kernel's rate over its arithmetic intensity, below what the device reaches (Williams et al. 2009).

rate <= min(matmul ceiling, copy bandwidth x flops / bytes)
"""

from pathlib import Path
from typing import Any


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw it; False where matplotlib is not installed or nothing was measured."""
    ceilings = results.get("ceilings")
    points = []
    for entry in results["entries"].values():
        seconds = entry["seconds"].get("ours", entry["seconds"].get("eager"))
        if seconds:
            points.append((entry["kernel"], entry["flops"] / entry["bytes"], entry["flops"] / seconds))
    if not points or not ceilings:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    low, high = min(x for _, x, _ in points) / 2, max(x for _, x, _ in points) * 2
    ridge = ceilings["matmul"] / ceilings["copy"]
    edge = sorted({low, min(max(ridge, low), high), high})
    axes.plot(edge, [min(ceilings["matmul"], ceilings["copy"] * x) / 1e12 for x in edge], color="black", linewidth=1.2)
    for index, kernel in enumerate(dict.fromkeys(name for name, _, _ in points)):
        own = [(x, y / 1e12) for name, x, y in points if name == kernel]
        marker = "osD^vP*X<>hp"[index % 12]
        axes.plot(*zip(*own, strict=True), marker=marker, linestyle="none", markersize=6, label=kernel, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    facts = results["device"]
    what = "kernels" if facts["device"] != "cpu" else "references on the CPU: no kernel was timed"
    axes.set_title(
        f"{facts['device']}, {results['date']}: {what}\nblack: {ceilings['copy'] / 1e9:.0f} GB/s, "
        f"{ceilings['matmul'] / 1e12:.3g} TFLOP/s, measured in the same run", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    return True
