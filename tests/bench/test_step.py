"""The step's ratios from hand-written answers, the random models of both sides, and `make gpu`'s bookkeeping."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import datatypes, gpu, models, step
from bench.cases import CASES, SHAPES
from bench.measure import ROOT, _bench_alone, disagreement, in_unit


def rounds(*seconds, loss=9.0, device_mb=100.0):
    return [{"seconds": s, "loss": loss, "tokens": 4094, "device_mb": device_mb, "peak_mb": 1.0} for s in seconds]


def test_ratios_by_hand():
    """Medians after two warm-ups: 2 s against 4 s, half the time; 60 MB against 80, three quarters of the memory."""
    ours = step.side_result(rounds(9, 9, 2, 1, 3, device_mb=60.0), 2, None)
    peer = step.side_result(rounds(50, 50, 4, 5, 4, device_mb=80.0), 2, None)
    assert step.ratios(step.GPU, {"ours": ours, "peer": peer}) == {
        "time": {"ratio": 0.5, "bar": 0.6, "verdict": "met"},
        "memory": {"ratio": 0.75, "bar": 0.7, "verdict": "missed"},
    }
    assert ours["memory"] == "device_mb" and ours["seconds"] == [2, 1, 3]
    cut = step.side_result(rounds(9, 8), 2, "time was up")
    assert cut["seconds"] == [8] and cut["warmups"] == 1 and cut["ended_early"] == "time was up"


@pytest.mark.parametrize(
    "peer,reason",
    [
        (step.side_result([], 2, "exit status 1: no bitsandbytes"), "no bitsandbytes"),
        (step.side_result(rounds(1), 2, "time was up"), "time was up"),
        (step.side_result(rounds(9, 9, 4, loss=9.1), 2, None), "loss of step 1 is 9.00000 against 9.10000"),
        (step.side_result(rounds(9, 9, 4, loss=float("nan")), 2, None), "loss of step 1"),
    ],
)
def test_a_ratio_that_was_not_measured_is_not_shown(peer, reason):
    result = {"ours": step.side_result(rounds(9, 9, 2), 2, None), "peer": peer, "flops": 1.0}
    result["ratios"] = step.ratios(step.GPU, result)
    assert set(result["ratios"]) == {"not_measured"} and reason in result["ratios"]["not_measured"]
    assert f"time, ours / peer: not measured ({result['ratios']['not_measured']})" in step.table(step.GPU, result)


def test_flops_of_a_step_of_8_billion():
    """6.98e9 weights in linear layers, forward twice and backward once; the rest is within a tenth of that."""
    tokens, weights = 4096, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert step.flops(step.GPU) == pytest.approx(3 * 2 * tokens * weights, rel=0.1)


def test_both_sides_draw_the_same_random_model():
    """fp32 arithmetic over the same 4-bit weights, by two implementations.

    bitsandbytes' CPU library picks the 8-bit codes of the scales on a grid of 65,536 steps, so a few differ by one.
    """
    ours = models.ours("tiny", torch.float32, "cpu")
    peer = models.transformers_4bit("tiny", torch.float32, "cpu")
    ids = torch.arange(40).view(2, 20) * 11 % SHAPES["tiny"]["vocab_size"]
    with torch.no_grad():
        expected = peer(input_ids=ids).logits
        found = ours(ids)
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert sum("Linear4bit" in type(module).__name__ for module in peer.modules()) == 2 * 7


def test_a_peer_does_not_see_our_folder_kernels(tmp_path, monkeypatch):
    """transformers and bitsandbytes take any top-level module `kernels` for Hugging Face's package of that name."""
    code = "import importlib.util as u, bench.cases; print(u.find_spec('kernels'), u.find_spec('minitune.kernels'))"
    monkeypatch.setenv("PYTHONPATH", str(_bench_alone(tmp_path)))
    seen = {}
    for folder in (_bench_alone(tmp_path), ROOT):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        seen[folder] = done.stdout
    assert str(ROOT) not in seen[_bench_alone(tmp_path)].split("ModuleSpec(name='minitune")[0]
    assert str(ROOT / "kernels") in seen[ROOT].split("ModuleSpec(name='minitune")[0]  # the proof could fail


def test_a_quantised_step_is_compared_with_ours_without_its_loss():
    case = next(case for case in CASES if case.name == "qlora-over-lora")
    assert (case.time_least, case.memory_least, case.peer) == (1.2, 1.0, "lora")
    side = {"threads": 2, "tokens": 9, "losses": [3.1], "ids": None}
    assert disagreement(case, {"ours": side, "peer": {**side, "losses": [3.4]}}) is None
    other = next(case for case in CASES if case.name == "qlora-bf16")
    assert (other.time_least, other.memory_least) == (0.75, 0.5)
    assert "loss" in disagreement(other, {"ours": side, "peer": {**side, "losses": [3.4]}})


