"""Lower layers left alone, and rehearsal: what trains, what is saved, which rows come how often."""

import json

import pytest
import torch

from minitune.checkpoint.adapter import load_adapter
from minitune.checkpoint.load import load_model
from minitune.data.batching import mix, mixed_counts
from minitune.data.corpus import Encoding, Source, load_corpus
from minitune.errors import CheckpointError, ConfigError
from minitune.model.lora import linear_modules
from minitune.model.lora_config import LoRAConfig
from minitune.reporting.journal import read_metrics
from minitune.safetensors_io import read_tensors
from minitune.train import main
from minitune.training.config import LoRAOptions, TrainConfig
from minitune.training.run import choose_parameters, train
from tests.training.conftest import resumed


def chosen(folder, new=(), **options):
    model = load_model(folder, dtype=torch.float32)
    return choose_parameters(model, TrainConfig(data="x", **options).resolved(), new)


def test_of_full_fine_tuning_the_embedding_and_the_lower_layers_stay(tiny_model, tiny_folder, tmp_path):
    names = chosen(tiny_model, method="full", freeze_layers=1).keys()
    assert names == {name for name in chosen(tiny_model, method="full") if "layers.1." in name or "model.norm" in name}
    untied = tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    assert "lm_head.weight" in chosen(untied, method="full", freeze_layers=1)
    with pytest.raises(ConfigError, match="freeze_layers is 2; it must be below 2, the layers of the model"):
        chosen(tiny_model, method="full", freeze_layers=2)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_of_adapters_the_lower_layers_have_none(make_config, tiny_model, method):
    folder = train(make_config(method=method, freeze_layers=1)).folder
    names = read_tensors(folder / "adapter" / "adapter_model.safetensors")
    assert len(names) == 14 and all(".layers.1." in name for name in names)
    model = load_model(tiny_model)
    assert load_adapter(model, folder / "adapter").rank == 4
    have = {path for path, layer in linear_modules(model).items() if layer.lora is not None}
    assert len(have) == 7 and all("layers.1." in path for path in have)
    with pytest.raises(ConfigError, match="freeze_layers is 2"):
        chosen(tiny_model, method=method, freeze_layers=2)
    with pytest.raises(ConfigError, match="no linear layer is called 'layers.0.mlp.up_proj'"):
        chosen(tiny_model, freeze_layers=1, lora=LoRAOptions(target_modules=("v_proj", "layers.0.mlp.up_proj")))


