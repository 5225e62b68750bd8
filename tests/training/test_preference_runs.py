"""Whole runs on preferences: every objective by every method from files to a result, resumed bit by bit, errors."""

import dataclasses
import json
import os
import random
import signal

import pytest

from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.reporting.journal import read_metrics
from minitune.training import run, state
from minitune.training.config import (
    OBJECTIVES,
    CheckpointConfig,
    EvaluationConfig,
    LoRAOptions,
    OptimizerConfig,
    PreferenceOptions,
)
from minitune.training.run import train
from tests.training.conftest import KILLED, WORDS, in_child, outcome, resumed, wait


@pytest.fixture(scope="session")
def preference_rows(tmp_path_factory):
    """Return files of 30 pairs, whose chosen answers are colours, and of the same answers judged one by one."""
    folder, draw = tmp_path_factory.mktemp("preferences"), random.Random(0)
    pairs, judged = [], []
    for number in range(30):
        prompt = f"{draw.choice(WORDS)} {number}?"
        good = " ".join(draw.choices(("red", "green", "blue"), k=draw.randint(1, 5)))
        bad = " ".join(draw.choices(("cat", "dog", "bird"), k=draw.randint(1, 5)))
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        judged += [{"prompt": prompt, "completion": text, "label": text == good} for text in (good, bad)]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"pairs": str(folder / "pairs.jsonl"), "kto": str(folder / "judged.jsonl")}