def test_a_layer_is_measured_in_milliseconds_a_call():
    layers = [case for case in CASES if case.layer]
    assert {(case.batch, case.kind, case.peer) for case in layers} == {
        (rows, kind, f"linear4bit-{mode}")
        for rows in (1, 64, 512) for kind in ("forward", "gradient") for mode in ("train", "eval")
    }  # fmt: skip
    assert in_unit(layers[0], {"tokens": 24}, 0.48) == pytest.approx(20.0) and layers[0].unit == "ms"


def test_weight_error_by_hand():
    """A weight of 1, 0.3 and 1 more in int8: round(0.3 x 127) / 127 = 38 / 127."""
    from minitune.model.linear import Linear
    from minitune.ops.nf4 import quantize

    weight = torch.tensor([[1.0, 0.3], [1.0, 0.0]])
    model = torch.nn.ModuleDict({"q_proj": Linear(weight.clone())})
    assert datatypes.weight_error(model, {"q_proj": weight})["bits"] == 32
    model["q_proj"].replace_weight(quantize(weight, "int8"))
    found, error = datatypes.weight_error(model, {"q_proj": weight}), (0.3 - 38 / 127) ** 2
    assert found["squared_error"] == pytest.approx(error / 4, rel=1e-4)
    assert found["relative_error"] == pytest.approx(error / 2.09, rel=1e-4)
    assert found["bits"] == (4 * 8 + 2 * 32) / 4  # four codes, two scales


def test_a_cut_run_of_tests_loses_none(tmp_path):
    lines = [{"begin": "a"}, {"test": "a", "outcome": "passed", "why": ""}, {"begin": "b"},
             {"test": "b", "outcome": "failed", "why": "E  1 != 2"}, {"test": "b", "outcome": "passed", "why": ""},
             {"begin": "c"}, {"test": "c", "outcome": "skipped", "why": "no GPU"}, {"begin": "d"}]  # fmt: skip
    path = tmp_path / "tests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu.read_tests(path) == {"passed": 1, "skipped": 1, "failed": {"b": "E  1 != 2"}, "unfinished": ["d"]}
    assert gpu.read_tests(tmp_path / "none")["passed"] == 0


def test_files_whose_packages_are_missing_are_left_out(tmp_path, monkeypatch):
    path = tmp_path / "test_x.py"
    path.write_text("import json\nimport no_such_package.functional as f\nfrom also_missing import y\n")
    assert gpu.missing_imports(path) == ["also_missing", "no_such_package"]
    assert gpu.test_files("norm") == gpu.test_files("rms_norm_backward") == (["tests/kernels/test_norm.py"], {})
    monkeypatch.setattr(gpu, "missing_imports", lambda path: ["gguf"] * (path.name == "test_nf4.py"))
    chosen, left = gpu.test_files(None)
    assert (
        set(left) == {"tests/kernels/test_nf4.py", "tests/ops/test_nf4.py"} and "tests/kernels/test_norm.py" in chosen
    )


def test_what_was_not_measured_stands_in_the_result_by_name():
    entry = {"missing": {"liger": "liger_kernel is not installed"}, "failed": {"ours": "boom"}}
    parts = {"tests": {"left_out": {"x.py": "gguf is not installed"}, "unfinished": ["t"], "cut": True},
             "kernels": {"entries": {"e": entry}, "unfinished": ["f (time was up)"]}}  # fmt: skip
    assert gpu.not_measured({"parts": parts}) == [
        "x.py: gguf is not installed", "t: not finished", "further tests: time was up",
        "e, liger: liger_kernel is not installed", "e, ours: boom", "kernels: f (time was up)", "step: left out",
    ]  # fmt: skip


def test_a_step_from_end_to_end(tmp_path):
    """Both sides in processes of their own on a tiny random model: equal work, ratios shown."""
    case = dataclasses.replace(step.CPU, shape="tiny", name="step-tiny", length=64)
    result = step.compare(case, tmp_path, runs=1, warmups=1, seconds=240)
    assert len(result["ours"]["seconds"]) == len(result["peer"]["seconds"]) == 1
    found = step.ratios(case, result)
    assert found["memory"]["ratio"] < 1 and found["time"]["verdict"] == "-"
    assert result["versions"].keys() >= {"torch", "minitune", "bitsandbytes"}
    log = (tmp_path / "logs" / "step-tiny-peer.txt").read_text()
    assert "get_kernel" not in log and str(ROOT / "kernels") not in log  # bitsandbytes did not meet our folder
