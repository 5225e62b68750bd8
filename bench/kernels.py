"""`python -m bench.kernels`: every kernel beside its reference, torch.compile of that, and peers; with a roofline.

For each kernel and shape: the time of a call (`bench.timing`), GB/s and TFLOP/s, the share of the ceiling measured in
the same run, the error against fp64, and whether the bars are met that were set before anything was measured. What was
not measured is shown as that: a peer that is not installed, an entry after the time was up, kernels without a GPU (a
CPU runs the references at small shapes, to show that the bench works).

The work is done in a process of its own, which answers with one line an entry. When it crashes, hangs, or loses the
GPU to an illegal address, the entry at fault is recorded as failed and a new process goes on with the next.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.roofline import draw
from bench.verdicts import BARS, table, verdicts

ROOT = Path(__file__).resolve().parent.parent
ENTRY_SECONDS = 90  # a process that takes longer for one entry is ended


def _of(module: str, name: str, sizes: Any, cache_bytes: int) -> Iterator[Any]:
    """Yield the entries of the function `name` of a module of entries."""
    import importlib

    function = getattr(importlib.import_module(f"bench.{module}"), name)
    yield from function(sizes, cache_bytes) if name == "linear" else function(sizes)


_norm, _rope, _gated = (partial(_of, "entries", name) for name in ("rms_norm", "rotary", "gated"))
_linear, _formats, _losses, _adamw = (
    partial(_of, "entries4bit", name) for name in ("linear", "formats", "losses", "adamw")
)
BENCHED = {  # each @triton.jit function that is launched: its module, and the function that makes its entries
    "nf4_matvec": ("nf4_matmul", _linear),
    "nf4_matmul": ("nf4_matmul", _linear),
    "nf4_matmul_backward": ("nf4_matmul", _linear),
    "rms_norm_forward": ("norm", _norm),
    "rms_norm_backward": ("norm", _norm),
    "rope_turn": ("rope", _rope),
    "glu_forward": ("swiglu", _gated),
    "glu_backward": ("swiglu", _gated),
    "cross_entropy_rows": ("cross_entropy", _losses),
    "nf4_dequantize": ("nf4", _formats),
    "nf4_quantize": ("nf4", _formats),
    "adamw8bit_update": ("adamw8bit", _adamw),
}


def entries(wanted: str | None, sizes: Any, cache_bytes: int) -> Iterator[Any]:
    """Yield the entries whose kernel or module is called `wanted`; None: all."""
    makers = {}
    for module, make in BENCHED.values():
        makers[make] = module
    for make in makers:
        for entry in make(sizes, cache_bytes):
            if wanted in (None, entry.kernel, BENCHED[entry.kernel][0]):
                yield entry


def one_line(error: BaseException) -> str:
    """Return an error as one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _time_side(clock: Any, name: str, make: Any, graph: bool) -> tuple[float, str]:
    """Return the seconds of a side's call, and "graph" or "events"."""
    from bench.entries import with_backend

    backend = "reference" if name in ("eager", "compiled") else "auto"
    calls = with_backend(backend, make)()
    if isinstance(calls, list) and graph:
        return with_backend(backend, clock.graph_seconds)(calls), "graph"
    return with_backend(backend, clock.seconds)(calls[0] if isinstance(calls, list) else calls), "events"


def _time_sides(result: dict[str, Any], entry: Any, clock: Any, graph: bool) -> None:
    """Fill seconds, method, failed and missing of a result; ours comes last, since it may take the GPU down with it."""
    from bench.entries import Missing

    for part in ("seconds", "method", "failed", "missing"):
        result[part] = {}
    for name in sorted(entry.sides, key=lambda name: name == "ours"):
        if name == "ours" and not clock.gpu:
            result["missing"][name] = "no GPU"
            continue
        try:
            result["seconds"][name], result["method"][name] = _time_side(clock, name, entry.sides[name], graph)
        except Missing as missing:
            result["missing"][name] = str(missing)
        except Exception as error:  # whatever a kernel or a peer does, the others' figures are kept
            result["failed"][name] = one_line(error)


def _check(result: dict[str, Any], entry: Any) -> None:
    """Fill the errors; a wrong result has no speed."""
    try:
        result["error"], result["reference_error"] = entry.check()
        if not result["error"] <= 2 * result["reference_error"] + entry.slack:
            errors = f"error {result['error']:.2g}, the reference's {result['reference_error']:.2g}"
            result["failed"]["ours"] = f"wrong result: {errors}"
    except Exception as error:
        result["failed"].setdefault("ours", f"check: {one_line(error)}")
    if "ours" in result["failed"]:
        result["seconds"].pop("ours", None)


def measure(entry: Any, clock: Any) -> dict[str, Any]:
    """Return an entry's result; what fails is named in `failed`, what is not installed in `missing`."""
    result = {"kernel": entry.kernel, "title": entry.title, "shape": entry.shape, "bytes": entry.bytes,
              "flops": entry.flops, "bars": list(entry.bars)}  # fmt: skip
    _time_sides(result, entry, clock, graph=True)
    if result["failed"] and "graph" in result["method"].values():
        _time_sides(result, entry, clock, graph=False)  # what cannot be recorded is timed singly, and so are the others
    _check(result, entry)
    return result


