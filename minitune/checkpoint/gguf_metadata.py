"""What GGUF metadata says of a model, and a model as GGUF metadata: one table read in both directions.

Each architecture of llama.cpp is a family here. Its keys are values of `ModelConfig`; families.py knows the fields of
`config.json` that those are, and what a family's file leaves out. A key that is not in the table is refused, and so is
one that contradicts what the family says. Reading keys into a model directly was rejected: it would be a second place
that knows each family's defaults.

Some things have no key. llama.cpp's code decides them, so they are values of this table: Gemma's query scale, SmolLM3's
layers without rope. Llama 3's rope is a tensor of factors, from which its settings follow (`_llama3_settings`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from minitune.errors import CheckpointError, nearest
from minitune.model.config import ModelConfig
from minitune.model.families import FAMILIES
from minitune.model.rope import Rope
from minitune.ops.rope import inverse_frequencies

ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3: what each pair's frequency is divided by
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# Key, after "ARCHITECTURE." -> value of ModelConfig.
_COMMON = {
    "vocab_size": "vocab_size",
    "context_length": "max_positions",
    "embedding_length": "hidden_size",
    "block_count": "num_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.value_length": "head_dim",
    "attention.key_length": "head_dim",  # the last one counts, and the other must agree
}
_NEEDED = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count")
_RMS = {"attention.layer_norm_rms_epsilon": "norm_eps"}
_LAYER = {"attention.layer_norm_epsilon": "norm_eps"}
_LOGITS_CAP = {"final_logit_softcapping": "logits_softcap"}
_WINDOW = "attention.sliding_window"
_SCALING = "rope.scaling."
# Keys of a scaled rope -> settings of config.json's.
_ROPE_SETTINGS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_ROPE_KEYS = {"rope.freq_base", "rope.dimension_count", _SCALING + "type", _SCALING + "attn_factor",
              *(_SCALING + key for key in _ROPE_SETTINGS)}  # fmt: skip
_IDS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")  # all of them end an answer


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes one family."""

    family: str
    own: dict[str, str] = field(default_factory=lambda: _RMS)
    """Keys beside the common ones -> values of ModelConfig."""
    interleaved: bool = False
    """Rows of q and k lie as (heads, pair, half), for a rope that turns neighbours."""
    window: bool = False
    """There is a key for a window; which layers have it is the family's."""
    two_ropes: bool = False
    """There is a key for the rope of layers with a window."""
    tied: bool | None = None
    """Whether the head is the embedding, where llama.cpp knows one way only."""
    largest: int = 0
    """Layers of the one size whose query scale is 1 / sqrt(D / H); of others it is 1 / sqrt(d)."""

    @property
    def values(self) -> dict[str, str]:
        """Key -> value of ModelConfig."""
        return _COMMON | self.own

    @property
    def known(self) -> set[str]:
        """All keys."""
        known = {*self.values, *({_WINDOW} if self.window else ()), *(_ROPE_KEYS if FAMILIES[self.family].rope else ())}
        return known | {"rope.freq_base_swa"} if self.two_ropes else known


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),  # and Mistral without its window, SmolLM2
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", tied=True),
    "gemma2": Architecture(
        "gemma2", {**_RMS, **_LOGITS_CAP, "attn_logit_softcapping": "attention_softcap"},
        window=True, tied=True, largest=46,
    ),
    "gemma3": Architecture("gemma3_text", {**_RMS, **_LOGITS_CAP}, window=True, two_ropes=True, largest=62),
    "phi3": Architecture("phi3", window=True),
    "olmo2": Architecture("olmo2", tied=False),
    "granite": Architecture(
        "granite",
        {**_RMS, "attention.scale": "attention_scale", "embedding_scale": "embedding_scale",
         "residual_scale": "residual_scale", "logit_scale": "logits_scale"},
        interleaved=True,
    ),
    "smollm3": Architecture("smollm3", interleaved=True),
    "gpt2": Architecture("gpt2", _LAYER),
    "gptneox": Architecture("gpt_neox", {**_LAYER, "use_parallel_residual": "parallel_residual"}, tied=False),
}  # fmt: skip
_NAMES = {architecture.family: name for name, architecture in ARCHITECTURES.items()} | {"mistral": "llama"}
_Shapes = Mapping[str, tuple[int, ...]]


