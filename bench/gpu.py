"""`make gpu`: all that needs a GPU, on a bare machine, within 8 minutes; one JSON for each device.

The machine needs a Python with torch, triton, numpy, safetensors, tokenizers, pytest, transformers and peft, and no
network: nothing is fetched, and no environment is made. `minitune` is installed in place without its dependencies;
where that fails (an old setuptools, a Python that allows no installs), a folder on PYTHONPATH makes `minitune.kernels`
known. Then come

    tests     tests/kernels and tests/ops, in bf16, fp16 and fp32; files that need a package that is missing are named
    kernels   `python -m bench.kernels`
    step      `python -m bench.step`

Each part gets a share of the time that is left and is cut where it ends; what was found until then is kept, and what
was not measured stands in the result by name. Without a GPU the tests run under Triton's interpreter and the benches on
references and a small model: that shows that the parts start and end, and measures no kernel and no bar.
bitsandbytes and Liger-Kernel are compared with where they are installed or lie on PYTHONPATH; tqdm, which our loop
needs, comes with transformers.

No part of this measures several GPUs, NVLink, or cards older than the A100.
"""

import argparse
import ast
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.kernels import BENCHED
from bench.measure import ROOT, cores

SECONDS = 460  # for everything; the last of eight minutes are for ending it
SHARES = {"tests": 0.45, "kernels": 0.65, "step": 1.0}  # of what is left when a part begins
WORK = ROOT / "runs" / "gpu"
FINDER = """try:
    import minitune
    minitune.__path__.append({root!r})  # `minitune.kernels` lies in kernels/, beside minitune/
except ImportError:  # a process that is not to see this repository
    pass
"""


def _python(*arguments: str, seconds: float, **options: Any) -> subprocess.CompletedProcess:
    """Run this Python in the repository's root; a run that is cut has returncode None."""
    try:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=seconds, text=True, **options)
    except subprocess.TimeoutExpired as late:
        return subprocess.CompletedProcess(late.cmd, None, late.stdout, late.stderr)


