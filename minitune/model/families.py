"""Which values make each family, and which fields of its `config.json` say them.

A field is used, known to change nothing, allowed at one value only, or an error: the alternative, ignoring what one
does not know, is how a model loads without complaint and answers wrongly. A field that is not there has the value that
transformers gives it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitune.model.config import ModelConfig
from minitune.model.rope import KINDS

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
    "initializer_range": "initializer_range",
}
_HANDLED = {"model_type", "architectures", "eos_token_id"}
# Fields that can have one value only, because another one would change the computation.
_FIXED = {
    "attention_dropout": (0, 0.0),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "use_mrope": (False,),
}
# Fields that describe how the file was made or how other software runs it; no value changes a logit.
_INERT = {
    "_name_or_path", "auto_map", "cache_implementation", "chunk_size_feed_forward", "dtype", "gradient_checkpointing",
    "id2label", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version",
    "use_cache", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
ROPE = ("rope_scaling", "rope_parameters")  # where a rope is described: up to transformers 4, and from 5


@dataclass(frozen=True)
class Family:
    """How one family's `config.json` is read and written. "Field" is one of that file, "value" one of ModelConfig."""

    about: str
    """The models that it is for."""
    architecture: str
    reward_architecture: str | None
    """Transformers' class with a score in the place of the head; None where it has none."""
    used: dict[str, str] = field(default_factory=dict)
    """Field -> value, beside the common ones."""
    unused: tuple[str, ...] = ()
    """Common fields that this family does not have."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Values that are the same in the whole family."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What fields are that are not there."""
    required: tuple[str, ...] = ()
    """Fields whose default in transformers is one model's number, so that a file without them is not believed."""
    fixed: dict[str, tuple] = field(default_factory=dict)
    """Fields that have only these values."""
    inert: tuple[str, ...] = ()
    """Fields that change no logit."""
    activation: str = "hidden_act"
    """The field that names the activation."""
    activations: dict[str, str] = field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    """What it may say -> our name; the first is the default."""
    rope: dict[str, str] = field(default_factory=lambda: {"rope_theta": "rope_theta"})
    """Field -> that of the rope's description, for those that may stand outside of it; empty: there is no rope."""
    rope_defaults: dict[str, float] = field(default_factory=dict)
    """Fields of the description that are not 10,000 (`rope_theta`) or 1 where they are not there."""
    kinds: dict[str, str] = field(default_factory=lambda: {kind: kind for kind in KINDS})
    """The file's name of a kind of rope -> ours."""
    window: tuple[str, ...] = ()
    """Fields that say which layers have a window; empty: none has."""
    slides: Callable[[int, dict[str, Any]], bool] = lambda layer, fields: True
    """Whether a layer has it where `layer_types` is not there, from its index and the fields."""
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: {}
    """Values that follow from fields by arithmetic."""
    restore: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """The fields that `derive` read."""
    derived: tuple[str, ...] = ()
    """Their names."""
    names: tuple[tuple[str, str], ...] = ()
    """Our part of a parameter's name -> that in the family's checkpoints, where they differ (`names.py`)."""
    transposed: tuple[str, ...] = ()
    """Our names of layers whose weights are stored as (in, out)."""

    @property
    def all_fixed(self) -> dict[str, tuple]:
        """Fields that have only these values, those of every family among them."""
        return _FIXED | self.fixed

    @property
    def direct(self) -> dict[str, str]:
        """Field -> value, all that are used as they stand."""
        return {theirs: ours for theirs, ours in _USED.items() if theirs not in self.unused} | self.used

    @property
    def known(self) -> set[str]:
        """All fields that are used, fixed or inert."""
        rope = {*self.rope, *ROPE} if self.rope else set()
        return {*self.direct, *_HANDLED, *_FIXED, *self.fixed, *_INERT, *self.inert, self.activation, *self.window,
                *self.derived, *rope}  # fmt: skip


def _gemma_scales(fields: dict[str, Any]) -> dict[str, Any]:
    scalar = fields.get("query_pre_attn_scalar")
    return {"embedding_scale": fields["hidden_size"] ** 0.5, "attention_scale": scalar**-0.5}  # null or 0: refused


def _query_scalar(config: ModelConfig) -> dict[str, Any]:
    return {"query_pre_attn_scalar": round(config.attention_scale**-2)}  # a whole number in transformers


def _turning(fields: dict[str, Any]) -> tuple[bool, ...]:
    """Return for each layer of SmolLM3 whether it has rope."""
    interval, count = fields.get("no_rope_layer_interval", 4), fields["num_hidden_layers"]
    return tuple(map(bool, fields.get("no_rope_layers") or [(layer + 1) % interval for layer in range(count)]))


