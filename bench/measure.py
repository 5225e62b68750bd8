"""Two processes take turns: ours, peer, ours, peer, ...; what slows the machine down slows both.

Single steps are compared, not whole runs one after the other: on a shared machine the minutes differ more than the
sides do. This process imports no torch, so that it takes nothing from them.
"""

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.cases import NEW, PROMPT, RANK, WIDTH, Case
from bench.floor import generation_seconds, matmul_rate
from minitune.planning.flops import step_flops

ROOT = Path(__file__).resolve().parent.parent
EXTRA_PEERS = ("litgpt", "torchtune")
EXTRA_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
LIMIT = 600  # seconds that a worker may take for one answer


class WorkerError(Exception):
    """A worker ended or was too slow."""


class Worker:
    """A process of `bench.worker`, with as many threads as there are cores; a context manager."""

    def __init__(self, side: str, fields: dict[str, Any], cache: Path, *, extra: bool = False, limit: float = LIMIT):
        """Start it; `ready` waits until it has loaded. It may take `limit` seconds for an answer."""
        self.limit = limit
        self.log = cache / "logs" / f"{fields.get('name', 'machine')}-{side}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        python = str(EXTRA_PYTHON) if extra else sys.executable
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        folder = _bench_alone(cache) if side == "peer" and fields["peer"] != "lora" else ROOT
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *_python_path()])
        if side == "prepare":
            del environment["HF_HUB_OFFLINE"]
        self.began = time.perf_counter()
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [python, "-m", "bench.worker", side, json.dumps(fields), str(cache.resolve())], cwd=folder,
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self) -> "Worker":
        """Return itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End the process."""
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ready(self) -> dict[str, Any]:
        """Wait for the first answer: threads, versions, peak memory, and the seconds since the start."""
        return {**self._answer(), "seconds": time.perf_counter() - self.began}

    def round(self) -> dict[str, Any]:
        """Have one round of work done."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        self.process.wait()
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8").splitlines() if line.strip()]
        raise WorkerError(f"exit status {self.process.returncode}: {lines[-1] if lines else 'no message'}")


def _python_path() -> list[str]:
    """Return the folders of PYTHONPATH but for the repository's root."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [folder for folder in folders if folder and Path(folder).resolve() != ROOT]


