"""Interrupted anywhere, a run ends with the bits of one that was not: weights, optimiser, random state, metrics."""

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from minitune import files, load_model
from minitune.errors import CheckpointError
from minitune.reporting import report
from minitune.reporting.journal import read_metrics
from minitune.training import loop, state
from minitune.training.config import CheckpointConfig, LoRAOptions, OptimizerConfig, Source
from minitune.training.run import train
from tests.training.conftest import KILLED, in_child, outcome, resumed, wait


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes a third of these runs."""
    monkeypatch.setattr(report, "plot_losses", lambda *_: False)


def config_folder(config):
    return Path(config.output)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(module, name, number, act):
    """Return a function that makes the `number`-th call of `module.name` run `act` first."""

    def prepare():
        original, calls = getattr(module, name), [0]

        def counted(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                act(*arguments)
            return original(*arguments, **options)

        setattr(module, name, counted)

    return prepare


def half_a_file(path, tensors):
    """Write half of what should be written, then die."""
    state_writer(path, tensors)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


state_writer = state.write_tensors


def test_every_step_and_evaluation_is_recorded_once(straight):
    assert [line["step"] for line in straight["metrics"] if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in straight["metrics"] if "validation_loss" in line] == [0, 4, 8, 12]


def test_two_runs_agree_and_another_seed_does_not(make_config, straight):
    assert outcome(train(make_config("again")).folder) == straight
    assert outcome(train(make_config("other", seed=1)).folder)["result"] != straight["result"]


# A window has two micro-batches, so odd numbers of finished micro-batches lie inside one.
@pytest.mark.parametrize("micro_batch", [1, 2, 8, 13, 22])
def test_killed_between_micro_batches(make_config, straight, micro_batch):
    config = make_config()
    assert wait(in_child(config, before_call(loop, "_accumulate", micro_batch, lambda *_: die()))) == KILLED
    assert outcome(train(resumed(config)).folder) == straight


RUNS = {
    "full in bf16, rounded stochastically": {"method": "full", "dtype": "bfloat16", "lora": LoRAOptions()},
    "last layers": {"method": "last_layers", "last_layers": 1, "lora": LoRAOptions()},
    "LoRA+ over bf16, padded": {"dtype": "bfloat16", "packing": False, "lora": LoRAOptions(plus_ratio=4.0)},
    "checkpointing, mixture": {"gradient_checkpointing": True, "epochs": 3.0, "max_steps": None},
}


@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_run_resumes_inside_a_window(make_config, rows, kind):
    changes = dict(RUNS[kind])
    if "mixture" in kind:
        changes["data"] = (Source(str(rows), weight=3.0), Source(str(rows), weight=1.0))
    expected = outcome(train(make_config("straight", **changes)).folder)
    config = make_config(**changes)
    stop = before_call(loop, "_accumulate", 9, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert wait(in_child(config, stop)) == 143
    assert outcome(train(resumed(config)).folder) == expected


# Calls of write_tensors: 1 to 3 for the checkpoint of step 3, 4 for the best weights of step 4, 5 to 7 for step 6.
SAVES = {
    "before the first file": (state, "write_tensors", 5, lambda *_: die()),
    "in the middle of a file": (state, "write_tensors", 6, half_a_file),
    "before the state": (state, "file_sha256", 6, lambda *_: die()),
    "before the rename": (files, "_replace_folder", 3, lambda *_: die()),
    "after the rename": (state, "_prune", 2, lambda *_: die()),
    "inside the best weights": (state, "write_tensors", 4, half_a_file),
}


@pytest.mark.parametrize("place", SAVES)
def test_killed_inside_a_save(make_config, straight, place):
    config = make_config()
    assert wait(in_child(config, before_call(*SAVES[place]))) == KILLED
    if place != "after the rename":
        assert not (config_folder(config) / "checkpoints" / "step-0000006").exists()
    assert outcome(train(resumed(config)).folder) == straight
    assert not list((config_folder(config) / "checkpoints").glob(".*")), "leftovers of the dead writer"


def test_killed_while_it_prints(make_config, straight):
    config = make_config()
    assert wait(in_child(config, before_call(sys.stderr, "write", 5, lambda *_: die()))) == KILLED
    assert outcome(train(resumed(config)).folder) == straight


def test_killed_at_random_moments_again_and_again(make_config, straight):
    config, draw, kills = make_config(), random.Random(7), 0
    began = time.monotonic()
    while kills < 8 and time.monotonic() - began < 30:
        first = not (config_folder(config) / "config.yaml").exists()
        pid = in_child(config if first else resumed(config))
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)
        kills += 1
        if wait(pid) != KILLED:
            break
    begun = (config_folder(config) / "config.yaml").exists()  # on a busy machine, all may have died before that
    assert outcome(train(resumed(config) if begun else config).folder) == straight


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("micro_batch", [4, 7])
def test_a_signal_saves_and_exits_with_its_code(make_config, straight, number, code, micro_batch):
    config = make_config()
    act = before_call(loop, "_accumulate", micro_batch, lambda *_: os.kill(os.getpid(), number))
    assert wait(in_child(config, act)) == code
    step, micro = divmod(micro_batch, 2)
    name = f"step-{step:07d}" + (f"-{micro:02d}" if micro else "")
    assert (config_folder(config) / "checkpoints" / name).is_dir(), "the micro-batch is finished, then all is saved"
    assert outcome(train(resumed(config)).folder) == straight


def test_a_signal_during_evaluation_is_heard_before_its_end(make_config, straight):
    config = make_config()
    act = before_call(loop, "validation_loss", 2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert wait(in_child(config, act)) == 143
    assert [line["step"] for line in read_metrics(config_folder(config)) if "validation_loss" in line] == [0]
    assert outcome(train(resumed(config)).folder) == straight


def test_a_finished_run_resumed_changes_nothing(make_config, straight):
    config = make_config()
    train(config)
    assert outcome(train(resumed(config)).folder) == straight


DAMAGES = [
    ("weights.safetensors", "truncated"),
    ("weights.safetensors", "one bit"),
    ("optimizer.safetensors", "one bit"),
    ("window.safetensors", "missing"),
    ("state.json", "truncated"),
    ("state.json", "missing"),
]


@pytest.mark.parametrize("file,damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(make_config, straight, file, damage, capfd):
    config = make_config()
    assert wait(in_child(config, before_call(loop, "_accumulate", 20, lambda *_: die()))) == KILLED
    path = config_folder(config) / "checkpoints" / "step-0000009" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "one bit" else content[:-9])
    if damage == "missing":
        path.unlink()
    assert outcome(train(resumed(config)).folder) == straight
    said = capfd.readouterr().err
    assert str(path) in said and "step-0000006" in said


def test_a_run_whose_every_checkpoint_is_damaged_is_not_begun_again_in_silence(make_config):
    config = make_config(max_steps=6)
    train(config)
    folders = sorted((config_folder(config) / "checkpoints").glob("step-*"))
    assert len(folders) == 2
    for folder in folders:
        (folder / "state.json").write_text("{")
    for _ in range(2):  # also the next time: nothing was moved away
        with pytest.raises(CheckpointError, match=f"{folders[-1] / 'state.json'} is .*damaged.*--overwrite"):
            train(resumed(config))
        assert sorted((config_folder(config) / "checkpoints").glob("step-*")) == folders
    assert train(dataclasses.replace(config, overwrite=True)).status == "finished"


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(make_config, straight, capfd):
    config = make_config()
    assert wait(in_child(config, before_call(loop, "_accumulate", 2, lambda *_: die()))) == KILLED
    assert outcome(train(resumed(config)).folder) == straight
    assert "no complete checkpoint yet; beginning from step 0" in capfd.readouterr().err


def test_checkpoints_are_ordered_by_number(tmp_path):
    """By name, 100 micro-batches would come before 99, and step 10,000,000 before 9,999,999."""
    expected = []
    for step, micros in ((0, (99, 100)), (7, (0, 1, 20, 100, 1000)), (9_999_999, (0,)), (10_000_000, (0, 3))):
        for micro in micros:
            expected.append(tmp_path / state.Progress(step=step, micro=micro).name)
            expected[-1].mkdir()
    for other in ("step-0000009.refused", "step-x", ".step-0000001.tmp-1-00000000", "best-0000003"):
        (tmp_path / other).mkdir()
    assert state.checkpoints(tmp_path) == expected
    assert sorted(expected) != expected, "the names alone do not sort"


CHANGES = {
    "optimizer.learning_rate": {"optimizer": OptimizerConfig(learning_rate=0.01)},
    "lora.rank": {"lora": LoRAOptions(rank=2, dropout=0.1)},
    "accumulation_steps": {"accumulation_steps": 1},
    "seed": {"seed": 1},
    "max_length": {"max_length": 200},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_option_is_refused_by_name(make_config, field):
    config = make_config(max_steps=3)
    train(config)
    with pytest.raises(CheckpointError, match=field.replace(".", r"\.")):
        train(dataclasses.replace(resumed(config), **CHANGES[field]))


def test_changed_data_and_another_model_are_refused(make_config, rows, tiny_folder, tmp_path):
    config = make_config(max_steps=3)
    train(config)
    other_rows = tmp_path / "other.jsonl"
    other_rows.write_text(rows.read_text() + '\n{"prompt": "new?", "completion": "row"}')
    with pytest.raises(CheckpointError, match="data file 1"):
        train(dataclasses.replace(resumed(config), data=str(other_rows)))
    other = tiny_folder(tmp_path / "other", initializer_range=0.3)
    with pytest.raises(CheckpointError, match="base model"):
        train(dataclasses.replace(resumed(config), model=str(other)))


def test_a_changed_tokenizer_is_refused(make_config, tiny_folder, tmp_path):
    config = make_config(max_steps=3, model=str(tiny_folder(tmp_path / "model")))
    train(config)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tokenised data"):
        train(resumed(config))


def test_moved_data_and_more_checkpoints_are_no_change(make_config, rows, tmp_path, straight):
    config = make_config()
    assert wait(in_child(config, before_call(loop, "_accumulate", 13, lambda *_: die()))) == KILLED
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    changes = {"data": str(moved), "checkpoint": CheckpointConfig(every_steps=1, keep=5)}
    ours = outcome(train(dataclasses.replace(resumed(config), **changes)).folder)
    assert ours["result"] == straight["result"] and ours["metrics"] == straight["metrics"]


def test_a_resumed_run_may_ask_more_samples(make_config):
    config = make_config()
    assert wait(in_child(config, before_call(loop, "_accumulate", 13, lambda *_: die()))) == KILLED
    more = dataclasses.replace(config.evaluation, samples=2)
    folder = train(dataclasses.replace(resumed(config), evaluation=more)).folder
    assert (folder / "report.md").read_text().count("not asked") == 1


def test_a_checkpoint_holds_only_what_trains_and_no_pickle(make_config):
    folder = train(make_config()).folder
    (last,) = (folder / "checkpoints").glob("step-0000012")
    assert sorted(p.name for p in last.iterdir()) == [
        "optimizer.safetensors", "state.json", "weights.safetensors", "window.safetensors"
    ]  # fmt: skip
    weights = state.read_tensors(last / "weights.safetensors")
    assert weights and all(".lora." in name for name in weights)
    assert "base model" in json.loads((last / "state.json").read_text())["fingerprint"]
    assert [p.name for p in sorted((folder / "checkpoints").glob("step-*"))] == ["step-0000009", "step-0000012"]


def test_the_base_is_another_one_where_its_arithmetic_is(tiny_model):
    """Equal weights under another config.json are another model, whatever its special ids."""
    model = load_model(tiny_model)
    before, config = state.base_fingerprint(model), model.config
    model.config = dataclasses.replace(config, logits_softcap=30.0)
    assert state.base_fingerprint(model) != before
    model.config = dataclasses.replace(config, pad_id=None, eos_ids=())
    assert state.base_fingerprint(model) == before
