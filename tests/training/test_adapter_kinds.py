"""Whole runs with DoRA, PiSSA, modules trained whole and new tokens: what they save works in PEFT on the plain base."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError, ConfigError
from minitune.generate import main as generate
from minitune.model.lora import adapter_disabled, add_lora, quantized_weights
from minitune.model.lora_config import LoRAConfig
from minitune.model.vocabulary import add_rows, trained_rows
from minitune.reporting.journal import read_metrics
from minitune.training.config import EvaluationConfig, LoRAOptions, PreferenceOptions, TrainConfig
from minitune.training.run import train

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256
KINDS = {
    "dora": LoRAOptions(rank=4, dora=True, dropout=0.1),
    "pissa": LoRAOptions(rank=4, init="pissa"),
    "pissa, few rounds, rslora": LoRAOptions(rank=4, init="pissa_niter_4", rslora=True),
    "dora from pissa": LoRAOptions(rank=4, init="pissa", dora=True, target_modules=("q_proj", "down_proj")),
    "embedding": LoRAOptions(rank=4, modules_to_save="embed_tokens"),
}


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Rows that use two tokens of their own."""
    path = tmp_path_factory.mktemp("talk") / "rows.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "<tool>" + "yes " * (i % 5) + "</tool>"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def in_peft(base, adapter, size=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if size:
        model.resize_token_embeddings(size)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_saves_what_peft_reads_on_the_plain_base(make_config, tiny_model, kind):
    with torch.enable_grad():
        result = train(make_config(lora=KINDS[kind])).result
    ours = load_model(tiny_model, adapter=result)
    assert relative(ours(IDS), in_peft(tiny_model, result)(IDS).logits) < 1e-5
    assert relative(ours(IDS), load_model(tiny_model)(IDS)) > 1e-3
    fields = json.loads((result / "adapter_config.json").read_text())
    assert fields["r"] == (8 if "pissa" in kind else 4) and fields["init_lora_weights"] is True
    wanted = ours(IDS)
    merge(ours)
    assert relative(ours(IDS), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_alone_saved_and_read_by_others(make_config, tiny_folder, tmp_path, talk, tied):
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    names = ("<tool>", "</tool>")
    config = make_config(data=str(talk), model=str(base), new_tokens=names, max_steps=8)
    with torch.enable_grad():
        result = train(config).result
    before, ours = load_model(base), load_model(base, adapter=result)
    assert ours.config.vocab_size == 262 and ours.config.tie_embeddings == tied
    for old, new in ((before.model.embed_tokens, ours.model.embed_tokens), (before.lm_head, ours.lm_head)):
        if old is not None:
            assert torch.equal(new.weight[:260], old.weight), "a row that was there has moved"
            drawn = load_model(base)
            add_rows(drawn, [260, 261], seed=0)
            table = drawn.model.embed_tokens if old is before.model.embed_tokens else drawn.lm_head
            assert (new.weight[260:] - table.weight[260:]).abs().min() > 1e-6, "a new row has not been trained"
    theirs = in_peft(base, result, 262)
    ids = IDS + 6
    assert relative(ours(ids), theirs(ids).logits) < 1e-5
    for tokenizer in (load_tokenizer(base, adapter=result), AutoTokenizer.from_pretrained(result)):
        found = tokenizer.encode("a<tool>b</tool>")
        assert found == [*tokenizer.encode("a"), 260, *tokenizer.encode("b"), 261]
    merge(ours)
    save_model(ours, load_tokenizer(base, adapter=result), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 262 and relative(merged(ids).logits, theirs(ids).logits) < 1e-5
    more = {"data": str(talk), "model": str(base), "lora": LoRAOptions()}
    with torch.enable_grad():
        again = train(make_config("again", adapter=str(result), max_steps=2, **more)).result
    later = load_model(base, adapter=again)
    assert later.config.vocab_size == 262 and trained_rows(later) == (260, 261)
    models = (before, load_model(base, adapter=result), later)
    for old, first, new in zip(*((m.model.embed_tokens, m.lm_head) for m in models), strict=True):
        if old is not None:
            assert torch.equal(new.weight[:260], old.weight), "a row that was there moved in the second run"
            assert not torch.equal(new.weight[260:], first.weight[260:])
    with torch.enable_grad():
        more_tokens = train(make_config("more", adapter=str(result), new_tokens="<more>", max_steps=2, **more)).result
    assert trained_rows(load_model(base, adapter=more_tokens)) == (260, 261, 262)
    last = load_model(base, adapter=more_tokens).model.embed_tokens.weight
    assert torch.equal(last[:260], before.model.embed_tokens.weight)
    assert load_tokenizer(base, adapter=again).encode("<tool>") == [260]
    generate(["--model", str(base), "--adapter", str(again), "--prompt", "1?", "--max_new_tokens", "3"])
    with pytest.raises(ConfigError, match="the new token '<tool>' is there already"):
        train(make_config("third", adapter=str(again), new_tokens="<tool>", **more))


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_runs_over_a_quantised_base(make_config, tiny_model, kind):
    """The result is the same over the stored 4 bits and over what they decode to, in PEFT; and merges."""
    options = {"rank": 4, "dora": True} if kind == "dora" else {"rank": 4, "init": "pissa"}
    result = train(make_config(method="qlora", lora=LoRAOptions(**options))).result
    ours = load_model(tiny_model, adapter=result, quantize="auto")
    decoded = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for path, weight in quantized_weights(ours).items():
            decoded.get_submodule(path).weight.copy_(weight.dequantize(torch.float32))
        theirs = peft.PeftModel.from_pretrained(decoded, result).eval()
        wanted = theirs(IDS).logits
        assert quantized_weights(ours) and relative(ours(IDS), wanted) < 1e-5
        with theirs.disable_adapter(), adapter_disabled(ours):
            assert relative(ours(IDS), theirs(IDS).logits) < 1e-5 < relative(ours(IDS), wanted)
        merge(ours)
        assert relative(ours(IDS), wanted) < 1e-5


def test_a_full_run_with_new_tokens_writes_a_larger_model(make_config, tiny_model, talk):
    result = train(
        make_config(method="full", lora=LoRAOptions(), data=str(talk), new_tokens="<tool>", max_steps=2)
    ).result
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.vocab_size == 261 and AutoTokenizer.from_pretrained(result).encode("<tool>") == [260]


def test_a_resumed_run_of_every_kind_goes_on_as_it_was(make_config, talk):
    """Six steps and six more after a stop are the twelve of a run without one, bit by bit."""
    from minitune.training import outcome as module

    options = {"lora": LoRAOptions(rank=4, dora=True, init="pissa"), "data": str(talk), "new_tokens": "<tool>",
               "max_steps": 6}  # fmt: skip
    straight = train(make_config("straight", **options)).result
    fit = module.fit

    def interrupted(job, stop):
        step = job.optimizer.step

        def counted(rate):
            step(rate)
            if job.optimizer.steps == 3:
                stop.number = 15

        job.optimizer.step = counted
        return fit(job, stop)

    module.fit = interrupted
    try:
        assert train(make_config("stopped", **options)).status == "stopped"
    finally:
        module.fit = fit
    resumed = train(make_config("stopped", **options, resume=True)).result
    files = [load_file(folder / "adapter_model.safetensors") for folder in (straight, resumed)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_the_reference_of_a_preference_is_made_first_where_training_changes_the_base():
    plain = TrainConfig(data="x", objective="dpo")
    for options in ({"new_tokens": "<a>"}, {"lora": LoRAOptions(modules_to_save=("embed_tokens",))}):
        changed = TrainConfig(data="x", objective="dpo", **options)
        assert changed.resolved().precomputes and not plain.resolved().precomputes
    kinds = LoRAOptions(dora=True, init="pissa")
    assert not TrainConfig(data="x", objective="dpo", lora=kinds).resolved().precomputes
    assert TrainConfig(data="x", objective="dpo", preference=PreferenceOptions(precompute=True)).resolved().precomputes


def test_dpo_over_new_tokens_starts_undecided_with_every_seed(make_config, tmp_path, monkeypatch):
    """ln 2 by the loss's definition where policy and reference are one, so also where the rows were drawn anew."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path))
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "<a>" * (1 + i % 5), "rejected": "no " * (1 + i % 3)} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    kinds = LoRAOptions(rank=2, dora=True, init="pissa")
    options = {"data": str(path), "validation": str(path), "validation_fraction": None, "objective": "dpo",
               "max_steps": 2, "lora": kinds, "evaluation": EvaluationConfig(samples=0)}  # fmt: skip
    for name, changes in {
        "first": {"new_tokens": "<a>"},
        "second": {"new_tokens": "<a>", "seed": 1},
        "none": {},
    }.items():
        train(make_config(name, **options, **changes))
        losses = [line["validation_loss"] for line in read_metrics(tmp_path / name) if "validation_loss" in line]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize(
    "options,words",
    [
        ({"new_tokens": "<a>", "method": "last_layers", "lora": LoRAOptions()}, "method last_layers would never train"),
        ({"new_tokens": "<a>", "lora": LoRAOptions(modules_to_save="embed_tokens")}, "leave one out"),
        ({"new_tokens": ("<a>", "<a>")}, "'<a>' is there already"),
        ({"new_tokens": " "}, "is empty"),
        ({"lora": LoRAOptions(modules_to_save="lm_head")}, "no module 'lm_head' has weights"),
        ({"lora": LoRAOptions(modules_to_save="q_proj")}, "'q_proj' has an adapter; leave it out of lora.target"),
        ({"lora": LoRAOptions(init="svd")}, "lora.init is 'svd'"),
        ({"lora": LoRAOptions(init="pissa", rank=33)}, "has 16 components|has 32 components"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_anything_is_written(make_config, options, words):
    with pytest.raises(ConfigError, match=words):
        train(make_config(**options))


def test_an_adapter_with_some_trained_biases_is_refused(tiny_folder, tmp_path):
    from minitune.checkpoint.adapter import save_adapter

    model = load_model(tiny_folder(tmp_path / "base", attention_bias=True))
    add_lora(model, LoRAConfig(rank=2))
    model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    with pytest.raises(CheckpointError, match="some biases train and some do not"):
        save_adapter(model, tmp_path / "adapter")


def test_a_new_token_that_no_row_has_is_named(make_config, tiny_model, talk, capsys):
    train(make_config(data=str(talk), new_tokens=("<tool>", "<tol>"), max_steps=1))
    said = capsys.readouterr().err + capsys.readouterr().out
    assert "no training row has '<tol>'" in said and "'<tool>'" not in said.split("no training row has")[1]
