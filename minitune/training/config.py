"""What a training run is told: frozen dataclasses, one docstring per field, every value checked.

Options that belong to one method are None until set, so that setting one the method would ignore can be
refused; `resolved` fills what is still None with the method's default. This file imports no torch: `--help`
and bad options answer at once. A dictionary with defaults was rejected: a misspelt key would be silent.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minitune.data.corpus import Source
from minitune.data.examples import TrainOn, Truncate
from minitune.errors import ConfigError, check_seed
from minitune.reporting.gates import parse_gates
from minitune.training.options import OBJECTIVES as OBJECTIVES
from minitune.training.options import REFERENCED, LoRAOptions, PenaltyOptions, PreferenceOptions, QuantizationOptions
from minitune.training.options import filled as _filled
from minitune.training.options import positive as _positive
from minitune.training.options import require as _require

ADAPTER_METHODS = ("lora", "qlora")
METHOD_OPTIONS = {  # each belongs to these methods
    "lora": ADAPTER_METHODS, "quantization": ("qlora",), "last_layers": ("last_layers",), "pattern": ("pattern",),
    "freeze_layers": (*ADAPTER_METHODS, "full"),
}  # fmt: skip
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4, "full": 3e-5, "last_layers": 1e-4, "pattern": 1e-4}
PREFERENCE_RATE = 0.1  # of the learning rate of supervised training: a preference needs few steps to be overdone


Sources = tuple[Source | str, ...] | Source | str | None


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and gradient clipping."""

    kind: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), the same with moments in 8 bits (Dettmers et al. 2022), or plain SGD."""
    learning_rate: float | None = None
    """Peak rate (default: 5e-4 for lora and qlora, 3e-5 for full, 1e-4 else; a tenth for preference objectives)."""
    betas: tuple[float, float] | None = None
    """Decay of the running means of the gradient and of its square (default 0.9, 0.999); not for sgd."""
    eps: float | None = None
    """Added to the root of the second moment (default 1e-8); not for sgd."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms and biases are never decayed."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null switches clipping off."""
    paged: bool = False
    """On a GPU: keep moments in the computer's memory, and fetch each parameter's for its update (not for sgd)."""

    def __post_init__(self):
        """Refuse values without meaning."""
        _positive("optimizer.", self, "learning_rate", "eps", "max_grad_norm")
        for name in ("betas", "eps"):
            good = self.kind != "sgd" or getattr(self, name) is None
            _require(good, f"optimizer.{name}", getattr(self, name), "left out: sgd has no moments")
        _require(not self.paged or self.kind != "sgd", "optimizer.paged", True, "left out: sgd has no moments")
        good = self.betas is None or all(0 <= b < 1 for b in self.betas)
        _require(good, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        _require(0 <= self.weight_decay < 1, "optimizer.weight_decay", self.weight_decay, "in [0, 1)")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd holds the peak and decays at the end."""
    warmup: float = 0.05
    """Share of all steps in which the rate rises from 0 to its peak."""
    decay: float | None = None
    """wsd only: share of all steps that decay at the end (default 0.2)."""
    final_ratio: float | None = None
    """Rate at the end as a share of the peak (default 0); not for constant."""

    def __post_init__(self):
        """Refuse shares outside 0..1 and options of other kinds."""
        _require(0 <= self.warmup < 1, "schedule.warmup", self.warmup, "a share of the run, in [0, 1)")
        if self.decay is not None:
            _require(self.kind == "wsd", "schedule.decay", self.decay, f"left out: {self.kind} ignores it")
            good = 0 < self.decay <= 1 - self.warmup
            _require(good, "schedule.decay", self.decay, "above 0 and at most 1 - schedule.warmup")
        if self.final_ratio is not None:
            name, value = "schedule.final_ratio", self.final_ratio
            _require(self.kind != "constant", name, value, "left out: constant ignores it")
            _require(0 <= value <= 1, name, value, "in [0, 1]")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during the run."""

    every_steps: int | None = None
    """Steps between evaluations (default: a fifth of the run); there is always one before and one after."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best loss (default: never)."""
    samples: int = 3
    """Validation prompts that are answered at each evaluation."""
    sample_tokens: int = 48
    """Longest sampled answer, in tokens."""
    general: str | None = None
    """A .txt file of general text (or a fetched one's name, wiki-demo) whose perplexity is measured before and after
    training, to show what is forgotten."""
    general_tokens: int | None = None
    """Use only so many tokens of it (default 8192)."""

    def __post_init__(self):
        """Refuse counts without meaning."""
        _positive("evaluation.", self, "every_steps", "patience", "sample_tokens", "general_tokens")
        good = self.general is not None or self.general_tokens is None
        _require(good, "evaluation.general_tokens", self.general_tokens, "left out without evaluation.general")
        _require(self.samples >= 0, "evaluation.samples", self.samples, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk, to resume from."""

    every_steps: int | None = None
    """Steps between checkpoints (default: a tenth of the run, at most 200)."""
    keep: int = 2
    """How many of the latest are kept; the best weights are kept besides."""

    def __post_init__(self):
        """Refuse counts without meaning."""
        _positive("checkpoint.", self, "every_steps", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Only `data` has no default."""

    data: Sources = None
    """Training file, or several as [a.jsonl,b.csv], or with weight and format as in the recipe `mixture`."""
    rehearsal: Source | str | None = None
    """Against forgetting: a file of general rows, mixed in; each row of `data` still comes once an epoch."""
    rehearsal_share: float | None = None
    """Share of the rows of an epoch that are rehearsal's (default 0.2)."""
    model: str = "smollm2-135m-instruct"
    """Base model: a fetched model's name, a Hugging Face folder or a GGUF file."""
    adapter: str | None = None
    """Start from this PEFT adapter folder instead of a fresh one (methods lora and qlora)."""
    new_tokens: tuple[str, ...] | str = ()
    """Tokens to add, as [<tool>,</tool>]; only their rows of embedding and head train (all, in method full)."""
    output: str = "runs/train"
    """The run folder."""
    validation: Sources = None
    """Validation file or files; without, a part of the training rows is held out."""
    validation_fraction: float | None = None
    """Share of the training rows held out for validation, 0 for none (default 0.05)."""
    max_length: int = 512
    """Longest row in tokens."""
    truncate: Truncate = "error"
    """A longer row stops the run, loses the start of its prompt, is split (texts only), or is left out."""
    packing: bool = True
    """Several rows side by side in one of max_length, each seeing itself only; false pads instead."""
    train_on: TrainOn = "all"
    """Learn every assistant turn of a conversation, or its last one."""
    objective: Literal["sft", "dpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo", "cpo", "reward"] = "sft"
    """What is minimised: the loss of the answers (sft), one over preferences, or a reward model's."""
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    """Options of the objectives other than sft."""
    method: Literal["lora", "qlora", "full", "last_layers", "pattern"] = "lora"
    """What is trained; qlora is lora over a base in 4 bits."""
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    """Options of methods lora and qlora."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    """Options of method qlora."""
    last_layers: int | None = None
    """Method last_layers: how many (default 2)."""
    pattern: str | None = None
    """Method pattern: a regular expression found in the names of the parameters to train."""
    freeze_layers: int | None = None
    """Methods lora, qlora (no adapters there), full (embedding included): leave so many of the lowest layers alone."""
    penalty: PenaltyOptions = field(default_factory=PenaltyOptions)
    """Against forgetting: a price on leaving the start."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    accumulation_steps: int = 4
    """Micro-batches in an optimiser step."""
    epochs: float | None = None
    """Passes over the data (default 1 unless max_steps is given)."""
    max_steps: int | None = None
    """Optimiser steps, instead of epochs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saved state."""
    require: tuple[str, ...] | str = ()
    """Exit with code 3 unless these hold at the end, as best_loss<=1.2 or general.ratio<1.1; can be repeated."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base's weights and arithmetic; auto is bfloat16 where the processor is fast at it."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Triton kernels on a GPU (auto), nowhere (reference), or everywhere (triton), which needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    fused_backward: bool = False
    """Update each parameter in the backward pass and drop its gradient at once: saves the gradients' memory."""
    seed: int = 0
    """Of the adapter's draw, the order of rows and dropout."""
    threads: int | None = None
    """Processor threads (default: torch's own choice)."""
    resume: bool = False
    """Go on from the last complete checkpoint in `output`; other options come from that run."""
    overwrite: bool = False
    """Delete a run that `output` already holds."""

    def __post_init__(self):
        """Refuse values without meaning and options that the method ignores."""
        _positive("", self, "max_length", "batch_size", "accumulation_steps", "epochs", "max_steps", "threads")
        check_seed(self.seed)
        for source in sources(self.data):
            _positive(f"data {source.path}: ", source, "weight")
        for source in sources(self.validation):
            good = source.weight is None
            _require(good, f"validation {source.path}: weight", source.weight, "left out: every row counts once")
        for name, methods in METHOD_OPTIONS.items():
            if self.method not in methods and getattr(self, name) not in (None, LoRAOptions(), QuantizationOptions()):
                instead = " or ".join(methods)
                raise ConfigError(
                    f"{name} is set but method is {self.method}, which ignores it; use --method {instead}"
                )
        self._check_objective()
        parse_gates(self.require)
        if self.adapter is not None and self.method not in ADAPTER_METHODS:
            raise ConfigError(f"adapter is set but method is {self.method}; export a merged model and train that")
        own = dataclasses.replace(self.lora, plus_ratio=None)
        if self.adapter is not None and own != LoRAOptions():
            name = next(name for name, value in dataclasses.asdict(own).items() if value is not None)
            raise ConfigError(f"lora.{name} is set but adapter {self.adapter} brings its own; leave out one of them")
        self._check_new_tokens()
        self._check_forgetting()
        for name in ("every_steps", "patience"):
            if self.validation_fraction == 0 and getattr(self.evaluation, name) is not None:
                raise ConfigError(f"evaluation.{name} is set but validation_fraction 0 leaves nothing to evaluate")
        if self.method == "pattern":
            _require(bool(self.pattern), "pattern", self.pattern, "a regular expression over parameter names")
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("epochs and max_steps are both set; the run ends at one of them, leave out the other "
                              "(--epochs null takes back a recipe's)")  # fmt: skip
        if self.validation is not None and self.validation_fraction is not None:
            raise ConfigError("validation and validation_fraction are both set; leave out one of them")
        if self.validation_fraction is not None:
            good = 0 <= self.validation_fraction < 1
            _require(good, "validation_fraction", self.validation_fraction, "in [0, 1)")
        if self.fused_backward:
            _require(self.accumulation_steps == 1, "accumulation_steps", self.accumulation_steps,
                     "1 with fused_backward, which keeps no gradients to add to")  # fmt: skip
            _require(self.optimizer.max_grad_norm is None, "optimizer.max_grad_norm", self.optimizer.max_grad_norm,
                     "null with fused_backward, which updates before the whole norm is known")  # fmt: skip
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite contradict each other; leave out one of them")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device is '{self.device}'; it must be auto, cpu, cuda or cuda:N")
        if self.method in ADAPTER_METHODS:
            self.lora.adapter()
        if self.method == "qlora":
            self.quantization.config()

    @property
    def precomputes(self) -> bool:
        """Whether the reference's log-probabilities are made before training, since it is gone later or by choice."""
        return self.objective in REFERENCED and (self.changes_base or bool(self.preference.precompute))

    @property
    def changes_base(self) -> bool:
        """Whether the reference is gone once training has begun: it is more than the base with the adapter off."""
        beside = bool(self.new_tokens or self.lora.modules_to_save)
        return self.method not in ADAPTER_METHODS or self.adapter is not None or beside

    def _check_new_tokens(self) -> None:
        """Refuse tokens that would never train, or whose rows are claimed twice."""
        if self.new_tokens and self.method not in (*ADAPTER_METHODS, "full"):
            raise ConfigError(f"new_tokens is set but method {self.method} would never train them; use lora or full")
        if self.new_tokens and self.lora.modules_to_save:
            raise ConfigError(
                "new_tokens trains their rows alone and lora.modules_to_save whole modules; leave one out"
            )

    def _check_forgetting(self) -> None:
        """Refuse what the means against forgetting would ignore or cannot do."""
        share = self.rehearsal_share
        if share is not None:
            _require(self.rehearsal is not None, "rehearsal_share", share, "left out without rehearsal")
            _require(0 < share < 1, "rehearsal_share", share, "above 0 and below 1")
        if self.freeze_layers is not None:
            _positive("", self, "freeze_layers")
            saved = self.lora.modules_to_save
            _require(not saved, "lora.modules_to_save", saved, "left out with freeze_layers, which may freeze the same")
        if self.penalty.kind:
            _require(not self.fused_backward, "fused_backward", True, "false with penalty: its price is of whole steps")
        if self.penalty.kind == "ewc":
            _require(self.objective != "reward", "penalty.kind", "ewc", "l2: a reward model gives no text a likelihood")

    def _check_objective(self) -> None:
        """Refuse options that the objective ignores or cannot do with."""
        self.preference.check(self.objective, self.changes_base and self.objective in REFERENCED)
        if self.objective != "sft":
            _require(self.train_on == "all", "train_on", self.train_on, "left out: what follows the prompt is compared")
            _require(self.truncate != "split", "truncate", "split", "prompt or drop: answers are not split")
        if self.objective == "robust":
            _require(self.preference.label_smoothing != 0, "preference.label_smoothing", 0, "above 0; or use dpo")
        if self.objective == "reward":
            general = self.evaluation.general
            _require(general is None, "evaluation.general", general, "left out: a reward model writes no text")

    def resolved(self) -> "TrainConfig":
        """Return a copy with the method's and the schedule's defaults filled in; raises without data."""
        if not sources(self.data):
            raise ConfigError("data is missing; name a file, as in --data rows.jsonl")
        changes: dict[str, Any] = {"data": sources(self.data), "validation": sources(self.validation) or None}
        for general in sources(self.rehearsal):
            share = 0.2 if self.rehearsal_share is None else self.rehearsal_share
            changes["data"] += (dataclasses.replace(general, share=share),)
            changes |= {"rehearsal": None, "rehearsal_share": None}
        rate, adam = self.optimizer.learning_rate, {} if self.optimizer.kind == "sgd" else ADAM
        if rate is None and self.optimizer.kind == "sgd":
            raise ConfigError("optimizer.learning_rate is missing; sgd needs one of its own, often 0.01 to 1")
        usual = LEARNING_RATES[self.method] * (1 if self.objective == "sft" else PREFERENCE_RATE)
        defaults = {**adam, "learning_rate": usual}
        changes["optimizer"] = OptimizerConfig(**_filled(self.optimizer, defaults))
        kind, defaults = self.schedule.kind, {}
        if kind != "constant":
            defaults["final_ratio"] = 0.0
        if kind == "wsd":
            defaults["decay"] = min(0.2, 1 - self.schedule.warmup)
        changes["schedule"] = ScheduleConfig(**_filled(self.schedule, defaults))
        if self.method in ADAPTER_METHODS and self.adapter is None:
            changes["lora"] = self.lora.resolved()
        if self.method == "qlora":
            changes["quantization"] = self.quantization.resolved()
        changes["preference"] = self.preference.resolved(self.objective)
        changes["penalty"] = self.penalty.resolved()
        if self.method == "last_layers" and self.last_layers is None:
            changes["last_layers"] = 2
        if self.epochs is None and self.max_steps is None:
            changes["epochs"] = 1.0
        if self.validation is None and self.validation_fraction is None:
            changes["validation_fraction"] = 0.05
        return dataclasses.replace(self, **changes)


def sources(given: Sources) -> tuple[Source, ...]:
    """Return data files as Sources, whichever way they were written."""
    several = given if isinstance(given, tuple | list) else () if given is None else (given,)
    for text in several:
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") and not Path(text).exists():
            fields = ", ".join(field.name for field in dataclasses.fields(Source))
            raise ConfigError(
                f"{text} is no file and no list of files as a recipe has it; a file's fields are: {fields}"
            )
    return tuple(source if isinstance(source, Source) else Source(str(Path(source))) for source in several)
