"""QLoRA from the rows to the adapter, resumed, merged, and step by step against PEFT over bitsandbytes' layers."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minitune import export
from minitune.checkpoint.adapter import adapter_quantization, load_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError, ConfigError
from minitune.model.config import LoRAConfig, QuantizationConfig
from minitune.model.linear import QuantizedWeight
from minitune.model.lora import add_lora, linear_modules, quantized_weights
from minitune.ops import linear
from minitune.ops.linear import stacked
from minitune.reporting import report
from minitune.reporting.journal import read_metrics
from minitune.training import loop
from minitune.training.config import LoRAOptions, OptimizerConfig, QuantizationOptions
from minitune.training.run import train
from tests.training import test_peft_parity
from tests.training.conftest import in_child, outcome, resumed, wait
from tests.training.test_resume import before_call

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """Quantised folders are kept in a place of this test; no picture is drawn."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(report, "plot_losses", lambda *_: False)
    return tmp_path / "weights" / "quantized"


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    """A model whose rows are whole blocks of 64: bitsandbytes' library for CPUs is wrong about others."""
    return tiny_folder(tmp_path_factory.mktemp("base") / "base", hidden_size=64, intermediate_size=128,
                       initializer_range=0.1)  # fmt: skip


@pytest.fixture
def make(make_config, base):
    """A config of a run of 12 steps with dropout and checkpointing."""

    def make(name="run", **changes):
        return make_config(name, **{"model": str(base), "method": "qlora", "gradient_checkpointing": True, **changes})

    return make


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


