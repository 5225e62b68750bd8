"""Adapters of families whose modules are fused, or named and laid out otherwise: PEFT's in ours and ours in PEFT's."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Phi3Config

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError
from minitune.model.lora import add_lora
from minitune.model.lora_config import LoRAConfig

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 60
IDS_OF_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 60, "initializer_range": 0.2}
SIZES = {**IDS_OF_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": (GPT2Config(**IDS_OF_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
                        resid_pdrop=0.0, embd_pdrop=0.0),
             ["c_attn", "c_proj"], ["c_attn", "c_fc"]),
    "gpt_neox": (GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
                 ["query_key_value", "dense_4h_to_h"], ["attention.dense", "query_key_value"]),
    "phi3": (Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64),
             ["qkv_proj", "down_proj"], ["gate_up_proj", "qkv_proj"]),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random base with its biases drawn, and two lists of its modules' names."""
    config, *targets = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder, *targets


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "bias": "all"}, {"init_lora_weights": "pissa"}])
def test_pefts_adapter_has_its_logits_gradients_and_merge(family, tmp_path, options):
    _, base, targets, _ = family
    torch.manual_seed(1)
    given = {"target_modules": targets, "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "given")
    ours = load_model(base)
    load_adapter(ours, tmp_path / "given")
    logits, wanted = ours(IDS), model(IDS).logits
    assert relative(logits, wanted) < 1e-5 and relative(load_model(base)(IDS), wanted) > 1e-2
    for each in (logits, wanted):
        each.square().mean().backward()
    norms = [
        sorted(p.grad.norm().item() for p in each.parameters() if p.requires_grad) for each in (ours, model)
    ]  # of parameters that have other names
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    with torch.no_grad():
        save_adapter(ours, tmp_path / "saved", str(base))
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").eval()
        assert relative(again(IDS).logits, wanted) < 1e-5
        merge(ours)
        save_model(ours, None, tmp_path / "merged")
        assert relative(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, wanted) < 1e-5


@torch.no_grad()
def test_ours_is_written_under_the_checkpoints_names(family, tmp_path):
    name, base, _, targets = family
    model = load_model(base)
    added = add_lora(model, LoRAConfig(rank=3, target_modules=tuple(targets)))
    own = {"c_attn": "qkv_proj", "query_key_value": "qkv_proj", "c_fc": "up_proj", "attention.dense": "o_proj"}
    again = add_lora(
        load_model(base), LoRAConfig(rank=3, target_modules=tuple(own.get(name, name) for name in targets))
    )
    assert added.keys() == again.keys() and len(added) == 4, "our names and the checkpoint's choose the same"
    for lora in added.values():
        lora.B.normal_(std=0.1)
    save_adapter(model, tmp_path, str(base))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(fields["target_modules"]) == sorted(t.split(".")[-1] for t in targets) or name == "gpt_neox"
    assert fields["fan_in_fan_out"] is (name == "gpt2")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    assert relative(model(IDS), theirs(IDS).logits) < 1e-5


def test_a_layer_that_trains_whole_beside_its_adapter_is_not_saved_as_one(tiny_folder, tmp_path):
    model = load_model(tiny_folder(tmp_path / "base"))
    add_lora(model, LoRAConfig(rank=2))
    model.requires_grad_(True)
    with pytest.raises(CheckpointError, match="has an adapter and trains whole too"):
        save_adapter(model, tmp_path / "adapter")
