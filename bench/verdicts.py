"""The bars for kernels, as they were set before anything was measured, and a run's results as a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One condition on an entry's result."""

    text: str
    least: float
    value: Callable[[dict[str, Any], dict[str, float]], float]
    """Of a result and the ceilings; KeyError or TypeError where a part of it was not measured."""


def _bandwidth(result: dict[str, Any], ceilings: dict[str, float]) -> float:
    return result["bytes"] / result["seconds"]["ours"] / ceilings["copy"]


def _speed_over(name: str) -> Callable[[dict[str, Any], dict[str, float]], float]:
    def value(result, ceilings):
        return result["seconds"][name] / result["seconds"]["ours"]

    return value


BARS = {
    "bandwidth": Bar("at least 85% of copy bandwidth", 0.85, _bandwidth),
    "matvec": Bar("at least 70% of copy bandwidth, counted on packed bytes", 0.70, _bandwidth),
    "cublas": Bar("at least 85% of the rate of bf16 cuBLAS on the same shape", 0.85, _speed_over("cublas")),
    "bitsandbytes": Bar("never slower than bitsandbytes", 1.0, _speed_over("bitsandbytes")),
    "liger": Bar("never slower than Liger-Kernel", 1.0, _speed_over("liger")),
    "unfused": Bar("LoRA's term: never slower than launches of its own", 1.0, _speed_over("unfused")),
}


def verdicts(result: dict[str, Any], ceilings: dict[str, float] | None) -> dict[str, tuple[float | None, str]]:
    """Return for each bar of an entry its value and "met", "not met", "failed" or "not measured"."""
    found: dict[str, tuple[float | None, str]] = {}
    for name in result["bars"]:
        bar = BARS[name]
        try:
            value = bar.value(result, ceilings)
        except (KeyError, TypeError):
            found[name] = (None, "failed" if "ours" in result["failed"] else "not measured")
            continue
        found[name] = (value, "met" if value >= bar.least else "not met")
    return found


SIDES = ("ours", "eager", "compiled", "cublas", "unfused", "bitsandbytes", "liger")


def table(results: dict[str, Any]) -> str:
    """Return all entries as aligned text, and each bar's tally."""
    head = ("kernel and shape", "us: ours", *SIDES[1:], "GB/s", "TFLOP/s", "ceiling", "error", "eager's", "bars")
    rows = [head, *(_row(key, entry, results) for key, entry in results["entries"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i in (0, len(row) - 1) else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    for key, entry in results["entries"].items():
        lines += [f"{key}: {name} failed: {why}" for name, why in entry["failed"].items()]
    lines += [f"not measured: {name}" for name in results["unfinished"]]
    lines += _tally(results)
    return "\n".join([*lines, *_machine(results)])


def _row(key: str, entry: dict[str, Any], results: dict[str, Any]) -> tuple[str, ...]:
    times, ceilings = entry["seconds"], results.get("ceilings")
    cells = [f"{1e6 * times[side]:.1f}" if side in times else "-" for side in SIDES]
    rates = ["-"] * 3
    seconds = times.get("ours", times.get("eager"))
    if seconds and ceilings:
        traffic, work = entry["bytes"] / seconds, entry["flops"] / seconds
        share = max(traffic / ceilings["copy"], work / ceilings["matmul"])
        rates = [f"{traffic / 1e9:.0f}", f"{work / 1e12:.2f}", f"{share:.0%}"]
    errors = [f"{entry[name]:.1e}" if name in entry else "-" for name in ("error", "reference_error")]
    marks = [
        f"{name} {verdict}" if value is None else f"{name} {value:.2f} {verdict}"
        for name, (value, verdict) in verdicts(entry, ceilings).items()
    ]
    return key, *cells, *rates, *errors, ", ".join(marks)


def _tally(results: dict[str, Any]) -> list[str]:
    """Return for each bar how many entries meet it."""
    found = [verdicts(entry, results.get("ceilings")) for entry in results["entries"].values()]
    lines = []
    for name, bar in BARS.items():
        words = [one[name][1] for one in found if name in one]
        if words:
            counts = ", ".join(
                f"{words.count(w)} {w}" for w in ("met", "not met", "failed", "not measured") if w in words
            )
            lines.append(f"{bar.text}: {counts}")
    return lines


def _machine(results: dict[str, Any]) -> list[str]:
    facts, ceilings = results.get("device"), results.get("ceilings")
    if not facts or not ceilings:
        return ["the device could not be measured"]
    line = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("device", "driver"))
    lines = [
        f"{results['date']}: {facts['device']}, driver {facts['driver']}; {line}",
        f"ceilings: copy {ceilings['copy'] / 1e9:.0f} GB/s, bf16 matmul {ceilings['matmul'] / 1e12:.2f} TFLOP/s; "
        "GB/s, TFLOP/s and ceiling are of ours",
    ]
    if facts["device"] == "cpu":
        lines.append(
            "no GPU here: no kernel was timed; GB/s, TFLOP/s and ceiling are of the references, at small shapes"
        )
    return lines