KINDS = {"nf4": QuantizationOptions(), "int8": QuantizationOptions(kind="int8"),
         "fp4, blocks of 32, fp32 scales": QuantizationOptions("fp4", 32, False)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_inside_a_window_ends_with_the_bits_of_one_that_was_not(make, weights, kind):
    changes = {"quantization": KINDS[kind]}
    straight = train(make("straight", **changes))
    expected = outcome(straight.folder)
    assert straight.status == "finished" and len(losses(straight.folder)) == 12
    config = make(**changes)
    stop = before_call(loop, "_accumulate", 9, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert wait(in_child(config, stop)) == 143
    assert outcome(train(resumed(config)).folder) == expected
    assert len(list(weights.glob("*"))) == (0 if kind == "int8" else 1)
    wanted = KINDS[kind].resolved()
    text = straight.folder.joinpath("config.yaml").read_text()
    assert f"kind: {wanted.kind}" in text and f"block_size: {wanted.block_size or 'null'}" in text


def test_it_learns_and_checkpointing_changes_no_bit(make):
    first = train(make("a", lora=LoRAOptions(rank=4, dropout=0.1), optimizer=OptimizerConfig(learning_rate=5e-3)))
    assert first.best_loss < first.base_loss - 0.1
    config = make("b", lora=LoRAOptions(rank=4, dropout=0.1), optimizer=OptimizerConfig(learning_rate=5e-3))
    second = train(dataclasses.replace(config, gradient_checkpointing=False))
    assert outcome(first.folder)["result"] == outcome(second.folder)["result"]
    assert losses(first.folder) == losses(second.folder)
    plain = train(make("c", method="lora", optimizer=OptimizerConfig(learning_rate=5e-3)))
    assert losses(plain.folder) != losses(first.folder), "of another base"


def test_another_quantisation_on_resuming_is_refused_by_name(make):
    config = make(max_steps=3)
    train(config)
    for change in (QuantizationOptions(block_size=128), QuantizationOptions(kind="fp4")):
        with pytest.raises(CheckpointError, match=r"cannot resume .*quantization\."):
            train(dataclasses.replace(resumed(config), quantization=change))


def test_a_folder_that_is_in_4_bits_already_is_trained_as_it_is(make, base, tmp_path, weights):
    from minitune.checkpoint.load import load_tokenizer

    expected = outcome(train(make("a")).folder)["result"]
    kept = {path.name for path in weights.glob("*")}
    folders = {}
    for double in (True, False):
        model = load_model(base, quantize=QuantizationConfig("nf4", 64, double), keep_quantized=False)
        folders[double] = tmp_path / f"four-{double}"
        save_model(model, load_tokenizer(base), folders[double])
    assert outcome(train(make("b", model=str(folders[True]))).folder)["result"] == expected
    with pytest.raises(ConfigError, match=r"stored as .*double_quant=False.*, not .*double_quant=True"):
        train(make("c", model=str(folders[False])))
    train(make("c", model=str(folders[False]), quantization=QuantizationOptions(double_quant=False)))
    with pytest.raises(ConfigError, match="stored in 4 bits, which method lora cannot train; use qlora"):
        train(make("d", model=str(folders[True]), method="lora"))
    assert not (tmp_path / "d").exists(), "refused before anything is written"
    assert {path.name for path in weights.glob("*")} == kept, "nothing was there to quantise"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_adapter_is_loaded_by_peft_over_bitsandbytes(make, base, weights, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = QuantizationOptions(kind)
    result = train(make(quantization=options, optimizer=OptimizerConfig(learning_rate=1e-2))).result
    assert sorted(path.name for path in result.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(result / "adapter_model.safetensors", "pt") as file:
        record = file.metadata()["minitune.base_quantization"]
    assert json.loads(record) == {"kind": kind, "block_size": 64, "double_quant": True}
    assert adapter_quantization(result) == options.config()
    ours = load_model(base, adapter=result, quantize="auto")
    (kept,) = weights.glob("*")
    quantised = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).train()
    with torch.no_grad():
        before = quantised(IDS).logits
        theirs = PeftModel.from_pretrained(quantised, result)
        for module in theirs.modules():  # eval() of bitsandbytes' layers computes in bf16
            module.train(not isinstance(module, torch.nn.Dropout))
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=2e-5, rtol=1e-5)
        assert (theirs(IDS).logits - before).abs().max() > 0.1, "the adapter changes something"


def test_a_run_may_start_from_an_adapter(make):
    first = train(make("a"))
    second = train(make("b", adapter=str(first.result), lora=LoRAOptions()))
    assert losses(second.folder)[-1] < losses(first.folder)[0]
    assert adapter_quantization(second.result) == QuantizationConfig()


# Against PEFT and bitsandbytes


@pytest.fixture
def training_mode(monkeypatch):
    """Have transformers return its models in train(): in eval() bitsandbytes repacks weights and computes in bf16."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: original(*a, **k).train())


@pytest.mark.parametrize("form", [QuantizationConfig(), QuantizationConfig("fp4", 64, False)], ids=lambda f: f.kind)
def test_twenty_steps_against_peft_and_bitsandbytes(base, weights, tmp_path, training_mode, form):
    model = load_model(base, quantize=form)
    (kept,) = weights.glob("*")
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=3)
    assert test_peft_parity.distance(model, kept, tmp_path, rate=2e-3) < 1e-3


def without_input_gradient(original):
    """A mutant: the quantised weights are decoded a little wrongly in every other call, the backward passes."""
    calls = [0]

    def join(weights, like):
        calls[0] += 1
        joined = original(weights, like)
        return joined * 1.01 if calls[0] % 2 and isinstance(weights[0], linear.QuantizedTensor) else joined

    return join


@pytest.mark.parametrize("mutant", ["another base", "a wrong gradient"])
def test_the_comparison_sees_a_wrong_base_and_a_wrong_gradient(
    base, weights, tmp_path, training_mode, monkeypatch, mutant
):
    model = load_model(base, quantize="nf4")
    (kept,) = weights.glob("*")
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=3)
    if mutant == "a wrong gradient":
        monkeypatch.setattr(linear, "_join", without_input_gradient(linear._join))
    with pytest.raises(AssertionError):
        test_peft_parity.distance(model, base if mutant == "another base" else kept, tmp_path, rate=2e-3)


@pytest.mark.real
def test_ten_steps_on_smollm2(smollm2_path, weights, tmp_path, training_mode, monkeypatch):
    monkeypatch.setattr(test_peft_parity, "STEPS", 10)
    model = load_model(smollm2_path, quantize="nf4", dtype="float32")
    (kept,) = weights.glob("*")
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=3)
    assert test_peft_parity.distance(model, kept, tmp_path, rate=5e-5) < 1e-3


# Merging


def adapted(base, quantization, targets="all-linear"):
    model = load_model(base, quantize=quantization, keep_quantized=False)
    draw = torch.Generator().manual_seed(4)
    for lora in add_lora(model, LoRAConfig(rank=4, alpha=6.0, target_modules=targets), seed=1).values():
        lora.B.data.copy_(torch.randn(lora.B.shape, generator=draw) * 0.05)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_onto_decoded_weights(base, kind, targets, dtype):
    model = adapted(base, kind, targets)
    live = model(IDS)
    expected = {}
    for path, layer in linear_modules(model).items():
        expected[path] = layer.stored_weight.dequantize(torch.float32)
        if layer.lora is not None:
            expected[path] += 1.5 * (layer.lora.B @ layer.lora.A)
    kinds = load_file(base / "model.safetensors")
    merged = merge(model, dtype)
    assert merged.layers == (14 if targets == "all-linear" else 4)
    assert quantized_weights(model) == {} and not any(isinstance(m, QuantizedWeight) for m in model.modules())
    for path, layer in linear_modules(model).items():
        assert type(layer.weight) is torch.nn.Parameter and layer.lora is None and layer.weight.dtype == dtype
        assert torch.equal(layer.weight, expected[path].to(dtype)), path
    assert model.state_dict().keys() == kinds.keys()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert stacked([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None
        assert stacked([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None
    if dtype == torch.float32:
        torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-5)
        assert merged.survived == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_a_merged_model_is_saved_and_read_as_any_other(base, tmp_path):
    model = adapted(base, "nf4")
    live = model(IDS)
    merge(model)
    save_model(model, None, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(load_model(tmp_path / "merged")(IDS), live, atol=1e-5, rtol=1e-5)


def test_an_export_merges_onto_the_base_that_was_trained_on(make, base, tmp_path, capsys):
    """Onto the decoded 4-bit weights, as the live model has them, and not onto those in full precision."""
    result = train(make(optimizer=OptimizerConfig(learning_rate=1e-2))).result
    export.main(["--model", str(base), "--adapter", str(result), "--merge", "--output", str(tmp_path / "merged")])
    merged = load_model(tmp_path / "merged")
    live = load_model(base, adapter=result, quantize="auto")
    other = load_model(base)
    load_adapter(other, result)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS), live(IDS), atol=1e-5, rtol=1e-5)
        assert (other(IDS) - live(IDS)).abs().max() > 0.1
