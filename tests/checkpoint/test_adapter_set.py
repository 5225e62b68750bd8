"""Several adapters on one base: each row of a batch gets what its adapter alone gives; sums are PEFT's."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.checkpoint.merge import merge
from minitune.decoding import generate, generate_ids, generate_texts
from minitune.errors import CheckpointError, ConfigError
from minitune.model.adapter_set import adapter_names, choose, chosen_rows, combine
from minitune.model.lora import adapter_disabled
from minitune.sampling import Sampling

IDS = torch.arange(4 * 9).view(4, 9) * 13 % 256
KINDS = {
    "plain": {"r": 3, "lora_alpha": 9},
    "other": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "wide": {"r": 8, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), attention_bias=True)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """One adapter of each kind, written by PEFT."""
    made = {}
    for seed, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**given))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def alone(base, folders):
    """Each adapter's logits by PEFT, and the base's."""
    found = {None: AutoModelForCausalLM.from_pretrained(base)(IDS).logits.detach()}
    for name, folder in folders.items():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        found[name] = model(IDS).logits.detach()
    return found


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def test_each_can_be_chosen_and_rows_can_differ(base, folders, alone):
    model = load_model(base, adapter=folders)
    assert adapter_names(model) == list(KINDS)
    assert relative(model(IDS), alone["plain"]) < 1e-5, "the first is on at once"
    for name, wanted in alone.items():
        choose(model, name)
        assert relative(model(IDS), wanted) < 1e-5
    choose(model, "dora")
    for names in (["plain", None, "dora", "pissa"], ["wide", "wide", "other", None], ["dora"] * 4, [None] * 4):
        with chosen_rows(model, names):
            logits = model(IDS)
            with adapter_disabled(model):
                assert relative(model(IDS), alone[None]) < 1e-6
        for row, name in enumerate(names):
            assert relative(logits[row], alone[name][row]) < 1e-5, (names, row)
    assert relative(model(IDS), alone["dora"]) < 1e-5, "the choice is as it was"


def test_a_batch_answers_each_prompt_as_its_adapter_alone(base, folders):
    """Prompts of many lengths with a long common start, rows that leave early, sampling; against one-adapter models."""
    model, tokenizer = load_model(base, adapter=folders), load_tokenizer(base)
    names = ["plain", None, "wide", "dora", "plain", "other", None, "pissa"]
    prompts = [list(range(20)) + [(7 * row + i) % 250 for i in range(row % 4)] for row in range(8)]
    options = {"max_new_tokens": 12, "end_ids": [5, 9, 33, 70, 101, 200, 13], "sampling": Sampling(temperature=1.0)}
    found = generate_ids(model, prompts, adapters=names, **options)
    for name in set(names):
        single = load_model(base, adapter=folders.get(name))
        wanted = generate_ids(single, prompts, **options)
        for row in (row for row in range(8) if names[row] == name):
            assert found[row] == wanted[row]
    assert len({len(ids) for ids in found}) > 1 and len({tuple(ids) for ids in found}) == 8
    texts = generate_texts(model, tokenizer, ["a", "a"], adapters=["plain", "wide"], max_new_tokens=8, raw=True)
    for text, name in zip(texts, ("plain", "wide"), strict=True):
        assert generate(model, tokenizer, "a", adapter=name, max_new_tokens=8, raw=True) == text.text
    assert texts[0].text != texts[1].text


@torch.no_grad()
@pytest.mark.parametrize("kind,names", [("cat", ["plain", "other", "wide"]), ("linear", ["plain", "other"])])
def test_weighted_sums_are_pefts(base, folders, kind, names, tmp_path):
    weights = dict(zip(names, (0.7, -0.4, 1.3), strict=False))
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(folders[name], adapter_name=name)
    theirs.add_weighted_adapter(names, [weights[name] for name in names], "sum", combination_type=kind)
    theirs.set_adapter("sum")
    wanted = theirs.eval()(IDS).logits
    model = load_model(base, adapter={name: folders[name] for name in names})
    combine(model, "sum", weights, kind=kind)
    assert relative(model(IDS), wanted) < 1e-5
    choose(model, names[0])
    assert relative(model(IDS), wanted) > 1e-2
    choose(model, "sum")
    save_adapter(model, tmp_path)
    assert relative(load_model(base, adapter=tmp_path)(IDS), wanted) < 1e-5
    merge(model)
    assert relative(model(IDS), wanted) < 1e-5 and adapter_names(model) == []


@torch.no_grad()
def test_a_concatenation_is_the_sum_of_the_updates(base, folders):
    """By definition, in fp64: W + sum of w s B A, layer by layer; PiSSA's start included."""
    weights = {"plain": 0.5, "pissa": -2.0}
    model = load_model(base, adapter=folders)
    layer = model.model.layers[1].mlp.up_proj
    updates = {name: layer.lora.get(name).merged(layer.weight).double() - layer.weight.double() for name in weights}
    combine(model, "sum", weights)
    wanted = layer.weight.double() + sum(weights[name] * updates[name] for name in weights)
    assert relative(layer.chosen.merged(layer.weight), wanted) < 1e-6


