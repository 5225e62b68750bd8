"""Models whose linear weights are in 4 or 8 bits: which ones, what they compute, what a cast leaves, peak memory."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minitune.checkpoint.load import load_model
from minitune.decoding import generate_ids
from minitune.model.config import LoRAConfig, ModelConfig, QuantizationConfig
from minitune.model.linear import QuantizedWeight
from minitune.model.lora import add_lora, linear_modules, quantized_weights
from minitune.model.transformer import Transformer
from minitune.ops.nf4 import quantize
from minitune.sampling import Sampling

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256
OPTIONS = {
    "nf4": "nf4",
    "fp4": "fp4",
    "int8": "int8",
    "nf4, fp32 scales of 128": QuantizationConfig("nf4", 128, False),
}


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A tiny model on disk in fp32, with a tied head and with one of its own."""
    return {
        tied: tiny_folder(tmp_path_factory.mktemp("m") / "m", tokenizer=False, hidden_size=64, intermediate_size=96,
                          tie_word_embeddings=tied, attention_bias=not tied, mlp_bias=not tied)
        for tied in (True, False)
    }  # fmt: skip


def decoded_twin(model, dtype):
    """The same model with plain weights: each quantised one decoded."""
    twin = Transformer(model.config, dtype=dtype, init=False)
    decoded = {f"{path}.weight": weight.dequantize(dtype) for path, weight in quantized_weights(model).items()}
    twin.load_state_dict(model.state_dict() | decoded)
    return twin.eval()


def load(folder, quantization, **options):
    return load_model(folder, quantize=quantization, keep_quantized=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_weight_but_the_head_is_quantised_from_what_is_stored(folders, option, tied, dtype):
    model = load(folders[tied], OPTIONS[option], dtype=dtype)
    stored = load_file(folders[tied] / "model.safetensors")
    wanted = OPTIONS[option] if isinstance(OPTIONS[option], QuantizationConfig) else QuantizationConfig(option)
    weights = quantized_weights(model)
    assert set(weights) == set(linear_modules(model)) and len(weights) == 2 * 7
    for path, weight in weights.items():
        expected = quantize(stored[f"{path}.weight"], **dataclasses.asdict(wanted))
        assert all(torch.equal(weight.tensors()[field], part) for field, part in expected.tensors().items())
        assert weight.dtype == dtype
        assert torch.equal(weight.dequantize(), expected.dequantize(dtype))
    rest = {name: p for name, p in model.named_parameters()}
    assert set(rest) == {name for name in stored if name.removesuffix(".weight") not in weights}
    assert all(type(p) is nn.Parameter and torch.equal(p, stored[name].to(dtype)) for name, p in rest.items())
    assert ("lm_head.weight" in rest) == (not tied)
    assert model.head_weight is (rest["model.embed_tokens.weight"] if tied else rest["lm_head.weight"])
    assert model.state_dict().keys() == rest.keys()


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_answers_are_those_of_the_decoded_weights(folders, option, tied, dtype):
    model = load(folders[tied], OPTIONS[option], dtype=dtype)
    twin = decoded_twin(model, dtype)
    assert torch.equal(model(IDS), twin(IDS))
    assert not torch.equal(model(IDS), load_model(folders[tied], dtype=dtype)(IDS)), "or nothing was quantised"
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.0)}
    prompts = [[1, 2, 3], [4]]
    assert generate_ids(model, prompts, **options) == generate_ids(twin, prompts, **options)


def test_gradients_of_adapters_are_those_of_the_decoded_weights(folders):
    model = load(folders[False], "nf4")
    twin = decoded_twin(model, torch.float32)
    grads = []
    for each in (model, twin):
        for lora in add_lora(each, LoRAConfig(rank=3), seed=5).values():
            nn.init.normal_(lora.B, std=0.1, generator=torch.Generator().manual_seed(1))
        each.train()(IDS).square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 2 * 14 and grads[0].keys() == grads[1].keys()
    assert all(torch.equal(gradient, grads[1][name]) for name, gradient in grads[0].items())