def architecture_of(config: ModelConfig) -> str:
    """Return llama.cpp's name of a model's family."""
    return _NAMES[config.family]


def read_fields(
    metadata: Mapping[str, Any], shapes: _Shapes, vector: Callable[[str], list[float]], where: str
) -> dict[str, Any]:
    """Return the content of `config.json` that metadata and shapes of tensors amount to.

    Args:
        metadata: keys and values; arrays may be None.
        shapes: each tensor's, under its name in the file.
        vector: reads a tensor of the file, a short one.
        where: the file, for error lines.

    Raises:
        CheckpointError: an architecture or key that is not known, or a key that contradicts the others.
    """
    name = metadata.get("general.architecture")
    kind = "part of one" if metadata.get("split.count", 1) not in (0, 1) else metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{where} is not a whole model but {kind}; give a model in one file")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {name!r} is not supported in GGUF; supported: {', '.join(ARCHITECTURES)}"
            + nearest(str(name), ARCHITECTURES)
        )
    architecture = ARCHITECTURES[name]
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    unknown = sorted(set(values) - architecture.known)
    if unknown:
        raise CheckpointError(
            f"{where}: the field {name}.{unknown[0]} is not known to this engine and may change the model; "
            f"it is refused rather than ignored"
        )
    _check_numbers(values, f"{where}: the field {name}")
    if values["block_count"] > len(shapes):  # before anything of that many layers is made
        raise CheckpointError(
            f"{where}: {values['block_count']:,} layers are claimed, but there are {len(shapes)} tensors"
        )
    found = _fields(architecture, values, metadata, shapes)
    found |= _rope_fields(architecture, values, shapes, vector, where)
    _check(architecture, values, ModelConfig.from_hf(found, where), f"{where}: the field {name}")
    return found


def _check_numbers(values: dict[str, Any], what: str) -> None:
    """Raise CheckpointError for a size that is missing or no positive whole number, and for what is no number."""
    for key in _NEEDED:
        if key not in values:
            raise CheckpointError(f"{what}.{key} is missing")
    for key, value in values.items():
        whole = key in _COMMON
        number = type(value) is int if whole else isinstance(value, int | float)
        if key != _SCALING + "type" and not (number and whole <= value < math.inf):
            needed = "a positive whole number" if whole else "a number from 0 up"
            raise CheckpointError(f"{what}.{key} is {value!r}; it must be {needed}")


