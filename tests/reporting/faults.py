"""Runs with one fault each, and clean ones, of a tiny model that has learned its language first.

A world is a drawn language: words, an answer to each, and a model trained to speak it, but with random answers. What a
run then learns is which answer belongs to which word. The thresholds of the doctor were set on worlds of other seeds
and sizes (`python -m tests.reporting.faults 11 48`) than the tests have.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minitune.data import examples
from minitune.errors import MinituneError
from minitune.reporting.diagnosis import diagnose
from minitune.reporting.record import read_run
from minitune.training import run
from minitune.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoRAOptions,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from tests.conftest import tiny_folder

Rows = list[dict[str, Any]]
SAMPLED = ("memorised", "memorised2", "forgot", "dozen", "leaked", "masked")
OLD, NEW = {"role": "user"}, {"role": "assistant"}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [OLD | {"content": question}, NEW | {"content": answer}]}


@dataclasses.dataclass
class World:
    """A language, a model that speaks it, and a folder for runs."""

    seed: int
    folder: Path
    model: Path

    def __post_init__(self):
        draw = random.Random(self.seed)
        lengths = (draw.randint(3, 6) for _ in range(40))
        words = ("".join(draw.choice("aeiou" if i % 2 else "bdfgklmnprst") for i in range(n)) for n in lengths)
        self.words = list(dict.fromkeys(words))
        self.keys, self.values = self.words[:6], self.words[6:]
        self.answers = {key: " ".join(draw.sample(self.values, 2)) for key in self.keys}

    def draw(self, *name) -> random.Random:
        return random.Random(f"{self.seed}:{name}")

    def question(self, draw: random.Random) -> tuple[str, str]:
        key = draw.choice(self.keys)
        return key, f"{key} {draw.randint(0, 99999)}?"

    def rows(self, count: int, name: str = "rows", answer: Callable[[random.Random, str], str] | None = None) -> Rows:
        """Chats in which the answer follows from the first word, or is what `answer` draws for it."""
        draw = self.draw(name)
        found = []
        for _ in range(count):
            key, question = self.question(draw)
            found.append(chat(question, answer(draw, key) if answer else self.answers[key]))
        return found

    def text(self, sentences: int, name: str = "text") -> str:
        draw = self.draw(name)
        return "".join(f"{' '.join(draw.choices(self.values, k=draw.randint(3, 6)))}. " for _ in range(sentences))

    def write(self, name: str, rows: Rows | str) -> str:
        path = self.folder / name
        content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(content, encoding="utf-8")
        return str(path)

    def config(self, name: str, rows: Rows | str, **changes: Any) -> TrainConfig:
        """A run that learns well, but for `changes`; `rate`, `steps`, `samples`, `general` are short for options."""
        rate, steps = changes.pop("rate", 1e-2), changes.pop("steps", None)
        optimizer = {"learning_rate": rate, **changes.pop("optimizer", {})}
        evaluation = {
            "samples": 2 if name in SAMPLED or name.startswith("c-") else 0,
            "sample_tokens": 28,
            **changes.pop("evaluation", {}),
        }
        suffix = "txt" if isinstance(rows, str) else "jsonl"
        values = {
            "model": str(self.model), "data": self.write(f"{name}.{suffix}", rows), "output": str(self.folder / name),
            "max_length": 128, "batch_size": 4, "accumulation_steps": 1, "validation_fraction": 0.2,
            "epochs": None if steps else 3.0, "max_steps": steps, "dtype": "float32", "device": "cpu", "threads": 1,
            "lora": LoRAOptions(rank=8), "optimizer": OptimizerConfig(**optimizer),
            "evaluation": EvaluationConfig(**evaluation), "checkpoint": CheckpointConfig(every_steps=1000),
            "seed": self.seed,
        }  # fmt: skip
        if changes.get("method") in ("full", "last_layers", "pattern"):
            del values["lora"]
        if "validation" in changes:
            del values["validation_fraction"]
        return TrainConfig(**{**values, **changes})


def make_world(tiny_folder: Callable, folder: Path, seed: int, hidden: int) -> World:
    """Make a model and teach it the language of a seed: questions and answers that do not belong together, and text."""
    base = tiny_folder(folder / "base", hidden_size=hidden, intermediate_size=2 * hidden, initializer_range=0.1)
    world = World(seed, folder, base)
    rows = world.rows(240, "pretraining", lambda draw, key: " ".join(draw.sample(world.values, draw.randint(1, 3))))
    text = [{"text": world.text(3, f"text {i}")} for i in range(60)]
    config = world.config("teach", rows, method="full", rate=8e-3, steps=150, evaluation={"samples": 0})
    data = (world.write("teach.jsonl", rows), world.write("text.jsonl", text))
    config = dataclasses.replace(config, data=data, validation_fraction=0.02)
    return dataclasses.replace(world, model=train(config).folder / "model")


@contextlib.contextmanager
def quick():
    """Leave out what only takes time: pictures and TensorBoard."""
    with mock.patch("minitune.reporting.report.plot_losses", return_value=False):
        with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
            yield


def train(config: TrainConfig) -> Any:
    with quick():
        return run.train(config)


def trained(config: TrainConfig) -> Path:
    """Train, to the end or to an error that is the run's own; returns the run's folder."""
    with contextlib.suppress(MinituneError, RuntimeError):
        train(config)
    return Path(config.output)


def unlearnable(world: World) -> Callable[[random.Random, str], str]:
    return lambda draw, key: " ".join(draw.sample(world.values, 2))


def label(world: World, share: float) -> Callable[[random.Random, str], str]:
    return lambda draw, key: world.values[draw.random() >= share]


FAULTS: dict[str, tuple[str, Callable[[World], Path]]] = {}


def fault(expected: str):
    """Register a run with one fault, and the name that the doctor is to give it first."""

    def register(make: Callable[[World], Path]):
        FAULTS[make.__name__] = expected, make
        return make

    return register


@fault("over-fitting")
def memorised_by_all_weights(world):
    rows = world.rows(90, "a", unlearnable(world))
    return trained(world.config("memorised", rows, method="full", rate=5e-3, epochs=20.0))


@fault("over-fitting")
def memorised_by_an_adapter(world):
    rows, lora = world.rows(72, "b", unlearnable(world)), LoRAOptions(rank=16)
    return trained(world.config("memorised2", rows, rate=2e-2, epochs=25.0, batch_size=8, lora=lora))


@fault("learning rate too high")
def rate_too_high(world):
    return trained(world.config("high", world.rows(100), rate=0.5))


@fault("learning rate too high")
def rate_too_high_for_all_weights(world):
    return trained(world.config("high2", world.rows(100), method="full", rate=0.1))


@fault("divergence")
def diverged(world):
    optimizer = {"max_grad_norm": None}
    schedule = ScheduleConfig(kind="constant", warmup=0.1)
    config = world.config("diverged", world.rows(100), method="full", rate=5.0, optimizer=optimizer, schedule=schedule)
    return trained(config)


@fault("learning rate too low")
def rate_too_low(world):
    return trained(world.config("low", world.rows(100), rate=1e-7))


@fault("learning rate too low")
def rate_too_low_for_all_weights(world):
    return trained(world.config("low2", world.rows(100), method="full", rate=1e-8))


@fault("EOS never learned")
def ends_masked(world):
    right = examples.encode_record

    def masked(*given):
        example = right(*given)
        last = max(i for i, learned in enumerate(example.targets) if learned)
        return dataclasses.replace(example, targets=(*example.targets[:last], False, *example.targets[last + 1 :]))

    with mock.patch.object(examples, "encode_record", masked):
        return trained(world.config("masked", world.rows(100)))


@fault("template mismatch")
def template_of_another_family(world):
    rows = [chat(f"[INST] {row['messages'][0]['content']} [/INST]", row["messages"][1]["content"])
            for row in world.rows(100)]  # fmt: skip
    return trained(world.config("mistral", rows))


@fault("template mismatch")
def template_written_into_texts(world):
    rows = [{"text": "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["messages"])}
            for row in world.rows(100)]  # fmt: skip
    return trained(world.config("chatml", rows, max_length=256))


@fault("template mismatch")
def template_of_alpaca_in_prompts(world):
    rows = [{"prompt": f"### Instruction:\n{row['messages'][0]['content']}\n\n### Response:\n",
             "completion": row["messages"][1]["content"]} for row in world.rows(100)]  # fmt: skip
    return trained(world.config("alpaca", rows))


@fault("too few targets")
def a_dozen_rows(world):
    return trained(world.config("dozen", world.rows(14), epochs=12.0))


@fault("label imbalance")
def nearly_all_no(world):
    return trained(world.config("imbalance", world.rows(160, "c", label(world, 0.93)), batch_size=8, epochs=2.0))


@fault("label imbalance")
def one_answer_to_all(world):
    return trained(world.config("one", world.rows(100, "d", lambda draw, key: world.values[0])))


@fault("duplicates")
def copied(world):
    return trained(world.config("copied", world.rows(60) * 4, epochs=1.5))


@fault("contradictory answers")
def contradictory(world):
    rows = world.rows(80, "e", label(world, 0.5))
    other = [chat(row["messages"][0]["content"], world.values[row["messages"][1]["content"] == world.values[0]])
             for row in rows[:40]]  # fmt: skip
    return trained(world.config("contradictory", rows + other, batch_size=8))


@fault("validation rows in the training data")
def leaked(world):
    rows = world.rows(100)
    return trained(world.config("leaked", rows, validation=world.write("leak.jsonl", rows[:20] + world.rows(20, "f"))))


@fault("truncated answers")
def answers_cut(world):
    def answer(draw, key):
        return f"{world.answers[key]} {' '.join(draw.choices(world.values, k=draw.randint(1, 5)))}"[:30]

    return trained(world.config("cut", world.rows(120, "g", answer), epochs=3.0))


@fault("rows cut to fit")
def rows_left_out(world):
    rows = world.rows(100) + [chat("long " * 40 + row["messages"][0]["content"], row["messages"][1]["content"])
                              for row in world.rows(60, "h")]  # fmt: skip
    return trained(world.config("dropped", rows, truncate="drop"))


@fault("rows cut to fit")
def prompts_cut(world):
    rows = [chat(row["messages"][0]["content"] + " so" * 40, row["messages"][1]["content"]) for row in world.rows(90)]
    return trained(world.config("shortened", rows, truncate="prompt"))


@fault("forgetting")
def language_forgotten(world):
    general = world.write("general.txt", world.text(120, "general"))
    evaluation = {"general": general, "general_tokens": 3000}
    return trained(world.config("forgot", world.rows(100), method="full", rate=1e-2, evaluation=evaluation))


@fault("numbers that are none")
def not_a_number(world):
    right = run.supervised
    calls = []

    def broken(model, batch):
        calls.append(1)
        loss, *rest = right(model, batch)
        return loss * (float("nan") if len(calls) > 20 else 1), *rest

    with mock.patch.object(run, "supervised", broken):
        return trained(world.config("nan", world.rows(100)))


@fault("the run was killed")
def killed(world):
    config = world.config("killed", world.rows(100))

    def die(self, line):
        write(self, line)
        if line["step"] == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    from minitune.reporting.journal import Journal

    write = Journal.step
    with mock.patch.object(Journal, "step", die), quick():
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run.train(config)
            os._exit(0)
        os.waitpid(pid, 0)
    return Path(config.output)


@fault("the run was stopped")
def stopped(world):
    from minitune.reporting.journal import Journal

    config, write = world.config("stopped", world.rows(100)), Journal.step

    def stop(self, line):
        write(self, line)
        if line["step"] == 20:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Journal, "step", stop):
        return trained(config)


@fault("out of memory")
def memory_exhausted(world):
    right = run.supervised

    def greedy(model, batch):
        return right(model, batch) if torch.is_inference_mode_enabled() else (torch.empty(10**15).sum(), 1, {})

    with mock.patch.object(run, "supervised", greedy):
        return trained(world.config("memory", world.rows(100), validation_fraction=0.0, evaluation={"samples": 0}))


@fault("too few steps")
def over_at_once(world):
    return trained(world.config("brief", world.rows(100), steps=4, accumulation_steps=8))


@fault("too few steps")
def most_rows_unseen(world):
    return trained(world.config("unseen", world.rows(400), steps=11))


@fault("clipped at every step")
def clipped_to_nothing(world):
    optimizer = {"kind": "sgd", "max_grad_norm": 1e-4}
    return trained(world.config("clipped", world.rows(100), rate=0.1, optimizer=optimizer))


@fault("no warm-up")
def no_warm_up(world):
    schedule = ScheduleConfig(kind="cosine", warmup=0)
    return trained(world.config("cold", world.rows(200), method="full", rate=0.04, epochs=4.0, schedule=schedule))


@fault("batch too small")
def one_word_a_step(world):
    rows = world.rows(75, "i", lambda draw, key: world.values[world.keys.index(key) % 2][:3])
    return trained(world.config("lone", rows, batch_size=1, packing=False, epochs=1.0))


@fault("the base knows nothing")
def untrained_base(world):
    base = world.folder / "base"
    return trained(dataclasses.replace(world.config("untrained", world.rows(100)), model=str(base)))


@fault("chosen answers unlearned")
def preferences_overdone(world):
    return trained(world.config("overdone", pairs(world), objective="dpo", rate=3e-2, epochs=4.0))


def pairs(world: World, count: int = 90) -> Rows:
    draw, found = world.draw("pairs"), []
    for row in world.rows(count):
        question, answer = row["messages"]
        wrong = draw.choice([other for other in world.answers.values() if other != answer["content"]])
        found.append({"prompt": [question], "chosen": [answer], "rejected": [NEW | {"content": wrong}]})
    return found


CLEAN: dict[str, Callable[[World], Path]] = {
    "adapter": lambda world: trained(world.config("c-lora", world.rows(100))),
    "full": lambda world: trained(world.config("c-full", world.rows(100), method="full", rate=2e-3)),
    "padded": lambda world: trained(
        world.config("c-padded", [{"prompt": row["messages"][0]["content"] + " ",
                                   "completion": row["messages"][1]["content"]} for row in world.rows(100)],
                     packing=False)),
    "dpo": lambda world: trained(world.config("c-dpo", pairs(world, 160), objective="dpo", rate=4e-3, epochs=3.0)),
    "text": lambda world: trained(
        world.config("c-text", world.text(300, "book"), rate=2e-3, epochs=2.0, max_length=256)),
    "labels": lambda world: trained(
        world.config("c-labels", world.rows(120, "k", lambda draw, key: world.values[world.keys.index(key) % 2]),
                     batch_size=8)),
    "qlora": lambda world: trained(world.config("c-qlora", world.rows(100), method="qlora")),
    "last layers": lambda world: trained(
        world.config("c-last", world.rows(100), method="last_layers", last_layers=1, rate=5e-3)),
    "conversations": lambda world: trained(
        world.config("c-long", [{"messages": [turn for row in world.rows(3, f"talk {i}") for turn in row["messages"]]}
                                for i in range(80)], max_length=256)),
    "general text": lambda world: trained(
        world.config("c-general", world.rows(100), rate=5e-4,
                     evaluation={"general": world.write("c-general.txt", world.text(120, "general")),
                                 "general_tokens": 3000})),
}  # fmt: skip


def main() -> None:
    """Print what the doctor says of every run of a world: seed and width of its model as arguments, then names."""
    seed, hidden, *names = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        world = make_world(tiny_folder.__wrapped__(), Path(folder), int(seed), int(hidden))
        print(f"world: {time.monotonic() - began:.1f} s")
        for name, (expected, make) in {**FAULTS, **{name: ("", make) for name, make in CLEAN.items()}}.items():
            if names and name not in names:
                continue
            began = time.monotonic()
            record = read_run(make(world))
            found = diagnose(record)
            alarms = [one for one in found if one.alarm]
            first = alarms[0].name if alarms else ""
            print(
                f"{'ok   ' if first == expected else 'WRONG'} {name} ({time.monotonic() - began:.1f} s): {expected!r}"
            )
            curve = [f"{e['validation_loss']:.3f}" for e in record.evaluations]
            if first != expected or names:
                print(
                    "   ", curve, [f"{step['loss']:.2f}" for step in record.steps][:: max(1, len(record.steps) // 12)]
                )
                print(
                    "   ",
                    record.outcome.get("movement"),
                    record.outcome.get("error"),
                    (record.general or {}).get("ratio"),
                )
                for one in found:
                    print(f"    {one.strength:.2f} {one.name}: {one.evidence}")


if __name__ == "__main__":
    main()
