"""Command: what a run will take, before it runs: bytes, seconds, money, what fits; and whether to fine-tune at all.

    python -m minitune.plan --model M --method lora --batch_size 4 --max_length 1024
    python -m minitune.plan --model M --recipe full --device_name A100-40GB --price 1.5 --tokens 5000000 --epochs 3
    python -m minitune.plan --model M --memory 24GB                  # what fits, by method, and what to change
    python -m minitune.plan --questions                              # should this be a fine-tune?

M is a fetched model's name, a folder with a config.json (nothing else is needed), or a GGUF file. No weight is read.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, check_counts, nearest, run_command
from minitune.planning.devices import DEVICES, Device, device
from minitune.planning.questions import Answers, Question, Verdict, checked, decide, from_answers
from minitune.training.config import OBJECTIVES, REFERENCED, TrainConfig

if TYPE_CHECKING:
    from minitune.planning.run import Run

PROG = "python -m minitune.plan"
_SHARED = ("method", "objective", "max_length", "batch_size", "accumulation_steps", "packing", "dtype", "epochs",
           "max_steps", "last_layers", "gradient_checkpointing", "fused_backward")  # fmt: skip
_UNCOUNTED = ("adapter", "new_tokens", "pattern", "freeze_layers")
_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TRIALS = 4


@dataclass(frozen=True)
class PlanConfig:
    """What to plan; what is left out comes from the recipe, and else is as in training."""

    model: str = "smollm2-135m-instruct"
    """A fetched model's name, a folder with a config.json, or a GGUF file; no weight is read."""
    recipe: str | None = None
    """A training recipe, by name or path; the options given here go over it."""
    method: Literal["full", "last_layers", "lora", "qlora"] | None = None
    """What is trained."""
    objective: str | None = None
    """sft, or one over preferences, such as dpo."""
    max_length: int | None = None
    """Tokens of a row; of a pair, of each side."""
    batch_size: int | None = None
    """Rows, or pairs, of a micro-batch."""
    accumulation_steps: int | None = None
    """Micro-batches of an optimiser step."""
    packing: bool | None = None
    """Several texts in a row, which takes masks."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and arithmetic (default bfloat16)."""
    rank: int | None = None
    """Of the adapters."""
    target_modules: tuple[str, ...] | str | None = None
    """Linear layers with adapters, as [q_proj,v_proj], or all-linear."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Of the base, with method qlora."""
    last_layers: int | None = None
    """With that method: how many."""
    optimizer: Literal["adamw", "adamw8bit", "sgd"] | None = None
    """The update rule."""
    gradient_checkpointing: bool | None = None
    """Make activations again in the backward pass."""
    fused_backward: bool | None = None
    """Update in the backward pass, and keep no gradients."""
    tokens: int | None = None
    """Of the training data, for the time of a whole run."""
    epochs: float | None = None
    """Passes over them."""
    max_steps: int | None = None
    """Optimiser steps, instead of tokens and epochs."""
    device_name: str | None = None
    """A device of the table, such as H100-SXM or RTX-4090 (default: all of them)."""
    memory: str | None = None
    """What there is, as 24GB (10^9 bytes each) or 24GiB (default: the device's): what fits, and what to change."""
    price: float | None = None
    """Of the device for an hour, in any currency."""
    measured_step: float | None = None
    """Seconds that a step was measured to take on the device: in place of the range."""
    calibrate: bool = False
    """Measure some steps of random rows here, on this machine's processor; the model's weights must be here."""
    threads: int | None = None
    """With calibrate: processor threads (default: torch's own choice)."""
    json: bool = False
    """Print JSON instead of text."""
    questions: bool = False
    """Ask whether to fine-tune at all."""
    answers: tuple[str, ...] | str | None = None
    """The answers to that, for scripts: a YAML file, or as [goal=labels,measured=yes,...]; what is missing is named."""

    def __post_init__(self):
        """Refuse values without meaning and options that have no effect together."""
        check_counts(tokens=self.tokens, rank=self.rank, threads=self.threads)
        for name in ("price", "measured_step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.tokens and self.max_steps:
            raise ConfigError("tokens and max_steps are both set; the run ends at one of them, leave out the other")
        if self.epochs and not self.tokens:
            raise ConfigError("epochs is set without tokens, of which there are so many passes; give --tokens")
        if self.measured_step and not (self.device_name or self.calibrate):
            raise ConfigError("measured_step is set without device_name, which it was measured on")
        if self.measured_step and self.calibrate:
            raise ConfigError("measured_step and calibrate are both set; a step has one time, leave out one of them")
        if self.price and not (self.device_name or self.calibrate):
            raise ConfigError("price is set without device_name, which it is of")
        if self.calibrate and self.device_name:
            raise ConfigError("calibrate measures this machine, not device_name; leave out one of them")
        if self.threads and not self.calibrate:
            raise ConfigError("threads is set without calibrate, which it belongs to; leave it out")
        if self.objective is not None and self.objective not in OBJECTIVES:
            hint = nearest(self.objective, OBJECTIVES)
            raise ConfigError(f"objective is {self.objective!a}; it must be one of {', '.join(OBJECTIVES)}{hint}")
        if self.device_name:
            device(self.device_name)
        if self.memory is not None:
            parsed_bytes(self.memory)


def parsed_bytes(text: str) -> float:
    """Return the bytes of "24GB", "24 GiB" or "512mb"; ConfigError for anything else and for nothing at all."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    if not found or not float(found[1]):
        raise ConfigError(f"memory is {text!a}; write it as 24GB (10^9 bytes each) or 24GiB (2^30)")
    count = float(found[1]) * _UNITS[found[2] or ""]
    if count < 1e6:
        raise ConfigError(f"memory is {text!a}, which is {count:g} bytes; write the unit too, as in 24GB")
    return count


def main(argv: list[str] | None = None) -> int:
    """Print a plan, or a verdict on whether to fine-tune; 1 where the run does not fit into the memory given."""
    config = parse(PlanConfig, argv, prog=PROG, description=__doc__.split("\n")[0])
    from minitune.planning.text import plan_lines, verdict_lines

    if config.questions or config.answers is not None:
        verdict = ask(input) if config.answers is None else answered(config.answers)
        print(json.dumps(dataclasses.asdict(verdict), indent=2) if config.json else "\n".join(verdict_lines(verdict)))
        return 0
    found = plan(config)
    print(json.dumps(found, indent=2) if config.json else "\n".join(plan_lines(found)))
    return int(found["fits"] is False)


def ask(read: Callable[[str], str]) -> Verdict:
    """Ask what has to be known, each question again until its answer is one; ConfigError where the answers end.

    Args:
        read: prints a prompt and returns a line, as `input` does.
    """

    def asked(question: Question) -> str | int:
        hint = " (yes or no) " if "yes" in question.choices else " "
        while True:
            try:
                return checked(question, read(question.text + hint))
            except ConfigError as error:
                print(error, file=sys.stderr)
            except EOFError:
                print()  # the question's own line ends here
                raise ConfigError("the answers end here; in a script give them all with --answers") from None

    return decide(asked)


def answered(given: tuple[str, ...] | str) -> Verdict:
    """Return the verdict for answers of a YAML file, or of name=answer each; ConfigError for a bad or missing one."""
    listed = (given,) if isinstance(given, str) else given
    in_file = isinstance(given, str) and Path(given).is_file()
    if isinstance(given, str) and "=" not in given and not in_file:
        raise ConfigError(f"answers: there is no file {given}; give one, or answers as [goal=labels,measured=yes]")
    arguments = (
        ["--config", given] if isinstance(given, str) and Path(given).is_file() else [f"--{one}" for one in listed]
    )
    return from_answers(parse(Answers, arguments, prog=f"{PROG} --answers", description="Whether to fine-tune."))


def merged(config: PlanConfig) -> TrainConfig:
    """Return the options of the run, checked as training checks them; ConfigError for what the plan does not count."""
    base = TrainConfig()
    if config.recipe is not None:
        base = parse(TrainConfig, ["--config", config.recipe], prog=PROG, description="")
    changes: dict[str, Any] = {name: getattr(config, name) for name in _SHARED if getattr(config, name) is not None}
    if (changes.get("max_steps") or config.tokens) and base.epochs:
        changes["epochs"] = config.epochs or (base.epochs if config.tokens else None)
    if base.dtype == "auto":
        changes.setdefault("dtype", "bfloat16")
    given = {"rank": config.rank, "target_modules": config.target_modules}
    lora = {name: value for name, value in given.items() if value is not None}
    if lora:
        changes["lora"] = dataclasses.replace(base.lora, **lora)
    if config.quantization:
        changes["quantization"] = dataclasses.replace(base.quantization, kind=config.quantization)
    if config.optimizer:
        changes["optimizer"] = dataclasses.replace(base.optimizer, kind=config.optimizer)
    if config.fused_backward:
        changes["optimizer"] = dataclasses.replace(changes.get("optimizer", base.optimizer), max_grad_norm=None)
        changes.setdefault("accumulation_steps", 1)
    run = dataclasses.replace(base, data="-", **changes)
    uncounted = [name for name in _UNCOUNTED if getattr(run, name)]
    uncounted += ["lora.modules_to_save"] * bool(run.lora.modules_to_save)
    if uncounted:
        raise ConfigError(f"{uncounted[0]} is set, which no plan counts; leave it out of the recipe for a plan")
    return run


def shaped(train: TrainConfig, shape: Any, stored_in_4_bits: bool) -> "Run":
    """Return the run that `train` is on a model of that config; ConfigError where the model cannot do it."""
    from minitune.model.config import LoRAConfig, QuantizationConfig
    from minitune.planning.run import Run

    adapters, pairs = train.method in ("lora", "qlora"), train.objective not in ("sft", "kto")
    if train.max_length > shape.longest:
        raise ConfigError(f"max_length is {train.max_length:,}; this model reads {shape.longest:,} tokens at most")
    if stored_in_4_bits and train.method != "qlora":
        raise ConfigError(f"this model is stored in 4 bits, which method {train.method} cannot train; use qlora")
    if shape.reward and train.objective != "reward":
        raise ConfigError(f"this is a reward model; objective {train.objective} needs a language model")
    return Run(
        dataclasses.replace(shape, reward=train.objective == "reward"), train.method, train.batch_size,
        train.max_length, train.dtype, lora=train.lora.adapter() if adapters else LoRAConfig(),
        quantization=train.quantization.config() if train.method == "qlora" else QuantizationConfig(),
        last_layers=train.last_layers or 2, optimizer=train.optimizer.kind, paged=train.optimizer.paged,
        accumulation_steps=train.accumulation_steps, gradient_checkpointing=train.gradient_checkpointing,
        fused_backward=train.fused_backward, packing=train.packing, documents=2 if pairs else 1,
        preference=train.objective != "sft", penalty=train.penalty.kind,
        reference=train.objective in REFERENCED and not train.precomputes,
    )  # fmt: skip


def plan(config: PlanConfig) -> dict[str, Any]:
    """Return all that a plan says, as values that JSON has: bytes, seconds, operations.

    Raises ConfigError or CheckpointError for what cannot be planned.
    """
    from minitune.memory import generation
    from minitune.planning.models import read_shape

    train = merged(config)
    run = shaped(train, *read_shape(config.model))
    named = device(config.device_name) if config.device_name else None
    cpu, counted = _on_cpu(named), run.ledger()
    if run.paged and cpu:
        raise ConfigError("optimizer.paged moves moments off a GPU, and this plan is for a CPU; leave it out, or name "
                          "a GPU with --device_name")  # fmt: skip
    here = calibrated(config, train) if config.calibrate else None
    memory = parsed_bytes(config.memory) if config.memory else named.memory if named else None
    answers = generation(run.config, run.batch_size, run.length, dtype=_dtype(run)) if not run.config.reward else None
    steps = train.max_steps
    if config.tokens:
        steps = math.ceil(config.tokens * (train.epochs or 1) / run.step_tokens)
    return {
        "model": {"name": config.model, "family": run.config.family, "parameters": run.parameters},
        "run": {name: getattr(train, name) for name in _SHARED} | {"optimizer": train.optimizer.kind},
        "ledger": dataclasses.asdict(counted) | {"held": counted.held, "peak": counted.total,
                                                 "resident": counted.resident},
        "needed": run.needed(cpu),
        "on_cpu": cpu,
        "generation": answers and dataclasses.asdict(answers) | {"peak": answers.total},
        "step": {"tokens": run.step_tokens, "operations": run.flops()},
        "steps": steps,
        "time": _times(run, steps, config, here, [named] if named else () if here else DEVICES),
        "memory": memory,
        "fits": None if memory is None else run.needed(cpu) <= memory,
        **_capacity(run, memory, cpu),
    }  # fmt: skip


def _dtype(run: "Run") -> Any:
    import torch

    return getattr(torch, run.dtype)


def _on_cpu(named: Device | None) -> bool:
    """Tell whether the memory is that of a process: on the CPU of the table, or here where no GPU is."""
    import torch

    return named.name.startswith("CPU") if named else not torch.cuda.is_available()


def calibrated(config: PlanConfig, train: TrainConfig) -> float:
    """Return the median seconds of some real steps here, the first left out; CheckpointError without weights."""
    from statistics import median

    import torch

    from minitune.checkpoint.load import load_model
    from minitune.device import choose_device
    from minitune.training.trial import trial

    if config.threads:
        torch.set_num_threads(config.threads)
    quantize = train.quantization.config() if train.method == "qlora" else None
    if train.optimizer.learning_rate is None:
        train = dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, learning_rate=1e-5))
    model = load_model(config.model, dtype=train.dtype, device=choose_device("auto"), quantize=quantize)
    return median(trial(model, train.resolved(), _TRIALS)[1:])


def _times(run: "Run", steps: int | None, config: PlanConfig, here: float | None, devices: Any) -> list[dict[str, Any]]:
    """Return what a step, and the run where its steps are known, takes on each device."""
    rows = [] if here is None else [("here, measured", (here, here), None)]
    for one in devices:
        seconds = (config.measured_step,) * 2 if config.measured_step else None
        if seconds is None and not (len(devices) > 1 and run.dtype == "bfloat16" and one.bfloat16 is None):
            seconds = run.step_seconds(one)
        rows.append((one.name, seconds, one.memory))
    found = []
    for name, seconds, memory in rows:
        whole = seconds and steps and [steps * value for value in seconds]
        found.append({
            "device": name, "memory": memory,
            "fits": None if memory is None else run.needed(name.startswith("CPU")) <= memory,
            "step_seconds": seconds and list(seconds), "run_seconds": whole or None,
            "cost": [value / 3600 * config.price for value in whole] if whole and config.price else None,
        })  # fmt: skip
    return found


def _capacity(run: "Run", memory: float | None, cpu: bool) -> dict[str, Any]:
    """Return what fits into the memory, and what to change; ConfigError where not even 4-bit weights do."""
    from minitune.planning.fit import capacities, remedies

    if memory is None:
        return {"capacities": None, "remedies": None}
    least = dataclasses.replace(run, method="qlora").ledger()
    bare = least.weights + least.codes + least.scales
    if memory < bare:
        raise ConfigError(
            f"memory is {memory / 1e9:.3g} GB, but the weights alone take {bare / 1e9:.3g} GB in 4 bits and "
            f"{2 * run.parameters / 1e9:.3g} GB in bfloat16; take a smaller model or more memory"
        )
    found = capacities(run, memory, cpu=cpu), remedies(run, memory, cpu=cpu)
    return dict(zip(("capacities", "remedies"), ([dataclasses.asdict(one) for one in each] for each in found),
                    strict=True))  # fmt: skip


if __name__ == "__main__":
    run_command(main)
