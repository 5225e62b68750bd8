"""The kernels' bench: nothing is left out, a crash costs one entry, and verdicts follow from hand-written results."""

import json
import sys

import pytest

from bench import kernels, roofline, verdicts
from bench.entries import Entry, Missing, Sizes
from bench.timing import Clock
from tests.kernels.test_harness import kernels as launched


def entry(**changes):
    """Return an entry whose sides take no time, and whose result is right."""
    sides = {"ours": lambda: lambda: None, "eager": lambda: lambda: None}
    values = {"kernel": "k", "title": "t", "shape": "1", "bytes": 8, "flops": 4, "sides": sides,
              "check": lambda: (1e-3, 1e-3), "bars": ("bandwidth",)}  # fmt: skip
    return Entry(**{**values, **changes})


def test_every_kernel_is_benched():
    assert set(kernels.BENCHED) == {name for _, name in launched()}
    assert {module for module, _ in kernels.BENCHED.values()} == {module for module, _ in launched()}


@pytest.mark.parametrize("sizes", [Sizes(True), Sizes(True, quick=True), Sizes(False)])
def test_every_kernel_has_entries_of_its_own(sizes):
    made = list(kernels.entries(None, sizes, 1 << 25))
    assert {one.kernel for one in made} == set(kernels.BENCHED)
    assert len({one.key for one in made}) == len(made)
    for name, (module, _) in kernels.BENCHED.items():
        own = {one.key for one in made if one.kernel == name}
        all_of_it = {one.key for one in kernels.entries(module, sizes, 1 << 25)}
        chosen = {one.key for one in kernels.entries(name, sizes, 1 << 25)}
        assert own and own <= all_of_it and chosen == (all_of_it if name == module else own)


def test_the_shapes_and_bars_are_those_that_were_asked_for():
    made = list(kernels.entries(None, Sizes(True), 1 << 25))
    keys = {one.key: one for one in made}
    for shape in ("4096x4096", "14336x4096", "4096x14336", "28672x8192"):
        assert "matvec" in keys[f"NF4 linear M=1 {shape}"].bars
    for rows in (8, 64, 512, 2048, 8192):
        for shape in ("4096x4096", "1024x4096", "14336x4096", "4096x14336"):
            bars = keys[f"NF4 linear M={rows} {shape}"].bars
            assert ("cublas" in bars) == (rows >= 2048) and "bitsandbytes" in bars
    for name in ("RMSNorm forward", "RMSNorm backward", "SwiGLU forward", "SwiGLU backward"):
        assert set(keys[f"{name} 8192x4096"].bars) == {"bandwidth", "liger"}
    assert keys["rope forward 8192x4096"].bars == ("bandwidth",)
    assert keys["cross-entropy, frozen head 4096x128256x4096"].bars == ("liger",)
    assert {"8-bit AdamW 2^24", "8-bit AdamW 2^27", "NF4 linear + LoRA M=1 4096x4096"} <= set(keys)
    assert all(name in verdicts.BARS for one in made for name in one.bars)


def test_least_traffic_by_hand():
    keys = {one.key: one for one in kernels.entries(None, Sizes(True), 1 << 25)}
    n = 8192 * 4096  # bf16: two bytes an element, each operand once
    assert keys["RMSNorm forward 8192x4096"].bytes == 2 * n + 2 * n
    assert keys["RMSNorm backward 8192x4096"].bytes == 3 * 2 * n
    assert keys["SwiGLU backward 8192x4096"].bytes == 5 * 2 * n
    assert keys["rope forward 8192x4096"].bytes == 2 * 2 * n + 8192 * 2 * 64 * 4
    assert keys["NF4 linear M=1 4096x4096"].bytes == 4096 * 4096 / 2
    assert keys["NF4 linear M=2048 4096x4096"].flops == 2 * 2048 * 4096 * 4096
    w, h = 2 * 128256 * 4096, 2 * 4096 * 4096  # the head and hidden, in bytes; dh and dW are of their sizes
    assert keys["cross-entropy, frozen head 4096x128256x4096"].bytes == 2 * w + 2 * h
    assert keys["cross-entropy, trained head 4096x128256x4096"].flops == 3 * 2 * 4096 * 128256 * 4096


@pytest.fixture
def clock(monkeypatch):
    """A clock that thinks it has a GPU and says that everything takes a microsecond."""
    clock = Clock()
    clock.gpu = True
    monkeypatch.setattr(clock, "seconds", lambda call: call() or 1e-6)
    monkeypatch.setattr(clock, "graph_seconds", lambda calls: [call() for call in calls] and 2e-6)
    return clock


def fails(*_):
    raise RuntimeError("boom\nand a trace")


def missing():
    raise Missing("liger_kernel is not installed")


def test_what_fails_is_named_and_the_rest_is_kept(clock):
    sides = {"ours": lambda: fails, "eager": lambda: lambda: None, "liger": missing, "bitsandbytes": fails}
    result = kernels.measure(entry(sides=sides, bars=("bandwidth", "liger")), clock)
    assert result["seconds"] == {"eager": 1e-6}
    assert result["failed"] == {"ours": "RuntimeError: boom", "bitsandbytes": "RuntimeError: boom"}
    assert result["missing"] == {"liger": "liger_kernel is not installed"}
    assert verdicts.verdicts(result, {"copy": 1.0}) == {"bandwidth": (None, "failed"), "liger": (None, "failed")}


