"""Adapters: where they go, what they compute (against PEFT), and that they can be switched off."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from minitune.errors import ConfigError
from minitune.model.config import LoRAConfig
from minitune.model.lora import adapter_disabled, add_lora, linear_modules, lora_modules
from minitune.model.trainable import train_all, train_last_layers, train_matching, trainable_parameters
from tests.model.test_parity import relative, twins


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("gate_proj", "o_proj")])
def test_logits_and_gradients_equal_peft(rslora, targets):
    ours, theirs = twins(kv_heads=2)
    names = targets if isinstance(targets, str) else list(targets)
    peft = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=6, target_modules=names, use_rslora=rslora))
    added = add_lora(ours, LoRAConfig(rank=4, alpha=6, target_modules=targets, rslora=rslora))
    prefix = "base_model.model."
    pairs = {}
    for name, parameter in peft.named_parameters():
        if not parameter.requires_grad:
            continue
        path, kind = name.removeprefix(prefix).split(".lora_")
        pairs[(path, kind[0])] = parameter
        with torch.no_grad():
            parameter.normal_(std=0.05)
            getattr(added[path], kind[0]).copy_(parameter)
    assert len(pairs) == 2 * len(added)
    ids = torch.randint(0, 101, (2, 11))
    a, b = ours(ids), peft(ids).logits
    assert relative(a, b) < 1e-5
    upstream = torch.randn_like(b)
    (a * upstream).sum().backward()
    (b * upstream).sum().backward()
    for (path, kind), parameter in pairs.items():
        assert relative(getattr(added[path], kind).grad, parameter.grad) < 1e-5, (path, kind)
    with adapter_disabled(ours), peft.disable_adapter():
        assert relative(ours(ids), peft(ids).logits) < 1e-5
    assert torch.equal(ours(ids), a)


def test_a_fresh_adapter_is_nothing_and_is_drawn_from_its_seed():
    ours, _ = twins(kv_heads=2)
    ids = torch.randint(0, 101, (1, 5))
    before = ours(ids)
    adapters = add_lora(ours, LoRAConfig(rank=3), seed=7)
    assert torch.equal(ours(ids), before)
    assert len(adapters) == 3 * 7 == len(lora_modules(ours)) == len(linear_modules(ours))
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(ours).values())
    assert set(trainable_parameters(ours)) == {f"{path}.lora.{x}" for path in adapters for x in "AB"}
    twin, _ = twins(kv_heads=2)
    again = add_lora(twin, LoRAConfig(rank=3), seed=7)
    assert all(torch.equal(again[path].A, adapters[path].A) for path in adapters)


def test_dropout_acts_in_training_only():
    ours, _ = twins(kv_heads=2)
    ours.eval()  # as `load_model` returns it: an adapter added later takes the mode over
    for adapter in add_lora(ours, LoRAConfig(rank=2, dropout=0.5)).values():
        adapter.B.data.fill_(0.1)
    ids = torch.randint(0, 101, (1, 5))
    assert torch.equal(ours(ids), ours(ids))
    ours.train()
    assert not torch.equal(ours(ids), ours(ids))
    ours.eval()
    assert torch.equal(ours(ids), ours(ids))


def test_a_cast_of_the_model_rounds_no_adapter_and_frees_no_weight():
    ours, _ = twins(kv_heads=2)
    adapters = add_lora(ours, LoRAConfig(rank=2))
    drawn = {path: adapter.A.clone() for path, adapter in adapters.items()}
    ours.bfloat16()
    assert ours.head_weight.dtype == torch.bfloat16
    assert all(torch.equal(adapter.A, drawn[path]) for path, adapter in adapters.items())
    assert all(".lora." in name for name in trainable_parameters(ours))
    ours.double()
    assert all(parameter.dtype == torch.float64 for parameter in ours.parameters())


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: LoRAConfig(rank=0), "rank is 0"),
        (lambda: LoRAConfig(alpha=0), "alpha"),
        (lambda: LoRAConfig(dropout=1.0), "dropout"),
        (lambda: LoRAConfig(target_modules=()), "empty"),
    ],
)
def test_bad_configs_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_unknown_targets_and_second_adapters_are_refused():
    ours, _ = twins()
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        add_lora(ours, LoRAConfig(target_modules=("q_porj",)))
    add_lora(ours, LoRAConfig(rank=1))
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(ours, LoRAConfig(rank=1))


def test_trainable_sets():
    ours, _ = twins()
    assert len(train_all(ours)) == len(list(ours.parameters()))
    names = train_last_layers(ours, 1)
    assert names and all(name.startswith(("model.layers.2.", "model.norm.")) for name in names)
    assert set(train_matching(ours, r"layers\.[01]\.mlp")) == {
        f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")
    }
    for call in (lambda: train_last_layers(ours, 4), lambda: train_last_layers(ours, 0),
                 lambda: train_matching(ours, "("), lambda: train_matching(ours, "nothing")):  # fmt: skip
        with pytest.raises(ConfigError):
            call()