@pytest.fixture
def preference_config(make_config, preference_rows, tmp_path, monkeypatch):
    """Return a function that makes the config of a short run; a kept reference goes to this test's folder."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))

    def make(objective, name="run", **changes):
        data = preference_rows.get(objective, preference_rows["pairs"])
        values = {
            "data": data,
            "objective": objective,
            "max_steps": 4,
            "optimizer": OptimizerConfig(learning_rate=5e-3),
        }
        values |= {"evaluation": EvaluationConfig(every_steps=2, samples=1, sample_tokens=4)}
        return make_config(name, **{**values, **changes})

    return make


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sft"])
def test_every_objective_learns_what_is_chosen(preference_config, objective):
    result = train(preference_config(objective, max_steps=12))
    lines = read_metrics(result.folder)
    first, *_, last = [line for line in lines if "validation_loss" in line]
    assert last["validation_loss"] < first["validation_loss"]
    if objective != "kto":  # whose sides are no pairs
        assert last["validation_margin"] > first["validation_margin"]
    if objective not in ("kto", "cpo"):  # the latter begins from sums, by which short answers win
        assert last["validation_accuracy"] >= 0.75
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["target_tokens"] > 12 * 4, "tokens are counted, not pairs"
    report = (result.folder / "report.md").read_text(encoding="utf-8")
    assert report.startswith(f"# {objective}, lora, of") and "reward of chosen answers" in report
    assert ("minitune.score" in report) == (objective == "reward")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["full", "last_layers", "qlora"])
@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_every_method(preference_config, tiny_model, objective, method, packing):
    lora = LoRAOptions(rank=4) if method == "qlora" else LoRAOptions()
    result = train(preference_config(objective, method=method, lora=lora, packing=packing))
    model = load_model(tiny_model, adapter=result.result) if method == "qlora" else load_model(result.result)
    assert model.config.reward == (objective == "reward")


@pytest.mark.parametrize("objective, method", [("dpo", "lora"), ("kto", "full"), ("reward", "lora")])
def test_killed_and_resumed_is_the_same_bit_for_bit(preference_config, monkeypatch, objective, method):
    lora = LoRAOptions(rank=4, dropout=0.1) if method == "lora" else LoRAOptions()
    changes = {"method": method, "lora": lora, "checkpoint": CheckpointConfig(every_steps=1), "max_steps": 5}
    straight = outcome(train(preference_config(objective, "straight", **changes)).folder)
    config = preference_config(objective, "killed", **changes)

    def kill_at_the_third():
        save = state.save_checkpoint

        def then_die(root, parameters, optimizer, progress, *rest):
            save(root, parameters, optimizer, progress, *rest)
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("minitune.training.loop.save_checkpoint", then_die)

    assert wait(in_child(config, kill_at_the_third)) == KILLED
    assert outcome(train(resumed(config)).folder) == straight


def test_an_adapter_that_goes_on_is_compared_with_itself(preference_config, tiny_model):
    """The reference of a run that starts from an adapter is the model with that adapter, not the base."""
    first = train(preference_config("dpo", "first"))
    again = dict(adapter=str(first.result), lora=LoRAOptions(), max_steps=1)
    result = train(preference_config("dpo", "second", **again))
    start = next(line for line in read_metrics(result.folder) if "validation_loss" in line)
    assert start["validation_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert start["validation_margin"] == pytest.approx(0, abs=1e-5)
    assert list((result.folder.parent / "weights" / "reference").glob("*.safetensors"))


def test_a_fresh_adapter_over_a_kept_reference_is_the_same_run(preference_config):
    """Switched off or kept, the reference says the same to 1e-5."""
    runs = [
        train(preference_config("dpo", name, preference=PreferenceOptions(precompute=kept)))
        for name, kept in (("off", None), ("kept", True))
    ]
    off, kept = ([line["loss"] for line in read_metrics(result.folder) if "loss" in line] for result in runs)
    assert kept == pytest.approx(off, abs=1e-5)


def test_the_wrong_model_for_the_objective(preference_config, tiny_model):
    reward = train(preference_config("reward", "reward", method="full", lora=LoRAOptions())).result
    with pytest.raises(ConfigError, match="is a reward model; objective dpo needs a language model"):
        train(preference_config("dpo", "a", model=str(reward)))
    adapter = train(preference_config("reward", "adapter")).result
    with pytest.raises(ConfigError, match="a reward model's adapter, not one for objective dpo"):
        train(preference_config("dpo", "b", adapter=str(adapter), lora=LoRAOptions()))
    plain = train(preference_config("dpo", "c")).result
    with pytest.raises(ConfigError, match="a language model's adapter, not one for objective reward"):
        train(preference_config("reward", "d", adapter=str(plain), lora=LoRAOptions()))
    with pytest.raises(CheckpointError, match="no reward head"):
        load_model(reward, adapter=plain)


def test_the_reference_cache_of_another_model(preference_config, tiny_folder, tmp_path):
    cache = str(tmp_path / "cache.safetensors")
    options = {"method": "full", "lora": LoRAOptions(), "preference": PreferenceOptions(reference_cache=cache)}
    train(preference_config("dpo", "a", **options))
    other = tiny_folder(tmp_path / "other", hidden_size=16)
    with pytest.raises(CheckpointError, match="another model; delete the file, or give another preference.reference_"):
        train(preference_config("dpo", "b", model=str(other), **options))


def test_the_wrong_data_for_the_objective(preference_config, preference_rows):
    with pytest.raises(DataError, match="--objective dpo"):
        train(preference_config("sft", data=preference_rows["pairs"]))
    with pytest.raises(DataError, match="--objective kto"):
        train(preference_config("dpo", data=preference_rows["kto"]))


def test_a_diverging_run_stops(preference_config, monkeypatch):
    """A loss that was below that of a model without preference and then stays far above it ends the run."""
    from minitune.errors import TrainingError

    losses = iter([0.5, 0.5] + [9.0] * 50)

    def objective(kind, options):
        right = run_objective(kind, options)

        def broken(model, batch):
            loss, weight, metrics = right(model, batch)
            return loss * 0 + next(losses) * weight if model.training else loss, weight, metrics

        return broken

    run_objective = run.preference_objective
    monkeypatch.setattr(run, "preference_objective", objective)
    with pytest.raises(TrainingError, match="the run diverged: the loss is 9.00"):
        train(dataclasses.replace(preference_config("dpo"), max_steps=20))
