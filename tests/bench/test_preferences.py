"""The DPO cases of the bench: equal pairs on both sides, the arithmetic of the floor, a comparison on a tiny model."""

import itertools
import json

import pytest
import torch

from bench import __main__ as bench
from bench.cases import CASES
from bench.worker import our_rounds, pairs
from minitune.planning.flops import step_flops
from tests.bench.test_bench import OURS, TINY, cache  # noqa: F401 - a fixture

CASE = next(case for case in CASES if case.name == "dpo-fp32")


def test_pairs_share_a_prompt_and_nothing_else(cache):  # noqa: F811
    """2 pairs of 64 + 192 tokens a side; the stretches follow each other in the text."""
    text = json.loads((cache / "data.json").read_text())["text"]
    ((batch,),) = (list(rounds) for rounds in itertools.islice(our_rounds(CASE, cache), 1))
    assert batch.ids.shape == (4, 256) and batch.target_count == 4 * 192 and batch.document_count == 4
    assert batch.ids[0].tolist() == text[:256] and batch.ids[1].tolist() == text[:64] + text[256:448]
    assert batch.ids[2].tolist() == text[448:704]
    second = next(itertools.islice(pairs(CASE, cache), 1, None))
    assert second[0][0] == text[896:960]


def test_the_floor_counts_what_torch_counts_on_the_peer():
    """transformers and PEFT, eager attention, which keeps the probabilities and makes all pairs of tokens."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="eager"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names)).train()
    ids = torch.randint(0, 96, (4, 20))
    with FlopCounterMode(display=False) as counter:
        policy = model(input_ids=ids, labels=ids, use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids, labels=ids, use_cache=False).loss
        (policy - reference).backward()
    options = {"method": "lora", "rank": 4, "causal": False, "attention_backward": 4}
    assert counter.get_total_flops() == step_flops(OURS, [20] * 4, 80, reference=True, **options)


def test_a_comparison_from_end_to_end(cache, tmp_path):  # noqa: F811
    arguments = ["--cache", str(cache), "--output", str(tmp_path), "--name", "r", "--runs", "1", "--warmups", "1"]
    assert bench.main([*arguments, "--case", "dpo-fp32"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())["cases"]["dpo-fp32"]
    assert result["disagreement"] is None and result["ours"]["tokens"] == 4 * 192
    assert result["ours"]["losses"] == pytest.approx(result["peer"]["losses"], abs=1e-2)  # other draws of A
    assert result["ours"]["losses"][0] == pytest.approx(result["peer"]["losses"][0], abs=1e-5)
    assert 0 < result["ours"]["peak_mb"] < result["peer"]["peak_mb"]
