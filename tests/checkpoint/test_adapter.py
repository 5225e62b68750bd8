"""PEFT's adapters in ours and ours in PEFT's, merged and not."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError, ConfigError
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora, lora_modules

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def other(tiny_folder, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("other"), hidden_size=48, num_hidden_layers=1)


def adapted(base, **options):
    """Our model with a random adapter whose B is not zero."""
    model = load_model(base)
    config = LoRAConfig(rank=4, **options)
    generator = torch.Generator().manual_seed(1)
    for lora in add_lora(model, config).values():
        lora.B.data.copy_(torch.randn(lora.B.shape, generator=generator) * 0.1)
    return model, config


def peft_folder(base, folder, **options):
    """An adapter written by PEFT with random weights, and its logits."""
    torch.manual_seed(2)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                                "init_lora_weights": False, **options})  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


def close(ours, theirs, tolerance=1e-5):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), ("layers.1.self_attn.v_proj",)])
def test_ours_loads_in_peft_and_comes_back(base, tmp_path, rslora, targets):
    model, _ = adapted(base, target_modules=targets, rslora=rslora)
    expected = model.eval()(IDS)
    save_adapter(model, tmp_path, "the-base")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert close(expected, peft.PeftModel.from_pretrained(plain, tmp_path)(IDS).logits)
    again = load_model(base, adapter=tmp_path)
    assert torch.equal(again(IDS), expected)
    assert {name: lora.scaling for name, lora in lora_modules(again).items()} == {
        name: lora.scaling for name, lora in lora_modules(model).items()
    }
    assert not close(expected, load_model(base)(IDS), 1e-2), "the adapter changes nothing: the test proves nothing"


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["v_proj"], "layers_to_transform": [1]}, {"lora_dropout": 0.3},
     {"exclude_modules": ["q_proj"]}, {"bias": "none", "target_modules": r".*\.1\.mlp\.(up|down)_proj"}],
)  # fmt: skip
def test_pefts_loads_in_ours(base, tmp_path, options):
    folder, expected = peft_folder(base, tmp_path / "adapter", **options)
    assert close(load_model(base, adapter=folder)(IDS), expected)


@torch.no_grad()
def test_a_config_without_alpha_means_what_it_means_to_peft(base, tmp_path):
    folder, _ = peft_folder(base, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "lora_alpha"}))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    assert close(load_model(base, adapter=folder)(IDS), theirs(IDS).logits)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("use_dora", True, "q_proj.lora_magnitude_vector is missing"),
        ("modules_to_save", ["lm_head"], "lm_head.weight is missing"),
        ("rank_pattern", {"q_proj": 8}, r"q_proj.lora_A.weight is \[4, 32\] instead of \[8, 32\]"),
        ("exclude_modules", ["q_proj"], "q_proj.lora_A.weight is not part of this model"),
        ("layers_to_transform", [1], "layers.0.mlp.down_proj.lora_A.weight is not part"),
        ("target_modules", ["k_proj", "q_proj"], "down_proj.lora_A.weight is not part"),
        ("target_modules", "none of them", "'none of them' matches no linear layer of this model"),
        ("target_modules", "(", "not a regular expression"),
        ("target_modules", 5, "target_modules is 5; it must be a list of names"),
        ("alpha_pattern", {"q_proj": "8"}, "alpha_pattern is .* module name -> number"),
        ("alpha_pattern", {"q_proj": 0}, "alpha is 0"),
        ("layers_to_transform", "all", "layers_to_transform is 'all'"),
        ("bias", "some", "bias is 'some'; it must be none, all or lora_only"),
        ("field_of_the_future", 1, "field_of_the_future"),
        ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4' is not supported.*convert the adapter to plain LoRA"),
        ("peft_type", "IA3", "'IA3' is not supported"),
        ("task_type", "SEQ_CLS", "has no reward head"),
        ("task_type", "SEQ_2_SEQ_LM", "task_type"),
        ("r", 0, "rank is 0"),
        ("r", "4", "whole number"),
        ("lora_alpha", "high", "adapter_config.json"),
        ("lora_dropout", 1.5, "dropout"),
    ],
)
def test_fields_that_matter_are_refused(base, tmp_path, field, value, expected):
    model, _ = adapted(base)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    fresh = load_model(base)
    with pytest.raises(CheckpointError, match=expected):
        load_adapter(fresh, tmp_path)
    assert not lora_modules(fresh)


def test_adapter_of_another_model_is_refused_with_every_misfit(base, other, tmp_path):
    model, _ = adapted(base, target_modules=("q_proj",))
    save_adapter(model, tmp_path)
    fresh = load_model(other)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(fresh, tmp_path)
    assert "layers.0.self_attn.q_proj.lora_A.weight is [4, 32]" in str(caught.value)
    assert "layers.1.self_attn.q_proj.lora_B.weight is not part of this model" in str(caught.value)
    assert not lora_modules(fresh)


def test_damaged_adapters_are_refused(base, tmp_path):
    model, _ = adapted(base, target_modules=("q_proj",))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match="lora_A.weight is missing"):
        load_model(base, adapter=tmp_path)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(CheckpointError, match="lm_head.lora_A.weight is not part"):
        load_model(base, adapter=tmp_path)
    save_file({}, file)
    with pytest.raises(CheckpointError, match="no tensors"):
        load_model(base, adapter=tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(base, adapter=tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(base, adapter=tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no adapter_config.json; give an adapter's folder"):
        load_model(base, adapter=base)


def test_saving_needs_one_adapter(base, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter to save"):
        save_adapter(load_model(base), tmp_path)
    model, _ = adapted(base)
    with pytest.raises(ConfigError, match="adapter already"):
        save_adapter(model, tmp_path)
        load_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="merge it first"):
        save_model(model, None, tmp_path / "model")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_folder_has_the_logits_of_pefts_merge(base, tmp_path, dtype):
    folder, expected = peft_folder(base, tmp_path / "adapter")
    model = load_model(base, dtype=dtype, adapter=folder)
    report = merge(model)
    assert not lora_modules(model)
    save_model(model, load_tokenizer(base), tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    logits = theirs(IDS).logits
    assert close(model(IDS), logits, {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype])
    assert close(logits, expected, {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[dtype])
    if dtype == "float32":
        merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
        state = model.state_dict()
        assert all(torch.allclose(state[name], t, rtol=1e-6, atol=1e-6) for name, t in merged.state_dict().items())
        assert report.survived == pytest.approx(1, abs=1e-6) and report.relative_error < 1e-5
    else:
        assert 0.9 < report.survived < 1.1 and 1e-5 < report.relative_error < 0.1


@torch.no_grad()
def test_report_counts_what_rounding_swallowed(base):
    """Weights of 1 in bf16 have steps of 2^-7 above and 2^-8 below: by hand, an update of 2^-10 vanishes, one of 2^-7
    arrives whole, and one of 3 x 2^-9 is rounded up to 2^-7, which is 4/3 of it with an error of 1/3."""
    for step, survived, error in ((2**-10, 0.0, 1.0), (2**-7, 1.0, 0.0), (3 * 2**-9, 4 / 3, 1 / 3)):
        model = load_model(base, dtype="bfloat16")
        layers = add_lora(model, LoRAConfig(rank=1, alpha=1.0, target_modules=("q_proj",)))
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.fill_(1.0)
        for lora in layers.values():
            lora.A.fill_(1.0)
            lora.B.fill_(step)
        report = merge(model)
        assert report.survived == pytest.approx(survived)
        assert report.relative_error == pytest.approx(error)
        assert f"{survived:.2%} of the update survived" in str(report)


def test_merging_nothing_or_nonsense_is_refused(base):
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        merge(load_model(base))
    model = load_model(base)
    add_lora(model, LoRAConfig(rank=4))
    assert merge(model).survived == 1.0  # B is zero: nothing to lose
    lora = next(iter(add_lora(model, LoRAConfig(rank=4)).values()))
    lora.B.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        merge(model)


def test_a_run_given_for_its_model_or_adapter_is_told_apart(base, tmp_path):
    from minitune.text.tokenizer import load_tokenizer

    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"give {adapter}$"):
        load_adapter(load_model(base), tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"a run, not a model; .* {adapter} as the adapter"):
        load_tokenizer(tmp_path / "run")
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        load_tokenizer(adapter)


def test_an_adapter_that_diverged_is_refused_by_name_and_leaves_the_model_alone(base, tmp_path):
    model = load_model(base)
    lora = add_lora(model, LoRAConfig(rank=4))["model.layers.1.mlp.up_proj"]
    lora.B.data[0, 0] = float("nan")
    save_adapter(model, tmp_path)
    fresh = load_model(base)
    with pytest.raises(CheckpointError, match="diverged: .*layers.1.mlp.up_proj.lora_B.weight holds a NaN"):
        load_adapter(fresh, tmp_path)
    assert not lora_modules(fresh)
