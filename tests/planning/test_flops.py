"""Operations against torch's own counter on transformers' models, and by hand."""

import dataclasses

import pytest
import torch

from minitune.model.config import ModelConfig
from minitune.planning.flops import linears, pairs, step_flops

LLAMA = ModelConfig(96, 32, 48, 3, 4, 2, 8, tie_embeddings=True)
GPT2 = ModelConfig(96, 32, 128, 2, 4, 4, 8, tie_embeddings=True, gated=False, rope=None)


def counted(model, ids) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, attn_implementation="eager",
    ))  # fmt: skip


EAGER = {"causal": False, "attention_backward": 4}  # keeps the probabilities and makes all pairs of tokens


def test_a_family_without_gate_is_what_torch_counts():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager"))
    assert counted(model, torch.randint(0, 96, (3, 20))) == step_flops(GPT2, [20] * 3, 60, method="full", **EAGER)


@pytest.mark.parametrize("last", [1, 2])
def test_the_last_layers_are_what_torch_counts(last):
    model = llama().requires_grad_(False)
    for module in (*model.model.layers[3 - last :], model.model.norm):
        module.requires_grad_(True)
    expected = step_flops(LLAMA, [20] * 3, 60, method="last_layers", trained_layers=last, **EAGER)
    assert counted(model, torch.randint(0, 96, (3, 20))) == expected


def test_full_fine_tuning_is_six_operations_a_weight_and_token():
    """The rule of thumb 6 N D, of the linear weights, without attention and head."""
    weights = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert weights == 3 * sum(a * b for a, b in linears(LLAMA))
    attention = 3 * 7 * 2 * 4 * 8 * 1  # one token sees itself: 7 matmuls of 2 H d
    assert step_flops(LLAMA, [1], 0, method="full") == 6 * weights + attention


@pytest.mark.parametrize("length,window", [(1, None), (7, None), (7, 3), (7, 7), (3, 7), (10, 1)])
def test_pairs_are_those_of_the_mask(length, window):
    seen = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window)
    assert pairs(length, window) == seen


def test_windows_save_attention_only():
    windowed = dataclasses.replace(LLAMA, windows=(4, None, 4))
    saved = step_flops(LLAMA, [20], 20, method="lora", rank=4) - step_flops(windowed, [20], 20, method="lora", rank=4)
    assert saved == 2 * 7 * 2 * 4 * 8 * (pairs(20) - pairs(20, 4))


def test_checkpointing_and_adapters_cost_what_they_should():
    """Of SmolLM2's linear layers: LoRA leaves out one pass of three, checkpointing adds nearly one forward pass."""
    smollm2 = ModelConfig(49152, 576, 1536, 30, 9, 3, 64)
    plain = {m: step_flops(smollm2, [8] * 4, 0, method=m, rank=1) for m in ("full", "lora", "qlora")}
    again = step_flops(smollm2, [8] * 4, 0, method="full", checkpointing=True)
    assert plain["lora"] == plain["qlora"]  # decoding is no matmul
    assert plain["lora"] / plain["full"] == pytest.approx(2 / 3, abs=0.01)
    forward = 1 / 3 * (1 - 576 * 1536 / sum(a * b for a, b in linears(smollm2)))  # without each layer's last result
    assert again / plain["full"] == pytest.approx(1 + forward, abs=0.005)