def _bench_alone(cache: Path) -> Path:
    """Return a folder that holds nothing but the package `bench`, for peers to start from.

    In the repository's root they would find `kernels/`, and transformers and bitsandbytes take any module of that name
    for Hugging Face's.
    """
    folder = cache.resolve() / "alone"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bench").exists():
        (folder / "bench").unlink(missing_ok=True)
        (folder / "bench").symlink_to(ROOT / "bench", target_is_directory=True)
    return folder


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(case: Case, cache: Path, probe: Worker, *, runs: int, warmups: int, seconds: float) -> dict[str, Any]:
    """Compare the two sides; returns what goes into the result file.

    Args:
        case: what to compare.
        cache: where `prepare` has written weights and token ids.
        probe: measures the machine before and after.
        runs: rounds of each side that count.
        warmups: rounds before them; the first one gives the losses that have to agree.
        seconds: after this long no further round is begun, once there are three of each.
    """
    if case.peer in EXTRA_PEERS and not EXTRA_PYTHON.exists():
        return {"not_measured": f"no {EXTRA_PYTHON.parent.parent.name}: run python -m bench --install-peers"}
    load = [os.getloadavg()]
    rates = [probe.round()["rates"]]
    try:
        sides = (_starts if case.kind == "start" else _rounds)(case, cache, runs, warmups, seconds)
    except WorkerError as error:
        return {"not_measured": str(error)[:300]}
    load.append(os.getloadavg())
    rates.append(probe.round()["rates"])
    best = {name: (min if name == "medium_error" else max)(rate[name] for rate in rates) for name in rates[0]}
    sides["disagreement"] = disagreement(case, sides)
    sides["floor_seconds"] = floor_seconds(case, cache, best)
    return {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", **sides, "rates": best, "load": load}


def _rounds(case: Case, cache: Path, runs: int, warmups: int, seconds: float) -> dict[str, Any]:
    """Keep both processes alive and ask them in turn."""
    fields = dataclasses.asdict(case)
    answers: dict[str, list] = {"ours": [], "peer": []}
    with (
        Worker("ours", fields, cache) as ours,
        Worker("peer", fields, cache, extra=case.peer in EXTRA_PEERS) as peer,
    ):
        workers = {"ours": ours, "peer": peer}
        ready = {side: worker.ready() for side, worker in workers.items()}
        began = time.perf_counter()
        for number in range(warmups + runs):
            if number >= warmups + 3 and time.perf_counter() - began > seconds:
                break
            for side, worker in workers.items():
                answers[side].append(worker.round())
    return {side: _side(ready[side], rounds, warmups) for side, rounds in answers.items()}


def _starts(case: Case, cache: Path, runs: int, warmups: int, seconds: float) -> dict[str, Any]:
    """Start fresh processes in turn; a round is the time until the model is loaded."""
    answers: dict[str, list] = {"ours": [], "peer": []}
    for _ in range(warmups + runs):
        for side in answers:
            with Worker(side, dataclasses.asdict(case), cache) as worker:
                answers[side].append(worker.ready())
    return {side: _side(rounds[0], rounds, warmups) for side, rounds in answers.items()}


def _side(ready: dict[str, Any], rounds: list[dict[str, Any]], warmups: int) -> dict[str, Any]:
    """Condense one side's answers."""
    first, counted = rounds[0], rounds[warmups:]
    return {
        "seconds": [round(answer["seconds"], 4) for answer in counted],
        "tokens": first.get("tokens"),
        "losses": [round(answer["loss"], 6) for answer in rounds if "loss" in answer],
        "ids": first.get("ids"),
        "peak_mb": round(max(answer["peak_mb"] for answer in rounds), 1),
        "threads": ready["threads"],
        "versions": ready["versions"],
    }


def disagreement(case: Case, sides: dict[str, Any]) -> str | None:
    """Return why the comparison does not count, or None: unequal threads, losses of step 1, tokens, or answers."""
    ours, peer = sides["ours"], sides["peer"]
    if ours["threads"] != peer["threads"]:
        return f"{ours['threads']} threads against {peer['threads']}"
    if ours["tokens"] != peer["tokens"]:
        return f"{ours['tokens']} tokens a round against {peer['tokens']}"
    if ours["losses"] and not abs(ours["losses"][0] - peer["losses"][0]) <= case.tolerance:
        return f"loss of step 1 is {ours['losses'][0]:.5f} against {peer['losses'][0]:.5f}"
    if case.kind == "classify":
        alike = sum(a == b for a, b in zip(ours["ids"], peer["ids"], strict=True)) / len(ours["ids"])
        if alike < (0.97 if case.dtype == "float32" else 0.6):  # batches round otherwise than single rows
            return f"{alike:.0%} of the answers are alike"
        return None
    if ours["ids"]:
        equal = next((i for i, (a, b) in enumerate(zip(ours["ids"], peer["ids"], strict=True)) if a != b), NEW)
        if equal < (NEW if case.dtype == "float32" else 4):  # in bf16 two tokens are often equally likely
            return f"the answers part at token {equal + 1}"
    return None


def floor_seconds(case: Case, cache: Path, rates: dict[str, float]) -> float | None:
    """Return the least seconds that a round of ours could take on this machine; None for a start and for answers."""
    from minitune.model.config import ModelConfig

    config = ModelConfig.from_hf(json.loads((cache / case.dtype / "config.json").read_text(encoding="utf-8")))
    rate = matmul_rate(rates, case.dtype, case.medium)
    if case.kind in ("start", "classify"):
        return None
    if case.kind == "generate":
        return generation_seconds(config, PROMPT, NEW, 4 if case.dtype == "float32" else 2, rate, rates["read"])
    if case.layer:
        passes = 1 if case.kind == "forward" else 2
        weight = passes * WIDTH * WIDTH * 4.127 / 8  # bytes of the packed weight, read in each pass
        return case.calls * max(passes * 2 * case.batch * WIDTH**2 / rate, weight / rates["read"])
    lengths, targets = [case.length] * case.batch, case.batch * (case.length - 1)
    if case.kind == "rows":
        rows = json.loads((cache / "data.json").read_text(encoding="utf-8"))["rows"]
        lengths, targets = [len(row["ids"]) for row in rows], sum(sum(row["targets"]) for row in rows)
    if case.kind == "dpo":
        lengths = [case.length] * 2 * case.batch
        targets = len(lengths) * (case.length - case.prompt)
    flops = step_flops(config, lengths, targets, method="full" if case.kind == "full" else "lora", rank=RANK,
                       checkpointing=case.checkpointing, reference=case.kind == "dpo")  # fmt: skip
    return flops / rate


def summary(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Return the table's numbers: median and best times in the case's unit, ratios, verdicts, floor share."""
    ours, peer = result["ours"], result["peer"]
    medians = [statistics.median(side["seconds"]) for side in (ours, peer)]
    time_ratio, memory_ratio = medians[0] / medians[1], ours["peak_mb"] / peer["peak_mb"]
    floor = result["floor_seconds"]
    return {
        "ours": [in_unit(case, ours, value) for value in (medians[0], min(ours["seconds"]))],
        "peer": [in_unit(case, peer, value) for value in (medians[1], min(peer["seconds"]))],
        "time_ratio": time_ratio,
        "memory_ratio": memory_ratio,
        "time": judge(time_ratio, case.time_least, case.time_aim),
        "memory": judge(memory_ratio, case.memory_least, case.memory_aim),
        "floor_share": floor / medians[0] if floor else None,
    }


def in_unit(case: Case, side: dict[str, Any], seconds: float) -> float:
    """Turn the seconds of a round into the case's unit."""
    if case.layer:
        return 1000 * seconds / side["tokens"]
    per_second = (side["tokens"] or 0) / seconds
    units = {"rows": 1000 * seconds / (side["tokens"] or 1), "generate": per_second, "classify": per_second}
    return units.get(case.kind, seconds)


def judge(ratio: float, least: float | None, aim: float | None) -> str:
    """Return "aim met", "met", "missed", or "-" where no bar was set."""
    if least is None:
        return "-"
    if aim is not None and ratio <= aim:
        return "aim met"
    return "met" if ratio <= least else "missed"
