"""`python -m bench`: compare every case with its peer, one after the other; what is done today is not done again."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from bench import report
from bench.cases import CASES
from bench.measure import EXTRA_PYTHON, ROOT, Worker, WorkerError, cores, measure

EXTRA_PACKAGES = ("torch==2.13.0", "litgpt==0.5.13", "torchtune==0.6.1", "torchao==0.13.0")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--case", action="append", metavar="NAME", help="only this case; may be given several times")
    add("--list", action="store_true", help="list the cases and end")
    add("--runs", type=int, default=7, help="rounds of each side that count (default 7)")
    add("--warmups", type=int, default=2, help="rounds before them (default 2)")
    add("--seconds", type=float, default=40, help="a case begins no further round after this long, from three on")
    add("--quick", action="store_true", help="one round after one warm-up, kept apart in runs/bench: does it work?")
    add("--again", action="store_true", help="measure also what the result file holds already")
    add("--name", help="of the result file (default: today)")
    add("--model", default="smollm2-135m-instruct", help="model to train")
    add("--cache", type=Path, default=ROOT / "runs" / "bench", help="where weights and token ids are put")
    add("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    add("--install-peers", action="store_true", help=f"install {', '.join(EXTRA_PACKAGES)} in .venv-peers and end")
    options = parser.parse_args(argv)
    names = [case.name for case in CASES]
    for name in options.case or ():
        if name not in names:
            parser.error(f"no case is called {name!r}; there are {', '.join(names)}")
    if min(options.runs, options.warmups) < 1:
        parser.error("--runs and --warmups must be at least 1")
    if options.quick:
        options.runs, options.warmups, options.name, options.output = 1, 1, "quick", options.cache
    return options


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _install_peers() -> None:
    """Make the environment of the peers that must not meddle with ours."""
    venv.create(EXTRA_PYTHON.parent.parent, with_pip=True)
    for packages in (EXTRA_PACKAGES[:1], EXTRA_PACKAGES[1:]):  # torch first, so that nothing brings another one
        subprocess.run([EXTRA_PYTHON, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=600)


def _read(path: Path, today: str) -> dict[str, Any]:
    """Return the results that are there already, or empty ones."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    machine = {"processor": _processor(), "cores": cores(), "threads": cores(), "python": platform.python_version()}
    return {"date": today, "machine": machine, "versions": {}, "cases": {}}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Measure, save after each case, print the table; returns the exit status."""
    options = _arguments(argv)
    if options.list:
        print("\n".join(f"{case.name:20} {case.title}, {case.dtype}" for case in CASES))
        return 0
    if options.install_peers:
        _install_peers()
        return 0
    today = f"{datetime.date.today()}"
    path = options.output / f"{options.name or today}.json"
    results = _read(path, today)
    again = options.again or options.quick
    chosen = [case for case in CASES if not options.case or case.name in options.case]
    left = [case for case in chosen if again or "ours" not in results["cases"].get(case.name, {})]
    try:
        if left:
            reviews = any(case.kind == "classify" for case in left)
            with Worker("prepare", {"model": options.model, "reviews": reviews}, options.cache) as worker:
                worker.ready()
            _measure_all(left, options, results, path)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.table(results))
    report.draw(results, path.with_suffix(".png"))
    print(f"written: {path}")
    return 0


def _measure_all(cases: list[Any], options: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    limits = {"runs": options.runs, "warmups": options.warmups, "seconds": options.seconds}
    with Worker("probe", {}, options.cache) as probe:
        probe.ready()
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.name}: {case.title}, {case.dtype}", file=sys.stderr, flush=True)
            result = measure(case, options.cache, probe, **limits)
            for side in ("ours", "peer"):
                results["versions"] |= result.get(side, {}).pop("versions", {})
                result.get(side, {}).pop("ids", None)
            results["cases"][case.name] = result
            _write(path, results)


if __name__ == "__main__":
    sys.exit(main())
