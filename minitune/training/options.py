"""Groups of options that belong to a method or objective: adapters, quantised weights, preferences, the penalty.

Each option is None until set, so that setting one that would be ignored can be refused; `resolved` fills in defaults.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from minitune.errors import ConfigError
from minitune.model.lora_config import LoRAConfig
from minitune.ops.quantization import QuantizationConfig

# What each objective may be told, with its defaults; `losses/preference.py` gives equations and sources.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalized": False},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1, "length_normalized": False},
    "hinge": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {"beta": 0.1, "sft_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 1.0},
    "reward": {},
}
REFERENCED = ("dpo", "robust", "ipo", "hinge", "kto")  # compare with a reference model


def require(good: bool, name: str, value: Any, wanted: str) -> None:
    """Raise ConfigError naming the field unless `good`."""
    if not good:
        raise ConfigError(f"{name} is {value}; it must be {wanted}")


def positive(prefix: str, options: Any, *names: str) -> None:
    """Refuse zero, negative and non-finite values of the named fields; None passes."""
    for name in names:
        value = getattr(options, name)
        require(value is None or 0 < value < float("inf"), prefix + name, value, "above 0")


def filled(options: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass, each None replaced by its default where there is one."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters; all None unless `method` is lora or qlora."""

    rank: int | None = None
    """Width of the adapters; 8 to 64 is usual (default 16)."""
    alpha: float | None = None
    """The update is scaled by alpha / rank (default: twice the rank)."""
    dropout: float | None = None
    """Share of the adapter's input dropped in training (default 0)."""
    target_modules: tuple[str, ...] | str | None = None
    """Linear layers to adapt, as [q_proj,v_proj], or all-linear (default)."""
    rslora: bool | None = None
    """Scale by alpha / sqrt(rank) instead (default false)."""
    dora: bool | None = None
    """DoRA: train magnitudes apart from directions (default false); slower, and better at low ranks."""
    init: str | None = None
    """Start from nothing (kaiming, default) or from the principal components (pissa, or pissa_niter_16, faster)."""
    modules_to_save: tuple[str, ...] | str | None = None
    """Modules trained whole and saved with the adapters, as [embed_tokens,lm_head] (default none)."""
    plus_ratio: float | None = None
    """LoRA+: the learning rate of B is this many times that of A (default 1; 16 is usual)."""

    def resolved(self) -> "LoRAOptions":
        """Return a copy with the defaults filled in."""
        rank = LoRAConfig.rank if self.rank is None else self.rank
        defaults = dataclasses.asdict(LoRAConfig()) | {"rank": rank, "alpha": 2.0 * rank, "plus_ratio": 1.0}
        defaults["modules_to_save"] = ()
        return LoRAOptions(**filled(self, defaults))

    def adapter(self) -> LoRAConfig:
        """Return what the model needs to know, checked."""
        values = dataclasses.asdict(self.resolved())
        del values["plus_ratio"], values["modules_to_save"]
        return LoRAConfig(**values)

    def __post_init__(self):
        """Refuse a ratio without meaning; the rest is checked by what it becomes."""
        positive("lora.", self, "plus_ratio")


