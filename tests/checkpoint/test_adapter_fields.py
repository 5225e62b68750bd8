"""Every field of PEFT's LoraConfig: used as PEFT uses it, proved to change nothing, or refused by its name."""

import dataclasses
import json
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.load import load_model
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError
from minitune.model.lora import lora_modules
from minitune.model.trainable import trainable_parameters

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256
# Each changes PEFT's logits when set, in an adapter that PEFT writes with it.
USED = {
    "r": {"r": 5},
    "lora_alpha": {"lora_alpha": 11},
    "target_modules": {"target_modules": ["k_proj", "down_proj"]},
    "target_modules as a regular expression": {"target_modules": r".*\.[01]\.(self_attn|mlp)\.(q|up)_(proj|x)"},
    "target_modules that is all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "exclude_modules as a regular expression": {"exclude_modules": r".*\.1\..*"},
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, r"^model\.layers\.1\.mlp\.(up|gate)_proj": 2, "down_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.self_attn.q_proj": 30, "q_proj": 3, r".*_attn\..*": 17}},
    "use_rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "bias that is lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save with the head alone": {"modules_to_save": ["lm_head"]},
    "modules_to_save with norms": {"modules_to_save": ["layernorm", "model.norm"]},
    "modules_to_save with a layer's part": {"modules_to_save": ["1.mlp"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "ensure_weight_tying": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
TABLES = [case for case, options in USED.items() if "modules_to_save" in options and "norm" not in case]
INERT = {
    "auto_mapping": {"parent_library": "x"},
    "peft_version": "0.1",
    "base_model_name_or_path": "somewhere/else",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.5,  # in evaluation; in training see tests/model/test_lora_kinds.py
    "fan_in_fan_out": True,
    "megatron_core": "x",
    "qalora_group_size": 4,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
}
REFUSED = {
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "target_parameters": ["x"],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"x": 1},
    "velora_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "megatron_config": {"x": 1},
    "peft_type": "LOHA",
    "task_type": "SEQ_2_SEQ_LM",
}


@pytest.fixture(scope="module")
def bases(tiny_folder, tmp_path_factory):
    """A base with biases and a head of its own, and one whose head is its embedding."""
    untied = tiny_folder(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False, attention_bias=True)
    return {False: untied, True: tiny_folder(tmp_path_factory.mktemp("tied"), attention_bias=True)}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """PEFT's logits without any of the fields."""
    with torch.no_grad():
        options = {"target_modules": ["q_proj", "v_proj"]}
        return {
            tied: write(base, tmp_path_factory.mktemp("plain"), **options)(IDS).logits for tied, base in bases.items()
        }


def write(base, folder, *, drawn=True, **options):
    """An adapter that PEFT writes, its parameters drawn; returns PEFT's model."""
    torch.manual_seed(2)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                                "init_lora_weights": False, **options})  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and drawn:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def theirs(base, folder, **options):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, **options).eval()


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_every_field_of_lora_config_is_accounted_for():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    used = {name.split(" ")[0] for name in USED}
    assert fields == used | INERT.keys() | REFUSED.keys()


@pytest.mark.parametrize("case,tied", [*((case, False) for case in USED), *((case, True) for case in TABLES)])
def test_what_is_used_is_used_as_peft_does(bases, plain, tmp_path, case, tied):
    base, options = bases[tied], USED[case]
    write(base, tmp_path / "given", **options)
    expected = theirs(base, tmp_path / "given", is_trainable=True)  # as read: writing sorts the keys of patterns
    with torch.no_grad():
        wanted = expected(IDS).logits
    assert relative(plain[tied], wanted) > 1e-3, "the field changes nothing"
    model = load_model(base, adapter=tmp_path / "given")
    logits = model(IDS)
    assert relative(logits, wanted) < 1e-5
    trained = {name for name, p in expected.named_parameters() if p.requires_grad}
    shared = options.get("ensure_weight_tying") and not tied  # PEFT's option for a head that is not tied: nothing
    assert len(trainable_parameters(model)) == len(trained) or shared
    save_adapter(model, tmp_path / "saved", str(base))
    with torch.no_grad():
        assert relative(theirs(base, tmp_path / "saved")(IDS).logits, wanted) < 1e-5
        assert relative(load_model(base, adapter=tmp_path / "saved")(IDS), wanted) < 1e-5
        merge(model)
        assert relative(model(IDS), wanted) < 1e-5


