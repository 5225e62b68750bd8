"""The values that make a family: one frozen record, parsed strictly.

A family is not code here but values (widths, heads, rope base, tied head). A field of `config.json` is
used, known to change nothing, allowed at one value only, or an error: the alternative, ignoring what one
does not know, is how a model loads without complaint and answers wrongly.
"""

from dataclasses import dataclass
from typing import Any

from minitune.errors import ConfigError, nearest
from minitune.model.lora_config import LoRAConfig as LoRAConfig  # beside the others, for users
from minitune.ops.quantization import QuantizationConfig as QuantizationConfig  # beside the others, for users

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
REWARD_ARCHITECTURES = {"llama": "LlamaForSequenceClassification"}

# config.json field -> our field, for fields that are used as they stand.
_USED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
    "bos_token_id": "bos_id",
    "pad_token_id": "pad_id",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "initializer_range",
}
_HANDLED = {"model_type", "architectures", "eos_token_id", "rope_theta", "rope_parameters", "rope_scaling"}
# Fields that can have one value only, because another one would change the computation.
_FIXED = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "attention_dropout": (0, 0.0),
    "rope_interleaved": (False,),
    "is_llama_config": (True, None),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
}
# Fields that describe how the file was made or how other software runs it; no value changes a logit.
_INERT = {
    "_name_or_path", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers.js_config",
    "transformers_version", "use_cache", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shape and arithmetic.

    Widths are in elements: `hidden_size` D, `intermediate_size` F, `head_dim` d; counts: `num_layers`,
    `num_heads` H, `num_kv_heads` K (H is a multiple of K), `vocab_size` V. `rope_theta` is the base of the
    rotary frequencies, `norm_eps` the epsilon of RMSNorm, `max_positions` the longest trained context in
    tokens, `initializer_range` the standard deviation of freshly drawn weights. With `reward` the head is one row that
    maps a text's last hidden state to a number, instead of the vocabulary's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    reward: bool = False

    def __post_init__(self):
        """Refuse shapes that cannot be a model."""
        counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                  "head_dim", "max_positions")  # fmt: skip
        for name in (*counts, "rope_theta", "norm_eps", "initializer_range"):
            value, kinds = getattr(self, name), (int,) if name in counts else (int, float)
            if type(value) not in kinds or not 0 < value < float("inf"):
                whole = "whole " if name in counts else ""
                raise ConfigError(f"model config: {name} is {value!r}; it must be a positive {whole}number")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        for name, ids in (("bos", (self.bos_id,)), ("eos", self.eos_ids), ("pad", (self.pad_id,))):
            for token in ids:
                if token is not None and not (isinstance(token, int) and -1 <= token < self.vocab_size):
                    raise ConfigError(f"model config: {name} id {token!r} is outside the {self.vocab_size} tokens")

    @classmethod
    def from_hf(cls, fields: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the content of a Hugging Face `config.json`.

        Args:
            fields: the parsed JSON object.
            where: the file's name, for error lines.

        Raises:
            ConfigError: an architecture, field or value that this engine does not implement.
        """
        family = fields.get("model_type")
        if family not in ARCHITECTURES:
            raise ConfigError(
                f"{where}: model_type {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
                + nearest(str(family), ARCHITECTURES)
            )
        architectures = fields.get("architectures") or [ARCHITECTURES[family]]
        reward = architectures == [REWARD_ARCHITECTURES[family]]
        if architectures != [ARCHITECTURES[family]] and not reward:
            raise ConfigError(f"{where}: architectures {architectures} is not [{ARCHITECTURES[family]!r}]")
        if reward and len(fields.get("id2label") or "??") != 1:  # without the field, transformers' default is 2 labels
            raise ConfigError(f"{where}: a classifier of several labels; a reward model has one (id2label)")
        _check_fields(fields, where)
        missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                     "num_attention_heads") if fields.get(name) is None]  # fmt: skip
        if missing:
            raise ConfigError(f"{where}: the field {missing[0]} is missing")
        values = {ours: fields[theirs] for theirs, ours in _USED.items() if fields.get(theirs) is not None}
        values.setdefault("num_kv_heads", values["num_heads"])
        if "head_dim" not in values:
            if not values["num_heads"] or values["hidden_size"] % values["num_heads"]:
                raise ConfigError(f"{where}: head_dim is missing and heads do not divide hidden_size")
            values["head_dim"] = values["hidden_size"] // values["num_heads"]
        eos = fields.get("eos_token_id")
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        try:
            return cls(family=family, rope_theta=_rope_theta(fields, where), eos_ids=eos_ids, reward=reward, **values)
        except ConfigError as error:
            raise ConfigError(str(error).replace("model config", where)) from None

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers reads (4.x and 5.x field names)."""
        fields = {theirs: getattr(self, ours) for theirs, ours in _USED.items()}
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        head = {"architectures": [ARCHITECTURES[self.family]]}
        if self.reward:
            head = {"architectures": [REWARD_ARCHITECTURES[self.family]], "id2label": {"0": "LABEL_0"},
                    "label2id": {"LABEL_0": 0}}  # fmt: skip
        return {
            "model_type": self.family,
            **head,
            **fields,
            "eos_token_id": eos,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


def _check_fields(fields: dict[str, Any], where: str) -> None:
    """Raise ConfigError for a field that is not known, or known but at a value that is not implemented."""
    known = {*_USED, *_HANDLED, *_FIXED, *_INERT}
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(
                f"{where}: the field {name!r} is not known to this engine and may change the model; "
                f"it is refused rather than ignored{nearest(name, known)}"
            )
        if name in _FIXED and value not in _FIXED[name]:
            raise ConfigError(f"{where}: {name} = {value!r} is not implemented (only {_FIXED[name][0]!r} is)")


def _rope_theta(fields: dict[str, Any], where: str) -> float:
    """Return the rotary base from `rope_parameters` (transformers 5) or `rope_theta` (4)."""
    theta = fields.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{where}: {name} is {rope!r}; it must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = [f"the field {field!r}" for field in sorted(set(rope) - {"rope_type", "type", "rope_theta"})]
        if kind != "default" or unknown:
            detail = f"kind {kind!r}" if kind != "default" else unknown[0]
            raise ConfigError(f"{where}: {name} with {detail} is not implemented (only the default rope is)")
        inner = rope.get("rope_theta")
        if None not in (inner, theta) and inner != theta:
            raise ConfigError(f"{where}: rope_theta is {theta} but {name} says {inner}")
        theta = theta if inner is None else inner
    return 10000.0 if theta is None else theta