@dataclass(frozen=True)
class QuantizationOptions:
    """How method qlora keeps the base's linear layers; all None for other methods."""

    kind: Literal["nf4", "fp4", "int8"] | None = None
    """nf4 (default), fp4, or int8 with one scale a row."""
    block_size: int | None = None
    """Elements that share a scale, a power of two from 32 to 4096 (default 64); not for int8."""
    double_quant: bool | None = None
    """Keep the scales in 8 bits too (default true): 4.127 bits a weight instead of 4.5; not for int8."""

    def resolved(self) -> "QuantizationOptions":
        """Return a copy with the defaults filled in."""
        defaults = dataclasses.asdict(QuantizationConfig())
        return QuantizationOptions(**filled(self, {"kind": "nf4"} if self.kind == "int8" else defaults))

    def config(self) -> QuantizationConfig:
        """Return what the loader needs to know, checked."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return QuantizationConfig(**given)

    def __post_init__(self):
        """Refuse options that int8 ignores; the rest is checked by what it becomes."""
        for name in ("block_size", "double_quant"):
            good = self.kind != "int8" or getattr(self, name) is None
            require(good, f"quantization.{name}", getattr(self, name), "left out: int8 has one fp32 scale a row")


@dataclass(frozen=True)
class PreferenceOptions:
    """Options of the preference objectives; each is None unless the objective has it."""

    beta: float | None = None
    """How closely to stay by the reference (default 0.1; simpo: 2); for ipo tau, for orpo the odds ratio's weight."""
    label_smoothing: float | None = None
    """dpo, robust, cpo: share of pairs taken to be labelled the wrong way round (default 0; robust: 0.1)."""
    sft_weight: float | None = None
    """dpo (RPO), orpo, cpo: weight of the chosen answer's loss per token (default 0 for dpo, 1 for the others)."""
    length_normalized: bool | None = None
    """dpo, ipo: log-ratios per token instead of sums (default false; dpo then wants a larger beta, such as 5)."""
    gamma: float | None = None
    """simpo: the margin to reach (default 1)."""
    desirable_weight: float | None = None
    """kto: weight of desirable answers (default 1)."""
    undesirable_weight: float | None = None
    """kto: weight of undesirable answers (default 1)."""
    reference_cache: str | None = None
    """File of the reference's log-probabilities, made if missing (default: beside the fetched weights)."""
    precompute: bool | None = None
    """Score the data with the reference once instead of at each step (default: only where the adapter can't be off)."""

    def resolved(self, objective: str) -> "PreferenceOptions":
        """Return a copy with the objective's defaults filled in."""
        return PreferenceOptions(**filled(self, OBJECTIVES[objective]))

    def __post_init__(self):
        """Refuse values without meaning."""
        positive("preference.", self, "beta", "desirable_weight", "undesirable_weight")
        smoothing = self.label_smoothing
        require(smoothing is None or 0 <= smoothing < 0.5, "preference.label_smoothing", smoothing, "in [0, 0.5)")
        for name in ("sft_weight", "gamma"):
            value = getattr(self, name)
            require(value is None or 0 <= value < float("inf"), f"preference.{name}", value, "0 or more")

    def check(self, objective: str, needs_cache: bool) -> None:
        """Refuse options that the objective, or a reference that is the model without adapter, ignores."""
        known = OBJECTIVES[objective].keys() | ({"reference_cache", "precompute"} if objective in REFERENCED else set())
        for name, value in dataclasses.asdict(self).items():
            if value is not None and name not in known:
                takers = [other for other, options in OBJECTIVES.items() if name in options] or REFERENCED
                raise ConfigError(f"preference.{name} is set but objective {objective} ignores it; "
                                  f"it belongs to {', '.join(takers)}")  # fmt: skip
        if needs_cache:
            wanted = "true: without a fresh adapter to switch off, the reference is gone after the first step"
            require(self.precompute is not False, "preference.precompute", False, wanted)
        elif self.reference_cache is not None:
            wanted = "true with reference_cache; a fresh adapter is otherwise switched off instead"
            require(self.precompute is True, "preference.precompute", self.precompute, wanted)


# What each penalty may be told, with its defaults; `training/penalty.py` gives equations and sources.
PENALTIES: dict[str, dict[str, Any]] = {"ewc": {"strength": 100.0, "tokens": 16384}, "l2": {"strength": 0.01}}


@dataclass(frozen=True)
class PenaltyOptions:
    """A price on leaving the start, against forgetting; all None unless `kind` is set."""

    kind: Literal["ewc", "l2"] | None = None
    """ewc prices a weight's change by what general text makes of it, l2 every change alike; null is no price."""
    strength: float | None = None
    """Lambda: nats of loss for a nat of drift as the diagonal sees it (ewc, 100), or for |change|^2 / 2 (l2, 0.01)."""
    text: str | None = None
    """ewc: general text, in any format of training data, or a fetched one's name (c4-demo)."""
    tokens: int | None = None
    """ewc: use only so many tokens of it (default 16384)."""
    fisher_cache: str | None = None
    """ewc: file of the Fisher information, made if missing (default: beside the fetched weights)."""

    def __post_init__(self):
        """Refuse values without meaning and options that the kind ignores."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and self.kind != "ewc" and (self.kind is None or name not in ("kind", "strength")):
                wanted = "left out: l2 reads no text" if self.kind else "left out without penalty.kind ewc or l2"
                raise ConfigError(f"penalty.{name} is {value}; it must be {wanted}")
        good = self.strength is None or 0 <= self.strength < float("inf")
        require(good, "penalty.strength", self.strength, "0 or more")
        positive("penalty.", self, "tokens")
        if self.kind == "ewc" and not self.text:
            raise ConfigError("penalty.text is missing; name general text, as in --penalty.text c4-demo")

    def resolved(self) -> "PenaltyOptions":
        """Return a copy with the kind's defaults filled in."""
        return PenaltyOptions(**filled(self, PENALTIES.get(self.kind, {})))
