"""How long a call takes on the device, and how fast the device could be.

On a GPU a call is timed by two events around it, after the L2 cache was overwritten with a buffer of 1 GiB; that also
keeps the device busy while the processor launches the call, so that launching is not what is measured. A call of a few
microseconds, as in decoding, is shorter than the events' own resolution: many of them, each on a copy of its own, so
that no copy is still in the cache, are recorded as one CUDA graph and replayed. The median of several runs counts; the
minimum was rejected, since clocks rise for a moment after a pause.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

FLUSH_BYTES = 1 << 30
GRAPH_CALLS = 24  # recorded in one graph, at least


def on_gpu() -> bool:
    """Tell whether kernels are timed on a GPU; else references on the CPU."""
    return torch.cuda.is_available()


class Clock:
    """Times calls on the one device there is; keeps the buffer that empties the cache."""

    def __init__(self, *, repeats: int = 25):
        """`repeats`: timed runs of each call at most."""
        self.gpu, self.repeats = on_gpu(), repeats
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if self.gpu else None
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.gpu else 1 << 25

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the median time of one call on a cold cache."""
        for _ in range(2):  # compiles, allocates
            call()
        return self._events(call) if self.gpu else self._wall(call)

    def _wall(self, call) -> float:
        times, end = [], time.perf_counter() + 0.15
        while len(times) < 3 or (len(times) < self.repeats and time.perf_counter() < end):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _events(self, call) -> float:
        pairs, end = [], time.perf_counter() + 0.3
        while len(pairs) < 5 or (len(pairs) < self.repeats and time.perf_counter() < end):
            self.buffer.zero_()
            pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
            if len(pairs) % 5 == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in pairs) / 1000

    def graph_seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Return the mean time of the calls, each on its own copy, in one CUDA graph: the median of several replays."""
        rounds = -(-GRAPH_CALLS // len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return self.seconds(graph.replay) / (rounds * len(calls))


def ceilings(clock: Clock) -> dict[str, float]:
    """Measure what the device reaches: bytes/s of a copy, read and written, and flop/s of a bf16 matmul."""
    device = "cuda" if clock.gpu else "cpu"
    size = (1 << 28) if clock.gpu else (1 << 24)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))
    width = 8192 if clock.gpu else 512
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return {"copy": copy, "matmul": 2 * width**3 / clock.seconds(lambda: a @ b)}


def device_facts() -> dict[str, str]:
    """Return the device's name, its driver, and the versions in use."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "driver": "none"}
    if on_gpu():
        facts |= {"device": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda), "driver": _driver()}
    for name in ("triton", "bitsandbytes", "liger_kernel", "transformers", "peft"):
        facts[name] = _version(name)
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