@pytest.mark.parametrize("field", INERT)
def test_what_is_inert_changes_neither_pefts_logits_nor_ours(bases, tmp_path, field):
    with torch.no_grad():
        wanted = write(bases[False], tmp_path)(IDS).logits
        edit(tmp_path, **{field: INERT[field]})
        if field not in ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "auto_mapping"):
            assert relative(theirs(bases[False], tmp_path)(IDS).logits, wanted) < 1e-6
        assert relative(load_model(bases[False], adapter=tmp_path)(IDS), wanted) < 1e-5


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_refused_is_named(bases, tmp_path, field):
    write(bases[False], tmp_path)
    edit(tmp_path, **{field: REFUSED[field]})
    model = load_model(bases[False])
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {field} .*{REFUSED[field]!r}".replace("[", r"\[")):
        load_adapter(model, tmp_path)
    assert not lora_modules(model)


@pytest.mark.parametrize("init", ["olora", "mica", "lora_ga", "loftq", "corda", "pissa_niter_4", "of the future"])
def test_starts_that_change_the_base_are_refused(bases, tmp_path, init):
    write(bases[False], tmp_path)
    edit(tmp_path, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{init}' is not supported.*plain LoRA in PEFT"):
        load_model(bases[False], adapter=tmp_path)


def test_training_goes_on_from_what_stood_beside(bases, tmp_path):
    """Three steps of SGD from the same adapter, in PEFT and here: embedding, head, biases, magnitudes and factors."""
    base = bases[False]
    write(base, tmp_path, bias="all", modules_to_save=["embed_tokens", "lm_head"], use_dora=True)
    model, other = load_model(base), theirs(base, tmp_path, is_trainable=True)
    load_adapter(model, tmp_path)
    before = model(IDS)
    losses = [[], []]
    for _ in range(3):
        for row, run, owner in ((losses[0], lambda: model(IDS), model), (losses[1], lambda: other(IDS).logits, other)):
            trained = [parameter for parameter in owner.parameters() if parameter.requires_grad]
            loss = torch.nn.functional.cross_entropy(run()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            with torch.no_grad():
                for parameter in trained:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
            row.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    save_adapter(model, tmp_path / "after")
    with torch.no_grad():
        assert relative(theirs(base, tmp_path / "after")(IDS).logits, other(IDS).logits) < 1e-5
        assert relative(model(IDS), before) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_in_peft(bases, tmp_path, tied):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(bases[tied])
    base.resize_token_embeddings(267)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    grown = peft.get_peft_model(base, config).eval()
    grown.save_pretrained(tmp_path)
    model = load_model(bases[tied], adapter=tmp_path)
    assert model.config.vocab_size == 267 and model.config.tie_embeddings == tied
    ids = IDS + 10
    with torch.no_grad():
        assert relative(model(ids), grown(ids).logits) < 1e-5
    save_adapter(model, tmp_path / "again")
    assert torch.equal(load_model(bases[tied], adapter=tmp_path / "again")(ids), model(ids))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.lm_head.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "adapter_model.safetensors")
    if not tied:
        with pytest.raises(
            CheckpointError, match="its vocabulary has 267 tokens instead of 260, for embedding or head"
        ):
            load_model(bases[tied], adapter=tmp_path)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_run_for_ever_is_ended(bases, tmp_path, field, monkeypatch):
    monkeypatch.setattr("minitune.checkpoint.adapter_config._SECONDS", 0.5)
    write(bases[False], tmp_path)
    pattern = r"(([a-z0-9_.]+)+)+!"
    edit(tmp_path, **{field: {pattern: 1} if field.endswith("pattern") else pattern})
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="takes too long to match; list the modules by name"):
        load_model(bases[False], adapter=tmp_path)
    assert time.monotonic() - start < 5


def test_all_misfits_are_listed_and_another_base_is_told(bases, tmp_path, capsys):
    write(bases[False], tmp_path, use_dora=True, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.{}"
    del tensors[stem.format(0, "lora_magnitude_vector")], tensors[stem.format(1, "lora_A.weight")]
    tensors[stem.format(0, "lora_B.weight")] = torch.zeros(9, 4)
    tensors[stem.format(7, "lora_B.weight")] = torch.zeros(9, 4)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(bases[False], adapter=tmp_path)
    for words in ("0.self_attn.q_proj.lora_magnitude_vector is missing", "1.self_attn.q_proj.lora_A.weight is missing",
                  "0.self_attn.q_proj.lora_B.weight is [9, 4] instead of [32, 4]",
                  "7.self_attn.q_proj.lora_B.weight is not part of this model"):  # fmt: skip
        assert words in str(caught.value)
    write(bases[False], tmp_path)
    edit(tmp_path, base_model_name_or_path="someone/another-model")
    load_adapter(load_model(bases[False]), tmp_path, "models/this-one")
    assert "says that its base is someone/another-model; it is put on models/this-one" in capsys.readouterr().err
    load_adapter(load_model(bases[False]), tmp_path, "here/Another-Model/")
    assert capsys.readouterr().err == ""


def test_a_tied_head_that_differs_from_its_embedding_is_refused(bases, tmp_path):
    write(bases[True], tmp_path, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    model = load_model(bases[True])
    with pytest.raises(CheckpointError, match="tied in this model, and differ in the file"):
        load_adapter(model, tmp_path)
    assert not lora_modules(model)
    tensors["base_model.model.lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="diverged: base_model.model.lm_head.weight holds a NaN"):
        load_adapter(model, tmp_path)
