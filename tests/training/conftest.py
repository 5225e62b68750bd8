"""A tiny model on disk, a file of ragged rows, and runs of them, in this process or in a forked one."""

import dataclasses
import json
import os
import random
import signal
import threading

import pytest
import torch
from tqdm import tqdm

from minitune.reporting.journal import read_metrics
from minitune.training.config import CheckpointConfig, EvaluationConfig, LoRAOptions, TrainConfig
from minitune.training.run import train

WORDS = "red green blue one two three cat dog bird sun moon sky".split()
TIMES = ("seconds", "tokens_per_second", "target_tokens_per_second", "peak_rss_mb")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Forked children must not need threads, and bits must not depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A JSONL file of 48 questions with answers of 1 to 12 words."""
    path, draw = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)
    lines = []
    for number in range(48):
        answer = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        lines.append(json.dumps({"prompt": f"{draw.choice(WORDS)} {number}?", "completion": answer}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config_in(tiny_model, rows):
    """Return a function that makes the config of a run of 12 steps with dropout, in a given folder."""

    def make(folder, **changes):
        values = {
            "data": str(rows), "model": str(tiny_model), "output": str(folder), "max_steps": 12,
            "max_length": 128, "batch_size": 2, "accumulation_steps": 2, "validation_fraction": 0.2,
            "dtype": "float32", "device": "cpu", "lora": LoRAOptions(rank=4, dropout=0.1),
            "evaluation": EvaluationConfig(every_steps=4, samples=1, sample_tokens=4),
            "checkpoint": CheckpointConfig(every_steps=3),
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def make_config(config_in, tmp_path):
    """The same, in a folder of this test."""
    return lambda name="run", **changes: config_in(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def straight(config_in, tmp_path_factory):
    """The outcome of a run without interruption."""
    return outcome(train(config_in(tmp_path_factory.mktemp("straight") / "run")).folder)


def in_child(config, prepare=lambda: None):
    """Fork a process that calls `prepare` and trains; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.set_num_threads(torch.get_num_threads())  # a new pool after the fork, or loader threads race for it
            tqdm.set_lock(threading.RLock())  # forks share the one it has: killed holding it, all would wait
            prepare()
            result = train(config)
            code = 128 + result.signal if result.signal else 0
        finally:
            os._exit(code)
    return pid


def wait(pid):
    """Return a child's exit code, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resumed(config):
    return dataclasses.replace(config, resume=True)


def outcome(folder):
    """All that must be equal between two runs: result, last state, metrics without times."""
    states = sorted(path for path in (folder / "checkpoints").glob("step-*") if not path.suffix)
    state = json.loads((states[-1] / "state.json").read_text())
    state["progress"].pop("seconds")
    state["sha256"].pop("state")  # of the seconds, among others
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]
    (result,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return {"checkpoint": states[-1].name, "state": state, "metrics": lines, "result": result.read_bytes()}


KILLED = -signal.SIGKILL
