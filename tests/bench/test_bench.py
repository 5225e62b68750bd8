"""The bench's arithmetic against independent counts, and one comparison from end to end on a tiny model."""

import dataclasses
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench import report
from bench.cases import CASES, RANK, Case
from bench.floor import generation_seconds, matmul_rate
from bench.measure import disagreement, in_unit, judge, summary
from bench.parts import part_of
from minitune.planning.flops import step_flops

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}  # fmt: skip
OURS = SimpleNamespace(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                       head_dim=8, gated=True, windows=())  # fmt: skip
SMOLLM2 = SimpleNamespace(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
                          num_kv_heads=3, head_dim=64, gated=True, windows=())  # fmt: skip
LORA = Case("x", "", "peft", time_least=0.5, time_aim=0.4)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_equal_what_torch_counts_on_the_peer(full, checkpointing):
    """transformers and PEFT, eager attention: it keeps the probabilities and makes all pairs of tokens."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="eager"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not full:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    ids = torch.randint(0, 96, (3, 20))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    method = "full" if full else "lora"
    expected = step_flops(OURS, [20] * 3, 60, method=method, checkpointing=checkpointing, rank=4, causal=False,
                          attention_backward=4)  # fmt: skip
    if checkpointing and not full:  # PEFT then wants gradients of the embedding, and makes down_proj's result again
        expected += 2 * 60 * 32 * (32 + 16 + 16 + 3 * 4) + 2 * 2 * 60 * 48 * 32
    assert counter.get_total_flops() == expected


def test_flops_of_the_standard_step_are_those_of_the_derivation():
    """4 x 256 on SmolLM2: 106.2M linear weights twice, the head twice, adapters, attention; 613 GFLOP by hand."""
    flops = step_flops(SMOLLM2, [256] * 4, 1020, method="lora", rank=RANK)
    assert flops == pytest.approx(613e9, rel=0.01)
    packed = step_flops(SMOLLM2, [128] * 8, 1020, method="lora", rank=RANK)
    assert flops - packed == pytest.approx(30 * 7 * 2 * 576 * (4 * 256 * 257 / 2 - 8 * 128 * 129 / 2))


def test_generation_is_bound_by_reading_the_weights():
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 96 * 32
    assert generation_seconds(OURS, 10, 5, 2, math.inf, 1e3) == pytest.approx(4 * weights * 2 / 1e3)
    assert generation_seconds(OURS, 10, 5, 2, 1e3, math.inf) == pytest.approx(20 * weights / 1e3)


def test_medium_is_the_floor_of_fp32_only_where_it_is_as_accurate():
    rates = {"float32": 1.0, "medium": 2.0, "bfloat16": 4.0, "medium_error": 4e-7}
    assert matmul_rate(rates, "float32", False) == 2
    assert matmul_rate({**rates, "medium_error": 2e-3}, "float32", False) == 1
    assert matmul_rate({**rates, "medium_error": 2e-3}, "float32", True) == 2
    assert matmul_rate(rates, "bfloat16", False) == 4


def side(seconds, **changes):
    return {"seconds": seconds, "tokens": 1020, "losses": [3.0], "ids": None, "peak_mb": 100.0, "threads": 2, **changes}


def test_summary_takes_medians_and_ratios():
    result = {"ours": side([1.0, 9.0, 2.0]), "peer": side([4.0, 5.0, 60.0], peak_mb=400.0), "floor_seconds": 0.5}
    numbers = summary(LORA, result)
    assert numbers["ours"] == [statistics.median([1, 2, 9]), 1.0] and numbers["peer"] == [5.0, 4.0]
    assert numbers["time_ratio"] == 0.4 and numbers["memory_ratio"] == 0.25 and numbers["floor_share"] == 0.25
    assert (numbers["time"], numbers["memory"]) == ("aim met", "-")


@pytest.mark.parametrize("ratio,verdict", [(0.4, "aim met"), (0.41, "met"), (0.5, "met"), (0.51, "missed")])
def test_judge(ratio, verdict):
    assert judge(ratio, 0.5, 0.4) == verdict
    assert judge(ratio, None, None) == "-"
    assert judge(0.3, 0.5, None) == "met"


def test_units():
    assert in_unit(Case("x", "", "trl", kind="rows"), side([], tokens=2000), 3.0) == 1.5  # ms a target token
    assert in_unit(Case("x", "", "transformers", kind="generate"), side([], tokens=128), 2.0) == 64  # tokens/s
    assert in_unit(LORA, side([]), 2.0) == 2.0


@pytest.mark.parametrize(
    "case,changes,reason",
    [
        (LORA, {}, None),
        (LORA, {"losses": [3.00009, 9.0]}, None),
        (LORA, {"losses": [3.0002]}, "loss of step 1"),
        (LORA, {"losses": [math.nan]}, "loss of step 1"),
        (dataclasses.replace(LORA, dtype="bfloat16"), {"losses": [3.04]}, None),
        (dataclasses.replace(LORA, dtype="bfloat16"), {"losses": [3.06]}, "loss of step 1"),
        (LORA, {"threads": 1}, "threads"),
        (LORA, {"tokens": 1024}, "tokens a round"),
    ],
)
def test_unequal_work_is_no_comparison(case, changes, reason):
    found = disagreement(case, {"ours": side([1.0]), "peer": side([1.0], **changes)})
    assert found is None if reason is None else reason in found


def test_other_tokens_are_no_comparison():
    case = Case("x", "", "transformers", kind="generate")
    ours, peer = side([1.0], losses=[], ids=[1, 2, 3]), side([1.0], losses=[], ids=[1, 2, 4])
    assert disagreement(case, {"ours": ours, "peer": peer}) == "the answers part at token 3"
    assert disagreement(case, {"ours": ours, "peer": ours}) is None


def test_parts_are_told_apart_by_shape():
    def part(name, *shapes):
        return part_of(f"aten::{name}", [list(shape) for shape in shapes], SMOLLM2)

    assert part("mm", (1024, 576), (576, 3072)) == "base matmuls"
    assert part("mm", (1024, 576), (576, 32)) == part("addmm_", (1024, 960), (1024, 48), (48, 960)) == "LoRA matmuls"
    assert part("mm", (128, 576), (576, 49152)) == "head matmuls" and part("exp_", (128, 49152)) == "cross-entropy"
    assert part("_scaled_dot_product_flash_attention_for_cpu", (4, 9, 256, 64)) == "attention"
    assert part("mul_", (12, 384, 256)) == "attention" and part("mul", (4, 256, 576), (4, 256, 1)) == "elementwise"
    assert part("_fused_adamw_") == "optimiser" and part("copy_", (4, 256)) == "copies"


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_folder):
    """What `prepare` would have written, for a tiny random model."""
    folder = tmp_path_factory.mktemp("bench")
    for dtype in ("float32", "bfloat16"):
        tiny_folder(folder / dtype, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(0, 256, (5000,), generator=draw).tolist()
    rows = [{"ids": text[i : i + 10 + i], "targets": [False] * 5 + [True] * (5 + i)} for i in range(16)]
    (folder / "data.json").write_text(json.dumps({"text": text, "rows": rows}))
    return folder


def test_a_comparison_from_end_to_end(cache, tmp_path, capsys):
    arguments = ["--cache", str(cache), "--output", str(tmp_path), "--name", "r", "--runs", "2", "--warmups", "1"]
    assert bench.main([*arguments, "--case", "lora-fp32"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    result = results["cases"]["lora-fp32"]
    assert result["disagreement"] is None
    assert len(result["ours"]["seconds"]) == len(result["peer"]["seconds"]) == 2
    assert result["ours"]["losses"] == pytest.approx(result["peer"]["losses"], abs=1e-2)  # other draws of A
    assert 0 < result["ours"]["peak_mb"] < result["peer"]["peak_mb"]
    assert results["versions"].keys() >= {"torch", "peft", "minitune"}
    assert (tmp_path / "r.png").is_file()
    assert "lora-fp32  transformers + PEFT" in capsys.readouterr().out
    before = (tmp_path / "r.json").read_bytes()
    assert bench.main([*arguments, "--case", "lora-fp32"]) == 0  # there already: only shown
    assert (tmp_path / "r.json").read_bytes() == before


def test_what_cannot_be_measured_is_said_and_not_drawn(cache, tmp_path, monkeypatch):
    broken = [dataclasses.replace(next(c for c in CASES if c.name == "lora-fp32"), dtype="float64")]
    monkeypatch.setattr(bench, "CASES", broken)
    monkeypatch.setattr(report, "CASES", broken)
    arguments = ["--cache", str(cache), "--output", str(tmp_path), "--name", "r", "--runs", "1"]
    assert bench.main(arguments) == 0
    assert "exit status 1" in json.loads((tmp_path / "r.json").read_text())["cases"]["lora-fp32"]["not_measured"]
    assert not (tmp_path / "r.png").exists()
