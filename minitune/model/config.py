"""The values that make a model: one frozen record, the same for every family.

A family is not code here but values: where norms stand, what attention's scores are multiplied by, which layers see a
window. `families.py` reads them from a `config.json` and writes them back. The alternative, a class for each family,
repeats the same hundred lines with a difference that nobody sees.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from minitune.errors import ConfigError
from minitune.model.lora_config import LoRAConfig as LoRAConfig  # beside the others, for users
from minitune.model.rope import Rope
from minitune.ops.quantization import QuantizationConfig as QuantizationConfig  # likewise

_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
           "max_positions")  # fmt: skip
_LARGEST = 2**53  # of a factor: an integer beyond it is no float
_FACTORS = ("norm_eps", "initializer_range", "embedding_scale", "residual_scale", "logits_scale")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shape and arithmetic.

    Widths are in elements, counts are numbers; H is a multiple of K.
    """

    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    intermediate_size: int
    """F."""
    num_layers: int
    num_heads: int
    """H."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """d."""
    family: str = "llama"
    """Name of the family in `families.py`; it decides names in files only."""
    rope: Rope | None = field(default_factory=Rope)
    """How positions turn queries and keys; None: they do not."""
    local_rope: Rope | None = None
    """Of layers with a window, where it differs."""
    rope_layers: tuple[bool, ...] = ()
    """For each layer, whether it turns; empty: all do."""
    learned_positions: bool = False
    """Add a learned vector for each position to the embedding."""
    windows: tuple[int | None, ...] = ()
    """For each layer, how many tokens one sees, itself among them; None or no entry: all before it."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to the norms' weights: 1 in Gemma, which stores w - 1."""
    norm_placement: Literal["before", "after", "around"] = "before"
    """Norms before attention and MLP, after them, or both."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Norms of queries and keys: none, over each head's d, or over all heads' H d and K d."""
    attention_bias: bool = False
    """Biases of q, k and v."""
    output_bias: bool = False
    """Bias of attention's output."""
    mlp_bias: bool = False
    fused: Literal["none", "stacked", "by_head"] = "none"
    """Whether q, k and v are one module, with rows [q; k; v] or head by head; gate and up are one too then."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    """The MLP is down(act(gate) up), else down(act(up))."""
    parallel_residual: bool = False
    """Attention and MLP read the same input."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(d)."""
    attention_softcap: float | None = None
    """c in scores c tanh(s / c)."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by."""
    residual_scale: float = 1.0
    """What attention and MLP are multiplied by before they are added."""
    logits_scale: float = 1.0
    """What logits are divided by."""
    logits_softcap: float | None = None
    """c in logits c tanh(z / c)."""
    tie_embeddings: bool = False
    max_positions: int = 2048
    """The longest trained context, in tokens."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""
    reward: bool = False
    """The head is one row that maps a text's last hidden state to a number, instead of the vocabulary's."""

    def __post_init__(self):
        """Refuse what cannot be a model."""
        for name in _COUNTS:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(
                    f"model config: {name} is {getattr(self, name)!r}; it must be a positive whole number"
                )
        optional = ("attention_scale", "attention_softcap", "logits_softcap")
        given = [name for name in optional if getattr(self, name) is not None]
        for name in (*_FACTORS, *given):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < _LARGEST:
                raise ConfigError(f"model config: {name} is {value!r}; it must be a positive number")
        for name in ("attention_bias", "output_bias", "mlp_bias", "tie_embeddings", "parallel_residual"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"model config: {name} is {getattr(self, name)!r}; it must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.fused == "by_head" and self.num_heads != self.num_kv_heads:
            raise ConfigError("model config: q, k and v lie head by head, so there must be as many k as q heads")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.check(self.head_dim)
        if self.local_rope is not None and self.local_rope.by_length:
            raise ConfigError(f"a rope of kind {self.local_rope.kind!r} is not implemented for layers with a window")
        self._check_layers()
        for name, ids in (("bos", (self.bos_id,)), ("eos", self.eos_ids), ("pad", (self.pad_id,))):
            for token in ids:
                if token is not None and not (isinstance(token, int) and -1 <= token < self.vocab_size):
                    raise ConfigError(f"model config: {name} id {token!r} is outside the {self.vocab_size} tokens")

    def _check_layers(self) -> None:
        for name, values in (("rope_layers", self.rope_layers), ("windows", self.windows)):
            if values and len(values) != self.num_layers:
                raise ConfigError(f"model config: {name} names {len(values)} layers; there are {self.num_layers}")
        for window in self.windows:
            if window is not None and (type(window) is not int or window < 1):
                raise ConfigError(f"model config: a layer's window is {window!r}; it must be a positive whole number")

    def window(self, layer: int) -> int | None:
        """Return how many tokens a token of that layer sees; None: all before it."""
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> Rope | None:
        """Return how that layer turns queries and keys; None: it does not."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        return self.local_rope if self.local_rope and self.window(layer) else self.rope

    @property
    def by_length(self) -> bool:
        """Whether what a token becomes depends on how long its text will be; then padding must be told from text."""
        return self.rope is not None and self.rope.by_length

    @property
    def longest(self) -> int:
        """How many tokens a text may have: the trained context, or what the rope stretches it to as it grows."""
        stretched = self.rope is not None and self.rope.kind == "dynamic"
        return int(self.max_positions * self.rope.factor) if stretched else self.max_positions

    @classmethod
    def from_hf(cls, fields: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the content of a Hugging Face `config.json`; see `hf_config.read`."""
        from minitune.model.hf_config import read  # which imports this file

        return read(fields, where)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers reads; see `hf_config.write`."""
        from minitune.model.hf_config import write

        return write(self)