def _fields(architecture: Architecture, values: dict, metadata: Mapping[str, Any], shapes: _Shapes) -> dict[str, Any]:
    """Return the fields that do not describe a rope."""
    stored = {ours: values[key] for key, ours in architecture.values.items() if key in values}
    stored.setdefault("vocab_size", next(iter(shapes.get("token_embd.weight", ())), None))
    stored.setdefault("num_kv_heads", stored["num_heads"])
    stored.setdefault("head_dim", stored["hidden_size"] // stored["num_heads"])
    stored["tie_embeddings"] = "output.weight" not in shapes
    stored["attention_bias"] = not shapes.keys().isdisjoint({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"})
    stored["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    theirs = {ours: name for name, ours in FAMILIES[architecture.family].direct.items()}
    fields = {theirs[ours]: value for ours, value in stored.items() if ours in theirs}
    if architecture.window:
        fields["sliding_window"] = values.get(_WINDOW) or None
    if architecture.largest:
        per_head = stored["hidden_size"] // stored["num_heads"]
        largest = stored["num_layers"] == architecture.largest
        fields["query_pre_attn_scalar"] = per_head if largest else stored["head_dim"]
    ids = {theirs: metadata.get(f"tokenizer.ggml.{ours}") for ours, theirs in _IDS.items()}
    stops = dict.fromkeys(metadata.get(f"tokenizer.ggml.{name}") for name in STOPS)
    return {"model_type": architecture.family, **fields, **ids, "eos_token_id": [id for id in stops if id is not None]}


def _check(architecture: Architecture, values: dict[str, Any], config: ModelConfig, what: str) -> None:
    """Raise CheckpointError where a key is not what the whole amounts to."""
    for key, ours in architecture.values.items():
        if key in values and not _close(values[key], getattr(config, ours)):
            expected = getattr(config, ours)
            raise CheckpointError(f"{what}.{key} is {values[key]!r}, which is not implemented here (only {expected!r})")


def write_values(config: ModelConfig) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return a model's keys without the architecture's name, and the vectors that describe its rope.

    What has no key is left out; only reading the result again (`lost`) tells whether that was all.
    """
    architecture = ARCHITECTURES[architecture_of(config)]
    values = {key: getattr(config, ours) for key, ours in architecture.values.items()}
    if architecture.window:
        values[_WINDOW] = max((window for window in config.windows if window), default=0)
    if architecture.two_ropes and config.local_rope:
        values["rope.freq_base_swa"] = config.local_rope.theta
    found, vectors = ({}, {}) if config.rope is None else _rope_values(config)
    return {key: value for key, value in (values | found).items() if value is not None}, vectors


def lost(config: ModelConfig, again: ModelConfig) -> list[str]:
    """Return the values, as text, that a file does not say of the model that was written into it."""
    apart = {"family", "initializer_range", "bos_id", "eos_ids", "pad_id"}  # names, training and the tokenizer's
    names = [item.name for item in fields(ModelConfig) if item.name not in apart]
    return [
        f"{name} {getattr(config, name)!r}" for name in names if not _close(getattr(config, name), getattr(again, name))
    ]


def _close(one: Any, other: Any) -> bool:
    """Tell whether two values are equal as far as fp32, in which metadata is stored, resolves them."""
    if isinstance(one, Rope) and isinstance(other, Rope):
        return all(_close(value, vars(other)[name]) for name, value in vars(one).items())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_close(*pair) for pair in zip(one, other, strict=True))
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else one == other


def _rope_fields(
    architecture: Architecture, values: dict[str, Any], shapes: _Shapes, vector: Callable, where: str
) -> dict[str, Any]:
    """Return the fields of `config.json` that describe the ropes."""
    names = {setting: name for name, setting in FAMILIES[architecture.family].rope.items()}
    if not names:
        return {}
    theta = values.get("rope.freq_base", 10000.0)
    width = values.get("attention.key_length", values["embedding_length"] // values["attention.head_count"])
    turned = values.get("rope.dimension_count", width)
    found: dict[str, Any] = {names["rope_theta"]: theta}
    if "partial_rotary_factor" in names:
        found[names["partial_rotary_factor"]] = turned / max(width, 1)
    elif turned != width:
        raise CheckpointError(f"{where}: {turned} of a head's {width} elements are turned; this family turns them all")
    if architecture.two_ropes:
        found["rope_local_base_freq"] = values.get("rope.freq_base_swa", 10000.0)
    given = {setting: values[_SCALING + key] for key, setting in _ROPE_SETTINGS.items() if _SCALING + key in values}
    kind = values.get(_SCALING + "type", "linear" if "factor" in given else "none")
    if kind == "none" or kind == "linear" and given.get("factor", 1) in (0, 1):  # which is not to scale
        kind = "llama3" if ROPE_FACTORS in shapes else "longrope" if LONG_FACTORS in shapes else "default"
    strange = {ROPE_FACTORS: kind == "llama3", LONG_FACTORS: kind == "longrope", SHORT_FACTORS: kind == "longrope"}
    for name, expected in strange.items():
        if (name in shapes) != expected:
            raise CheckpointError(f"{where}: {name} is {'missing' if expected else 'there'} in a rope of kind {kind}")
    if kind != "longrope" and values.get(_SCALING + "attn_factor", 1) != 1:
        raise CheckpointError(f"{where}: {_SCALING}attn_factor is not implemented in a rope of kind {kind}")
    if kind == "default":
        return found
    if kind == "llama3":
        given = _llama3_settings(vector(ROPE_FACTORS), turned, theta, where)
    elif kind == "linear":
        given.pop("original_max_position_embeddings", None)
    elif kind == "longrope":
        given = _longrope_settings(values, given, vector)
        if "original_max_position_embeddings" in names:
            found["original_max_position_embeddings"] = given.pop("original_max_position_embeddings")
    return found | {"rope_scaling": {"rope_type": kind, **given}}


def _rope_values(config: ModelConfig) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the keys and the vectors that describe a model's rope; nothing beside the base of a kind without keys."""
    rope, kind = config.rope, config.rope.kind
    values: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.width(config.head_dim)}
    if kind == "llama3":
        return values, {ROPE_FACTORS: _llama3_factors(rope, rope.width(config.head_dim)).tolist()}
    trained = rope.original_positions or config.max_positions
    if kind in ("linear", "yarn", "longrope"):
        values[_SCALING + "type"] = kind
    if kind in ("linear", "yarn"):  # with longrope llama.cpp would divide by it once more
        values[_SCALING + "factor"] = rope.factor
    if kind in ("yarn", "longrope"):
        values[_SCALING + "original_context_length"] = trained
        values |= {_SCALING + "yarn_beta_fast": rope.beta_fast, _SCALING + "yarn_beta_slow": rope.beta_slow}
    if kind != "longrope":
        return values, {}
    values[_SCALING + "attn_factor"] = rope.attention_factor or _longrope_scale(config.max_positions, trained)
    return values, {LONG_FACTORS: list(rope.long_factor), SHORT_FACTORS: list(rope.short_factor)}


def _longrope_scale(positions: int, trained: int) -> float:
    """Return what cos and sin are multiplied by where the file does not say (Phi-3)."""
    return math.sqrt(1 + math.log(max(positions / trained, 1.0)) / math.log(trained))


def _longrope_settings(values: dict[str, Any], given: dict[str, Any], vector: Callable) -> dict[str, Any]:
    """Return the settings of a rope with a factor for each pair; a common one beside them is not known (refused)."""
    positions = values.get("context_length", 0)
    given = {"original_max_position_embeddings": positions, **given}
    scale = values.get(_SCALING + "attn_factor", 1.0)  # llama.cpp's default
    if not _close(scale, _longrope_scale(positions, given["original_max_position_embeddings"])):
        given["attention_factor"] = scale
    return {**given, "short_factor": vector(SHORT_FACTORS), "long_factor": vector(LONG_FACTORS)}


def _llama3_factors(rope: Rope, width: int) -> torch.Tensor:
    """Return what Llama 3's rope divides each frequency by: (width / 2,) in fp64."""
    plain = inverse_frequencies(width, rope.theta)
    turns = rope.original_positions * plain / (2 * math.pi)
    between = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - between) / rope.factor + between)


def _llama3_settings(factors: list[float], width: int, theta: float, where: str) -> dict[str, Any]:
    """Return the settings that give these factors; CheckpointError where there are none.

    With wavelength w, factor s and trained context c, a pair between the two bounds has the share
    (c / w - low) / (high - low) of its own frequency, and 1 / (share + (1 - share) / s) is its factor. Only c / low and
    c / high count, so low is set to 1; high is 4 in every Llama, and any pair between tells c = (1 + 3 share) w.
    """
    factor = max(factors, default=1.0)
    waves = (2 * math.pi / inverse_frequencies(width, theta)).tolist()
    pairs = list(zip(waves, factors, strict=False))
    between = [(wave, (1 / own - 1 / factor) / (1 - 1 / factor)) for wave, own in pairs if 1 < own < factor]
    contexts = [round((1 + 3 * share) * wave) for wave, share in between]
    for context in contexts or [math.ceil(4 * wave) for wave, own in pairs if own == 1]:
        settings = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": context}
        if _fits(settings, factors, width, theta):
            settings["original_max_position_embeddings"] = settings.pop("original_positions")
            return settings
    raise CheckpointError(f"{where}: {ROPE_FACTORS} is not a rope of Llama 3's kind, which is the only one known here")


def _fits(settings: dict[str, Any], factors: list[float], width: int, theta: float) -> bool:
    """Tell whether the settings give the factors, in fp32."""
    if settings["factor"] <= 1 or len(factors) != width // 2 or not 0 < settings["original_positions"] < 1 << 31:
        return False
    expected = _llama3_factors(Rope(theta=theta, kind="llama3", **settings), width)
    return torch.allclose(expected, torch.tensor(factors, dtype=torch.float64), rtol=1e-5, atol=0)