def test_peft_reads_an_adapter_of_the_upper_layers(make_config, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = train(make_config(freeze_layers=1)).folder / "adapter"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
    ours = load_model(tiny_model, dtype=torch.float32)
    load_adapter(ours, folder)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.eval()(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 7


def test_of_a_loaded_adapter_the_lower_part_stays_as_it_is(make_config):
    first = train(make_config("first")).folder / "adapter"
    second = train(make_config("second", adapter=str(first), lora=LoRAOptions(), freeze_layers=1)).folder / "adapter"
    before, after = (read_tensors(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".layers.0." in name)


def test_new_tokens_train_though_the_embedding_does_not(tiny_model):
    parameters = chosen(tiny_model, method="full", freeze_layers=1, new=[260, 261])
    assert parameters["model.embed_tokens.weight"].trained_rows == (260, 261)


def test_a_share_is_of_all_rows_and_the_others_come_as_ever():
    """80 rows and a fifth of rehearsal make 100; two shares of an eighth and a half leave three eighths for 30 rows."""
    assert mixed_counts([80, 7], [None, None], [None, 0.2]) == [80, 20]
    assert mixed_counts([30, 100, 9], [None] * 3, [None, 0.125, 0.5]) == [30, 10, 40]
    assert mixed_counts([10, 30, 50], [3.0, 1.0, None], [None, None, 0.5]) == [30, 10, 40]
    assert mixed_counts([3, 50], [None, None], [None, 0.01]) == [3, 1]
    assert mixed_counts([5, 6], [None, None], [None, None]) == [5, 6]


@pytest.mark.parametrize(
    "weights,shares",
    [((None, 1.0), (None, 0.2)), ((None, None), (0.5, 0.5)), ((None, None), (None, 1.0)), ((None, None), (None, -0.1)),
     ((None, None), (0.4, 0.4)), ((None, None), (None, float("nan")))],
)  # fmt: skip
def test_shares_without_meaning_are_refused(weights, shares):
    with pytest.raises(ConfigError, match="share .* of data source"):
        mixed_counts([5, 5], weights, shares)


def test_every_epoch_rehearses_other_rows():
    sources = [(list(range(8)), None), (list(range(100, 110)), None)]
    epochs = [mix(sources, seed=0, epoch=epoch, shares=(None, 0.2)) for epoch in range(5)]
    assert all(sorted(epoch[:8]) == list(range(8)) and len(epoch) == 10 for epoch in epochs)
    assert sorted(row for epoch in epochs for row in epoch[8:]) == list(range(100, 110)), "each once before any twice"


def test_a_run_rehearses_and_says_so(make_config, rows, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text("\n".join(json.dumps({"text": f"general text number {n}"}) for n in range(30)))
    config = make_config(rehearsal=str(general), rehearsal_share=0.25, epochs=2.0, max_steps=None)
    folder = train(config).folder
    task, old = json.loads((folder / "data.json").read_text())
    assert (task["share"], old["share"], old["path"]) == (None, 0.25, str(general))
    assert task["validation_examples"] > 0 and (old["training_examples"], old["validation_examples"]) == (30, 0)
    with pytest.raises(CheckpointError, match="data file 2"):
        train(resumed(make_config(rehearsal=str(general), rehearsal_share=0.5, epochs=2.0, max_steps=None)))
    assert train(resumed(config)).status == "finished"


def test_rehearsal_is_a_source_with_a_share_of_a_fifth_by_default(tmp_path):
    config = TrainConfig(data="a.jsonl", rehearsal="b.jsonl").resolved()
    assert config.data == (Source("a.jsonl"), Source("b.jsonl", share=0.2)) and config.rehearsal is None
    assert config.resolved() == config


def test_a_source_that_is_all_held_out_does_not_move_the_shares(tiny_model, tmp_path):
    from minitune.checkpoint.load import load_tokenizer

    paths = []
    for name, count in (("one", 1), ("many", 40), ("general", 20)):
        paths.append(tmp_path / f"{name}.jsonl")
        rows = (json.dumps({"prompt": f"{name} {n}", "completion": "x"}) for n in range(count))
        paths[-1].write_text("\n".join(rows))
    files = [Source(str(path)) for path in paths[:2]] + [Source(str(paths[2]), share=0.5)]
    found = load_corpus(files, (), load_tokenizer(tiny_model), Encoding(64), held_out=0.999, seed=0)
    assert len(found.training) == len(found.shares) and found.shares[-1] == 0.5
    assert LoRAConfig().rank == 16 and len(found.training[-1][0]) == 20


def test_the_command_rehearses_prices_and_goes_on(tiny_model, rows, tmp_path, monkeypatch, capsys):
    """From the options, and again from what the run folder kept of them."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))
    general, run = tmp_path / "general.jsonl", tmp_path / "run"
    general.write_text("\n".join(json.dumps({"text": f"general text number {n}"}) for n in range(30)))
    options = f"--data {rows} --model {tiny_model} --output {run} --rehearsal {general} --max_steps 4 --max_length 128 "
    options += f"--penalty ewc --penalty.text {general} --penalty.tokens 300 --freeze_layers 1 --evaluation.samples 0"
    assert main(options.split()) == 0
    assert "EWC: Fisher information of 300 tokens" in capsys.readouterr().err
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert len(lines) == 4 and lines[0]["penalty"] == 0 < lines[-1]["penalty"]
    assert main(["--output", str(run), "--resume"]) == 0
    assert [line for line in read_metrics(run) if "loss" in line] == lines