@pytest.mark.parametrize("check", [lambda: (3e-3, 1e-3), lambda: (float("nan"), 1e-3), fails])
def test_a_wrong_result_has_no_speed(clock, check):
    result = kernels.measure(entry(check=check), clock)
    assert "ours" in result["failed"] and "ours" not in result["seconds"] and result["seconds"]["eager"] == 1e-6
    assert kernels.measure(entry(check=lambda: (2e-3, 1e-3)), clock)["failed"] == {}


def test_what_cannot_be_recorded_is_timed_singly_and_so_are_the_others(clock, monkeypatch):
    calls = [lambda: None, lambda: None]
    sides = {"ours": lambda: calls, "bitsandbytes": lambda: calls, "eager": lambda: calls[0]}
    assert kernels.measure(entry(sides=sides), clock)["method"] == {
        "bitsandbytes": "graph", "eager": "events", "ours": "graph",
    }  # fmt: skip
    spread = [lambda: None] * 3

    def capture(calls):
        return fails() if len(calls) == 3 else 2e-6

    monkeypatch.setattr(clock, "graph_seconds", capture)
    result = kernels.measure(entry(sides={**sides, "bitsandbytes": lambda: spread}), clock)
    assert set(result["method"].values()) == {"events"} and len(result["seconds"]) == 3


CHILD = """
import json, os, sys
done = set(json.loads(sys.stdin.readline()))
def say(**values): print(json.dumps(values), flush=True)
say(facts={"device": "x", "driver": "y"}, ceilings={"copy": 10.0, "matmul": 100.0})
for key in ("a", "b", "c"):
    if key in done: continue
    say(begin=key, bars=["bandwidth"])
    if key == "b":
        print("CUDA error: an illegal memory access", file=sys.stderr)
        os._exit(7)
    say(entry=key, result={"kernel": key, "bytes": 8.0, "flops": 1.0, "seconds": {"ours": 1.0}, "failed": {},
        "missing": {}, "bars": ["bandwidth"]})
"""


def run(tmp_path, child, seconds=60.0):
    """Run the driver on a child of our own."""
    options = kernels._arguments(["--output", str(tmp_path / "k.json"), "--seconds", str(seconds)])
    driver = kernels.Run(options)
    driver.command = [sys.executable, "-c", child]
    driver.go()
    return driver.results


def test_a_crash_costs_one_entry(tmp_path):
    results = run(tmp_path, CHILD)
    assert list(results["entries"]) == ["a", "b", "c"] and results["unfinished"] == []
    assert results["entries"]["b"]["failed"] == {"ours": "exit status 7: CUDA error: an illegal memory access"}
    assert results["entries"]["c"]["seconds"] == {"ours": 1.0}
    text = verdicts.table(results)
    assert "at least 85% of copy bandwidth: 2 not met, 1 failed" in text and "b: ours failed" in text


def test_a_hanging_entry_ends_with_the_time(tmp_path):
    results = run(tmp_path, CHILD.replace("os._exit(7)", "import time; time.sleep(60)"), seconds=6)
    assert list(results["entries"]) == ["a"] and results["unfinished"] == ["b (time was up)"]


def test_a_bench_that_cannot_start_ends(tmp_path):
    results = run(tmp_path, "raise SystemExit('no torch')")
    assert results["entries"]["the start"]["failed"] == {"ours": "exit status 1: no torch"}


def test_verdicts_by_hand():
    """8 GB in 2 s are 4 GB/s: 80% of a copy's 5; 0.9 of cuBLAS's speed, twice Liger's, level with bitsandbytes."""
    result = {"bytes": 8e9, "failed": {}, "bars": list(verdicts.BARS),
              "seconds": {"ours": 2.0, "cublas": 1.8, "bitsandbytes": 2.0, "liger": 4.0}}  # fmt: skip
    found = verdicts.verdicts(result, {"copy": 5e9, "matmul": 1.0})
    assert found["bandwidth"] == (pytest.approx(0.8), "not met") and found["matvec"][1] == "met"
    assert found["cublas"] == (pytest.approx(0.9), "met") and found["liger"] == (2.0, "met")
    assert found["bitsandbytes"] == (1.0, "met") and found["unfused"] == (None, "not measured")
    slower = {**result, "seconds": {**result["seconds"], "bitsandbytes": 1.99, "cublas": 1.69}}
    found = verdicts.verdicts(slower, {"copy": 5e9, "matmul": 1.0})
    assert found["bitsandbytes"][1] == found["cublas"][1] == "not met"
    assert verdicts.verdicts(result, None)["bandwidth"] == (None, "not measured")


def test_on_a_cpu_nothing_of_a_kernel_is_claimed(tmp_path, capsys):
    output = tmp_path / "k.json"
    assert kernels.main(["--quick", "--kernel", "glu_forward", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    found = results["entries"]["SwiGLU forward 256x512"]
    if results["device"]["device"] == "cpu":
        assert "ours" not in found["seconds"] and found["missing"]["ours"] == "no GPU"
        assert "no kernel was timed" in capsys.readouterr().out
        assert {verdict for _, verdict in results["verdicts"]["SwiGLU forward 256x512"].values()} == {"not measured"}
    assert found["seconds"]["eager"] > 0 and found["error"] < 1e-2 and output.with_suffix(".png").is_file()


def test_no_picture_without_a_figure(tmp_path):
    assert not roofline.draw({"entries": {}, "ceilings": {"copy": 1.0, "matmul": 1.0}}, tmp_path / "x.png")