def parts(model):
    return {(path, field): t for path, w in quantized_weights(model).items() for field, t in w.tensors().items()}


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_a_cast_or_a_move_leaves_what_is_quantised_as_it_is(folders, option):
    model = load(folders[True], OPTIONS[option])
    before = {key: tensor.clone() for key, tensor in parts(model).items()}
    scale = "offset" if option in ("nf4", "fp4") else "absmax"
    assert any(field == scale for _, field in before)
    for target in (torch.bfloat16, torch.float16, torch.float32, "cpu"):
        model.to(target)
        now = parts(model)
        assert all(torch.equal(now[key], tensor) and now[key].dtype == tensor.dtype for key, tensor in before.items())
        assert model(IDS).dtype == model.head_weight.dtype
    model.bfloat16()
    wide = [part.dtype for (_, field), part in parts(model).items() if field in ("absmax", "nested_absmax", "offset")]
    assert wide and set(wide) == {torch.float32}
    model.to("meta")
    assert all(part.device.type == "meta" for part in parts(model).values())
    assert all(layer.weight.device.type == "meta" for layer in linear_modules(model).values())


def test_a_quantised_weight_is_no_parameter_and_can_be_replaced(folders):
    model = load(folders[True], "nf4")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.weight, QuantizedWeight) and layer.weight.shape == (64, 64)
    assert [name for name, _ in layer.named_parameters()] == []
    decoded = layer.stored_weight.dequantize()
    layer.replace_weight(decoded)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] and layer.stored_weight is layer.weight
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == decoded.data_ptr()
    assert len(quantized_weights(model)) == 13


MEASURE = """
import sys
from pathlib import Path
import torch
from minitune.checkpoint.load import load_model
from minitune.model.lora import quantized_weights
import minitune.checkpoint.gguf

def high():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

small, path, quantize, keep, dtype = sys.argv[1:]
load_model(small, quantize=None if quantize == "none" else quantize, dtype=dtype, keep_quantized=keep == "keep")
before = high()
model = load_model(path, quantize=None if quantize == "none" else quantize, dtype=dtype, keep_quantized=keep == "keep")
held = sum(p.nbytes for p in model.parameters()) + sum(w.nbytes for w in quantized_weights(model).values())
full = 4 * sum(p.numel() for p in model.parameters())
full += 4 * sum(w.shape.numel() for w in quantized_weights(model).values())
print(high() - before, held, full)
"""


def measure(small, path, quantization, keep, dtype, tmp_path, monkeypatch):
    """Load in a process of its own; returns (growth of the peak, bytes the model has, bytes it would have in fp32)."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))
    command = [sys.executable, "-c", MEASURE, str(small), str(path), quantization, keep, dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(int(number) for number in done.stdout.split())


needs_status = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads VmHWM")


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A random model of 208 MB in fp32 whose largest tensor has 12 MB."""
    from minitune.checkpoint.huggingface import save_model

    config = ModelConfig(vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_layers=4, num_heads=16,
                         num_kv_heads=16, head_dim=64, tie_embeddings=True)  # fmt: skip
    folder = tmp_path_factory.mktemp("large") / "large"
    save_model(Transformer(config), None, folder)
    return folder


@needs_status
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_the_full_precision_model_is_never_held(folders, large_folder, keep, tmp_path, monkeypatch):
    peak, held, full = measure(folders[True], large_folder, "nf4", keep, "float32", tmp_path, monkeypatch)
    threads, largest = (
        min(4, os.cpu_count() or 1),
        2816 * 1024 * 4,
    )  # each thread has a weight, and what it is made into
    assert full > 200e6 and held < 35e6
    assert peak < held + (held if keep == "keep" else 0) + threads * 2.5 * largest + 10e6 < full


@needs_status
def test_the_measurement_sees_a_full_precision_model(folders, large_folder, tmp_path, monkeypatch):
    peak, held, full = measure(folders[True], large_folder, "none", "drop", "float32", tmp_path, monkeypatch)
    assert held == full and peak > 0.9 * full


@needs_status
@pytest.mark.real
@pytest.mark.parametrize("keep", ["keep", "drop"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_is_never_held_in_full_precision(folders, smollm2_path, keep, dtype, tmp_path, monkeypatch):
    peak, held, full = measure(folders[True], smollm2_path, "nf4", keep, dtype, tmp_path, monkeypatch)
    assert peak < 1.35 * held < 0.45 * full