@torch.no_grad()
def test_only_the_chosen_one_is_merged_and_none_is_left(base, folders, alone, tmp_path):
    model = load_model(base, adapter=folders)
    choose(model, None)
    for call in (lambda: save_model(model, None, tmp_path / "x"), lambda: merge(model)):
        with pytest.raises(CheckpointError, match="merge it first|no adapter to merge"):
            call()
    choose(model, "other")  # which has no part in most layers
    merge(model)
    assert relative(model(IDS), alone["other"]) < 1e-5
    save_model(model, None, tmp_path / "merged")
    assert relative(load_model(tmp_path / "merged")(IDS), alone["other"]) < 1e-5


def test_what_cannot_be_put_together_is_refused(base, folders, tmp_path):
    model = load_model(base, adapter=folders)
    for call, words in (
        (lambda: choose(model, "plane"), "no adapter is called 'plane'; there are plain, .*did you mean 'plain'"),
        (lambda: combine(model, "sum", {"plain": 1, "dora": 1}), "has a DoRA"),
        (lambda: combine(model, "sum", {"plain": 1, "wide": 1}, kind="linear"), r"ranks \[3, 8\]; combine them by cat"),
        (lambda: combine(model, "sum", {"plain": 1}, kind="svd"), "cat or linear"),
        (lambda: combine(model, "plain", {"plain": 1}), "called 'plain' already"),
        (lambda: generate_ids(model, [[1], [2]], max_new_tokens=1, adapters=["plain"]), "1 names of adapters for 2"),
        (lambda: generate_ids(model, [[1]], max_new_tokens=1, adapters=["x"]), "no adapter is called 'x'"),
        (lambda: choose(load_model(base, adapter=folders["plain"]), None), "has no name by which to leave it out"),
        (lambda: load_model(base, adapter={"a.b": folders["plain"]}), "cannot be called 'a.b'"),
        (lambda: load_model(base, adapter={"keys": folders["plain"]}), "cannot be called 'keys'"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="brings its own lm_head.weight; such an adapter is loaded alone"):
        load_model(base, adapter={"plain": folders["plain"], "head": tmp_path})


def test_the_command_switches_by_prompt_and_sums(base, folders, tmp_path, capsys):
    from minitune.generate import main

    both = f"[plain={folders['plain']},wide={folders['wide']}]"
    common = ["--model", str(base), "--max_new_tokens", "6", "--dtype", "float32"]
    given = tmp_path / "in.jsonl"
    rows = [{"prompt": "a", "adapter": "plain"}, {"prompt": "a", "adapter": "wide"}, {"prompt": "a", "adapter": None}]
    given.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "a"}])))
    main([*common, "--adapter", both, "--use", "wide", "--input", str(given), "--output", str(tmp_path / "out.jsonl")])
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers[3] == answers[1] and len(set(answers[:3])) == 3
    capsys.readouterr()
    for name, answer in zip(("plain", "wide", None), answers, strict=False):
        main([*common, "--prompt", "a", *(["--adapter", str(folders[name])] if name else [])])
        assert capsys.readouterr().out == answer + "\n"
    model = load_model(base, adapter={name: folders[name] for name in ("plain", "wide")})
    combine(model, "sum", {"plain": 0.5, "wide": 0.25})
    main([*common, "--adapter", both, "--weights", "[0.5,0.25]", "--prompt", "a"])
    assert capsys.readouterr().out == generate(model, load_tokenizer(base), "a", max_new_tokens=6) + "\n"
    for options, words in (
        (["--adapter", both, "--use", "wade"], "did you mean 'wide'"),
        (["--adapter", both, "--weights", "[1.0]"], "1 weights for 2 adapters"),
        (["--adapter", both, "--weights", "[1.0,1.0]", "--use", "wide"], "leave one of them out"),
        (["--adapter", str(folders["plain"]), "--use", "wide"], "without several adapters"),
        (["--adapter", f"[{folders['plain']},{folders['wide']}]"], "several need a name each"),
    ):
        with pytest.raises(ConfigError, match=words):
            main([*common, "--prompt", "a", *options])


@torch.no_grad()
def test_export_merges_a_weighted_sum(base, folders, tmp_path, capsys):
    from minitune.export import main

    both = f"[plain={folders['plain']},pissa={folders['pissa']}]"
    common = ["--model", str(base), "--output", str(tmp_path / "merged"), "--adapter", both, "--merge"]
    with pytest.raises(ConfigError, match="several adapters are merged as their sum; give a weight each"):
        main(common)
    main([*common, "--weights", "[0.5,-1.0]"])
    model = load_model(base, adapter={name: folders[name] for name in ("plain", "pissa")})
    combine(model, "sum", {"plain": 0.5, "pissa": -1.0})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(merged(IDS).logits, model(IDS)) < 1e-5
    assert "of the update survived" in capsys.readouterr().out


def test_a_conversation_can_change_its_adapter(base, folders, monkeypatch, capsys):
    import builtins

    from minitune.generate import main

    said = iter(["/use wide", "a", "/use nobody", "/use base", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(said))
    both = f"[plain={folders['plain']},wide={folders['wide']}]"
    main(["--model", str(base), "--adapter", both, "--chat", "--max_new_tokens", "6", "--dtype", "float32"])
    captured = capsys.readouterr()
    model = load_model(base, adapter={"plain": folders["plain"], "wide": folders["wide"]})
    answer = generate(model, load_tokenizer(base), "a", adapter="wide", max_new_tokens=6)
    assert answer in captured.out and "(base answers now)" in captured.out
    assert "no adapter is called 'nobody'" in captured.err