def _child(options: argparse.Namespace) -> int:
    """Answer with one line of JSON before and after each entry; skip what stdin names as done."""
    import torch

    from bench.entries import Sizes
    from bench.timing import Clock, ceilings, device_facts

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]  # peers would find kernels/
    done, clock = set(json.loads(sys.stdin.readline())), Clock(repeats=5 if options.quick else 25)
    torch.manual_seed(0)

    def say(**values):
        print(json.dumps(values), file=answers)

    say(begin="ceilings")
    say(facts=device_facts(), ceilings=ceilings(clock))
    later = []
    for entry in entries(options.kernel, Sizes(clock.gpu, options.quick), clock.cache_bytes):
        if entry.compiled and clock.gpu and not options.quick:
            later.append(entry)
        if entry.key not in done:
            say(begin=entry.key, bars=entry.bars)
            say(entry=entry.key, result=measure(entry, clock))
            if clock.gpu:
                torch.cuda.synchronize()  # after an illegal address this raises, and so will all that follows
                torch.cuda.empty_cache()
    for entry in later:
        if f"compiled {entry.key}" not in done:
            say(begin=f"compiled {entry.key}")
            try:
                say(entry=entry.key, compiled=_time_side(clock, "compiled", entry.compiled, False)[0])
            except Exception as error:
                say(entry=entry.key, compiled_failed=one_line(error))
            torch.cuda.synchronize()
    return 0


class Run:
    """The results so far, and the process that goes on with them."""

    def __init__(self, options: argparse.Namespace):
        """Begin with nothing."""
        self.options, self.deadline = options, time.monotonic() + options.seconds
        self.command = [sys.executable, "-m", "bench.kernels", "--child", *options.passed]
        self.results = {"date": f"{datetime.date.today()}", "entries": {}, "unfinished": []}
        self.done: list[str] = []
        self.bars: list[str] = []  # of the entry in work

    def go(self) -> None:
        """Start processes until all is done or the time is up."""
        for _ in range(40):
            if self._process() or time.monotonic() > self.deadline - 5:
                return

    def _process(self) -> bool:
        """Read one process's answers; True when it came to its end."""
        log = self.options.output.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            )
        process.stdin.write(json.dumps(self.done) + "\n")
        process.stdin.flush()
        current, late = "the start", False
        while True:
            limit = min(ENTRY_SECONDS, self.deadline - time.monotonic())
            timer = threading.Timer(max(limit, 0.1), process.kill)
            timer.start()
            line = process.stdout.readline()
            late = not timer.is_alive()
            timer.cancel()
            if not line:
                break
            current = self._take(json.loads(line), current)
        process.wait()
        if process.returncode and current and time.monotonic() < self.deadline:
            lines = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()]
            why = f"no answer in {ENTRY_SECONDS} s" if late else lines[-1] if lines else "no message"
            self._crashed(current, f"exit status {process.returncode}: {why}"[:300])
            return current in ("the start", "ceilings")  # the next process would get no further
        elif process.returncode and current:
            self.results["unfinished"].append(f"{current} (time was up)")
        return process.returncode == 0

    def _take(self, line: dict[str, Any], current: str) -> str | None:
        """Keep an answer; returns what the process is working on."""
        if "begin" in line:
            self.bars = line.get("bars", [])
            return line["begin"]
        if "facts" in line:
            self.results.setdefault("device", line["facts"])
            self.results.setdefault("ceilings", line["ceilings"])
            return None
        if "result" in line:
            self.results["entries"][line["entry"]] = line["result"]
            self.done.append(line["entry"])
            self._show(line["entry"], line["result"])
            return None
        entry = self.results["entries"][line["entry"]]
        self.done.append(f"compiled {line['entry']}")
        if "compiled" in line:
            entry["seconds"]["compiled"] = line["compiled"]
        else:
            entry["failed"]["compiled"] = line["compiled_failed"]
        return None

    def _crashed(self, key: str, why: str) -> None:
        self.done.append(key)
        if key.startswith("compiled "):
            self.results["entries"][key.removeprefix("compiled ")]["failed"]["compiled"] = why
        else:
            failed = {"seconds": {}, "failed": {"ours": why}, "bars": self.bars, "missing": {}}
            self.results["entries"].setdefault(key, failed)
        print(f"{key}: {why}", file=sys.stderr, flush=True)

    def _show(self, key: str, result: dict[str, Any]) -> None:
        parts = [f"{name} {1e6 * seconds:.0f} us" for name, seconds in result["seconds"].items()]
        parts += [f"{name} failed: {why}" for name, why in result["failed"].items()]
        print(f"{key}: {', '.join(parts)}", file=sys.stderr, flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = sorted({*BENCHED, *(module for module, _ in BENCHED.values())})
    add("--kernel", choices=names, metavar="NAME", help=f"only this kernel or module: {', '.join(names)}")
    add("--quick", action="store_true", help="one shape of each, few repeats, nothing compiled: does it work?")
    add("--seconds", type=float, default=600, help="end after this long with what there is (default 600)")
    add(
        "--output", type=Path, default=ROOT / "runs" / "bench" / "kernels.json", help="JSON; the picture lies beside it"
    )
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.passed = ["--quick"] * options.quick + (["--kernel", options.kernel] if options.kernel else [])
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON and picture; 1 where a kernel of ours crashed or was wrong."""
    options = _arguments(argv)
    if options.child:
        return _child(options)
    run = Run(options)
    run.go()
    results = run.results | {"bars": {name: bar.text for name, bar in BARS.items()}}
    results["verdicts"] = {key: verdicts(entry, results.get("ceilings")) for key, entry in results["entries"].items()}
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    picture = options.output.with_suffix(".png")
    drawn = draw(results, picture)
    print(f"written: {options.output}" + (f", {picture}" if drawn else "; no picture: matplotlib is not installed"))
    return int(any("ours" in entry["failed"] for entry in results["entries"].values()))


if __name__ == "__main__":
    sys.exit(main())