def install(folder: Path) -> str:
    """Make `minitune.kernels` importable for all processes to come; returns how."""
    probe = ("-c", "import minitune.kernels")
    if _python(*probe, seconds=60, capture_output=True).returncode == 0:
        return "installed before"
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")
    _python(*pip, seconds=60, capture_output=True)
    if _python(*probe, seconds=60, capture_output=True).returncode == 0:
        return "installed in place"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(FINDER.format(root=str(ROOT)), encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = _python(*probe, seconds=60, capture_output=True)
    return "by PYTHONPATH" if found.returncode == 0 else f"failed: {(found.stderr or '').strip()[-200:]}"


def missing_imports(path: Path) -> list[str]:
    """Return the packages that a test file imports at its top and that are not installed."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def test_files(kernel: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the test files to run, and why others are left out; `kernel` is a kernel's name or a module's."""
    files = sorted([*(ROOT / "tests/kernels").glob("test_*.py"), *(ROOT / "tests/ops").glob("test_*.py")])
    if kernel:
        module = BENCHED[kernel][0] if kernel in BENCHED else kernel
        files = [ROOT / "tests/kernels" / f"test_{module}.py"]
    chosen, left = [], {}
    for path in files:
        name, missing = str(path.relative_to(ROOT)), missing_imports(path)
        if missing:
            left[name] = f"{', '.join(missing)} is not installed"
        else:
            chosen.append(name)
    return chosen, left


def run_tests(kernel: str | None, gpu: bool, seconds: float) -> dict[str, Any]:
    """Run the tests, interrupt them when their time is up, and return what came out."""
    files, left = test_files(kernel)
    lines = WORK / "tests.jsonl"
    lines.unlink(missing_ok=True)
    parallel = ["-n", str(min(8, cores())), "--dist", "loadfile"] if gpu and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-p", "bench.pytest_lines", "-p", "no:cacheprovider", *parallel, *files]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "BENCH_TEST_LINES": str(lines)})
    cut = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        cut = True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {**read_tests(lines), "left_out": left, "cut": cut, "status": process.returncode}


def read_tests(lines: Path) -> dict[str, Any]:
    """Return counts of outcomes, failures with their last line, and tests that began and did not end."""
    outcomes: dict[str, tuple[str, str]] = {}
    begun: list[str] = []
    for text in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
        line = json.loads(text)
        if "begin" in line:
            begun.append(line["begin"])
        elif outcomes.get(line["test"], ("",))[0] != "failed":
            outcomes[line["test"]] = (line["outcome"], line["why"])
    words = [outcome for outcome, _ in outcomes.values()]
    return {
        "passed": words.count("passed"),
        "skipped": words.count("skipped"),
        "failed": {name: why for name, (outcome, why) in outcomes.items() if outcome == "failed"},
        "unfinished": sorted(set(begun) - set(outcomes)),
    }


def run_bench(name: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run `bench.<name>`, which ends by itself in time, and return its JSON."""
    output = WORK / f"{name}.json"
    output.unlink(missing_ok=True)
    done = _python("-m", f"bench.{name}", "--seconds", f"{seconds - 12:.0f}", "--output", str(output), *arguments,
                   seconds=seconds)  # fmt: skip
    if not output.exists():
        return {"status": done.returncode, "failed": "it wrote no result"}
    return {**json.loads(output.read_text(encoding="utf-8")), "status": done.returncode}


def not_measured(result: dict[str, Any]) -> list[str]:
    """Return by name all that the result has no figure for."""
    parts, found = result["parts"], []
    tests, kernels, step = (parts.get(name, {}) for name in ("tests", "kernels", "step"))
    found += [f"{name}: {why}" for name, why in tests.get("left_out", {}).items()]
    found += [f"{name}: not finished" for name in tests.get("unfinished", ())]
    found += ["further tests: time was up"] * bool(tests.get("cut"))
    for key, entry in kernels.get("entries", {}).items():
        found += [f"{key}, {side}: {why}" for side, why in {**entry["missing"], **entry["failed"]}.items()]
    found += [f"kernels: {name}" for name in kernels.get("unfinished", ())]
    found += [
        f"step, {side}: {step[side]['not_measured']}"
        for side in ("ours", "peer")
        if "not_measured" in step.get(side, {})
    ]
    found += [f"{name}: {part['failed']}" for name, part in parts.items() if isinstance(part.get("failed"), str)]
    return found + [f"{name}: left out" for name in SHARES if name not in parts]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    names = sorted({*BENCHED, *(module for module, _ in BENCHED.values())})
    add = parser.add_argument
    add("--kernel", choices=names, metavar="NAME", help=f"its tests and figures only: {', '.join(names)}")
    add("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    add("--output", type=Path, help="default: bench/results/gpu-<device>.json; runs/gpu/ for one kernel or no GPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, writing the result after each; 1 where a test or a kernel failed."""
    options, began = _arguments(argv), time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    how = install(WORK / "path")
    facts = _python("-c", "import json; from bench.timing import device_facts; print(json.dumps(device_facts()))",
                    seconds=120, stdout=subprocess.PIPE)  # fmt: skip
    device = json.loads(facts.stdout) if facts.returncode == 0 else {"device": "unknown"}
    gpu = device["device"] not in ("cpu", "unknown")
    slug = re.sub(r"[^a-z0-9]+", "-", device["device"].lower()).strip("-")
    whole = gpu and not options.kernel
    name = f"gpu-{slug}" + (f"-{options.kernel}" if options.kernel else "")
    output = options.output or (ROOT / "bench" / "results" if whole else WORK) / f"{name}.json"
    print(f"device: {device['device']}; minitune {how}" + ("" if gpu else "; no kernel is measured without a GPU"))
    result: dict[str, Any] = {"date": f"{datetime.date.today()}", "device": device, "minitune": how, "parts": {}}
    kernel = ["--kernel", options.kernel] if options.kernel else []
    work = {
        "tests": lambda seconds: run_tests(options.kernel, gpu, seconds),
        "kernels": lambda seconds: run_bench("kernels", kernel, seconds),
        "step": lambda seconds: run_bench("step", [], seconds),
    }
    for part, run in work.items():
        if options.kernel and part == "step":
            continue
        started = time.monotonic()
        share = SHARES[part] * (options.seconds - (started - began))
        print(f"--- {part}: at most {share:.0f} s", flush=True)
        result["parts"][part] = {**run(share), "wall_seconds": round(time.monotonic() - started, 1)}
        result["not_measured"] = not_measured(result)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture = WORK / "kernels.png"
    if picture.exists():
        picture.replace(output.with_suffix(".png"))
    tests = result["parts"]["tests"]
    print(f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
          + (", cut" if tests["cut"] else ""))  # fmt: skip
    for line in result["not_measured"]:
        print(f"not measured: {line}")
    print(f"written: {output} after {time.monotonic() - began:.0f} s")
    bad = tests["failed"] or tests["passed"] == 0
    return int(bool(bad) or any(part.get("status") for name, part in result["parts"].items() if name != "tests"))


if __name__ == "__main__":
    sys.exit(main())