_BIAS = {"attention_bias": "attention_bias"}
_BIASES = {**_BIAS, "mlp_bias": "mlp_bias"}
_MANY_HEADS = ("num_key_value_heads",)
_OPTIONAL_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_QWEN: dict[str, Any] = {
    "defaults": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "window": _OPTIONAL_WINDOW,
    "slides": lambda layer, fields: layer >= fields["max_window_layers"],
}
_GEMMA = {"norm_offset": 1.0}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "sliding_window": 4096,
                   "query_pre_attn_scalar": 256}  # fmt: skip
_GEMMA_FIXED = {"use_bidirectional_attention": (None, False)}
_GELU = ("gelu_pytorch_tanh",)
_TANH = {"gelu_pytorch_tanh": "gelu_tanh"}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", **_TANH}
_CAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logits_softcap"}
_CLASSIC = {"norm": "layer", "gated": False, "mlp_bias": True}
_NO_KV = ("num_key_value_heads", "head_dim", "rms_norm_eps")

FAMILIES = {
    "llama": Family(
        about="Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2 and others of that form",
        architecture="LlamaForCausalLM",
        reward_architecture="LlamaForSequenceClassification",
        used=_BIASES,
        fixed={"pretraining_tp": (1,), "rope_interleaved": (False,), "is_llama_config": (True, None),
               "use_sliding_window": (False,), "sliding_window": (None,)},
    ),
    "mistral": Family(
        about="Mistral 7B, Nemo",
        architecture="MistralForCausalLM",
        reward_architecture="MistralForSequenceClassification",
        required=_MANY_HEADS,
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
        window=("sliding_window",),
    ),
    "qwen2": Family(
        about="Qwen2, Qwen2.5",
        architecture="Qwen2ForCausalLM",
        reward_architecture="Qwen2ForSequenceClassification",
        required=_MANY_HEADS,
        constants={"attention_bias": True, "output_bias": False}, **_QWEN,
    ),
    "qwen3": Family(
        about="Qwen3 (dense)",
        architecture="Qwen3ForCausalLM",
        reward_architecture="Qwen3ForSequenceClassification",
        required=(*_MANY_HEADS, "head_dim"),
        used=_BIAS, constants={"qk_norm": "head"}, **_QWEN,
    ),
    "gemma": Family(
        about="Gemma 1",
        architecture="GemmaForCausalLM",
        reward_architecture="GemmaForSequenceClassification",
        required=(*_MANY_HEADS, "head_dim"),
        used=_BIAS, constants=_GEMMA, defaults=_GEMMA_DEFAULTS,
        fixed={**_GEMMA_FIXED, "hidden_activation": (None, *_GELU)},
        activations={**_TANH, "gelu": "gelu_tanh"},  # the first files say gelu and mean its tanh form
        derive=lambda fields: {"embedding_scale": fields["hidden_size"] ** 0.5},
    ),
    "gemma2": Family(
        about="Gemma 2",
        architecture="Gemma2ForCausalLM",
        reward_architecture="Gemma2ForSequenceClassification",
        required=(*_MANY_HEADS, "head_dim"),
        used={**_BIAS, **_CAPS}, constants={**_GEMMA, "norm_placement": "around"},
        defaults={**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed={**_GEMMA_FIXED, "hidden_act": _GELU},
        inert=("sliding_window_size",),  # of the first files, beside sliding_window, which is what is read
        activation="hidden_activation", activations=_TANH,
        window=("sliding_window", "layer_types"),
        slides=lambda layer, fields: layer % 2 == 0,
        derive=_gemma_scales, restore=_query_scalar, derived=("query_pre_attn_scalar",),
    ),
    "gemma3_text": Family(
        about="Gemma 3 (text)",
        architecture="Gemma3ForCausalLM",
        reward_architecture="Gemma3TextForSequenceClassification",
        required=(*_MANY_HEADS, "head_dim"),
        used={**_BIAS, "final_logit_softcapping": "logits_softcap"},
        constants={**_GEMMA, "norm_placement": "around", "qk_norm": "head"},
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        # Transformers has no code for a cap in attention here, whatever the field says.
        fixed={**_GEMMA_FIXED, "hidden_act": _GELU, "attn_logit_softcapping": (None,)},
        activation="hidden_activation", activations=_TANH,
        window=("sliding_window", "layer_types", "sliding_window_pattern"),
        slides=lambda layer, fields: (layer + 1) % fields.get("sliding_window_pattern", 6) != 0,
        derive=_gemma_scales, restore=_query_scalar,
        derived=("query_pre_attn_scalar", "rope_local_base_freq", "_sliding_window_pattern"),
    ),
    "phi3": Family(
        about="Phi-3, Phi-3.5, Phi-4-mini",
        architecture="Phi3ForCausalLM",
        reward_architecture="Phi3ForSequenceClassification",
        constants={"fused": "stacked"},
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        fixed={"resid_pdrop": (0, 0.0), "embd_pdrop": (0, 0.0), "attention_bias": (False,), "mlp_bias": (False,),
               "lm_head_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)},
        rope={"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor",
              "original_max_position_embeddings": "original_max_position_embeddings"},
        kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
        window=("sliding_window",),
    ),
    "olmo2": Family(
        about="OLMo-2",
        architecture="Olmo2ForCausalLM",
        reward_architecture="Olmo2ForSequenceClassification",
        used=_BIAS,
        constants={"norm_placement": "after", "qk_norm": "all"}, defaults={"rms_norm_eps": 1e-5},
    ),
    "granite": Family(
        about="Granite 3 (dense)",
        architecture="GraniteForCausalLM",
        reward_architecture=None,
        used={**_BIASES, "embedding_multiplier": "embedding_scale", "attention_multiplier": "attention_scale",
              "residual_multiplier": "residual_scale", "logits_scaling": "logits_scale"},
        defaults={"attention_multiplier": 1.0},
        fixed={"attention_dropout": (0, 0.0, 0.1)},  # 0.1 in its first training, which fine-tuning does not repeat
    ),
    "smollm3": Family(
        about="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        reward_architecture="SmolLM3ForSequenceClassification",
        required=_MANY_HEADS,
        used=_BIASES,
        defaults={"tie_word_embeddings": True, "max_position_embeddings": 32768, "sliding_window": None},
        rope_defaults={"rope_theta": 2000000.0},
        inert=("pretraining_tp", "max_window_layers"),  # the published file has both; nothing reads them
        window=("use_sliding_window", "sliding_window", "layer_types"),
        slides=lambda layer, fields: not _turning(fields)[layer],
        derive=lambda fields: {"rope_layers": _turning(fields)},
        restore=lambda config: {"no_rope_layers": [int(turns) for turns in config.rope_layers]},
        derived=("no_rope_layers", "no_rope_layer_interval"),
    ),
    "gpt2": Family(
        about="GPT-2",
        architecture="GPT2LMHeadModel",
        reward_architecture="GPT2ForSequenceClassification",
        used={"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_layers", "n_head": "num_heads",
              "n_positions": "max_positions", "layer_norm_epsilon": "norm_eps"},
        unused=(*_NO_KV, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings"),
        derive=lambda fields: {} if fields.get("n_inner") else {"intermediate_size": 4 * fields["n_embd"]},
        constants={**_CLASSIC, "fused": "stacked", "learned_positions": True, "attention_bias": True},
        defaults={"tie_word_embeddings": True, "n_positions": 1024, "layer_norm_epsilon": 1e-5},
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
               "add_cross_attention": (False,)},
        # The dropout of its first training is not repeated in fine-tuning; the summary is a classifier's.
        inert=("n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj",
               "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn"),
        activation="activation_function",
        activations={"gelu_new": "gelu_tanh", **_GELUS},
        rope={},
        names=(
            ("model.embed_tokens", "transformer.wte"), ("model.embed_positions", "transformer.wpe"),
            ("model.layers", "transformer.h"), ("self_attn.qkv_proj", "attn.c_attn"),
            ("self_attn.o_proj", "attn.c_proj"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
            ("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj"), ("model.norm", "transformer.ln_f"),
        ),
        transposed=("qkv_proj", "o_proj", "up_proj", "down_proj"),
    ),
    "gpt_neox": Family(
        about="GPT-NeoX, Pythia",
        architecture="GPTNeoXForCausalLM",
        reward_architecture="GPTNeoXForSequenceClassification",
        used={**_BIAS, "layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel_residual"},
        unused=_NO_KV,
        constants={**_CLASSIC, "fused": "by_head"},
        defaults={"attention_bias": True, "use_parallel_residual": True, "layer_norm_eps": 1e-5},
        rope_defaults={"partial_rotary_factor": 0.25},
        fixed={"hidden_dropout": (0, 0.0)},
        inert=("classifier_dropout", "is_decoder", "attention_probs_dropout_prob", "hidden_dropout_prob"),
        activations={**_GELUS, "gelu_fast": "gelu_tanh"},
        rope={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        names=(
            ("model.embed_tokens", "gpt_neox.embed_in"), ("model.layers", "gpt_neox.layers"),
            ("self_attn.qkv_proj", "attention.query_key_value"), ("self_attn.o_proj", "attention.dense"),
            ("mlp.up_proj", "mlp.dense_h_to_4h"), ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("model.norm", "gpt_neox.final_layer_norm"), ("lm_head", "embed_out"),
        ),
    ),
}  # fmt: skip
