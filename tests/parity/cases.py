"""The table of the certificate: each family as transformers' config class and a tiny model's fields.

Sizes are small but every mechanism is at work: rows are longer than the window and than the original context, caps
are low enough to bite, multipliers are far from 1, and each family comes with several head counts, tied and untied
heads, and a head width that is not D/H where it has the field.
"""

from dataclasses import dataclass, field
from typing import Any

LENGTH = 40  # tokens of a row: beyond WINDOW and CONTEXT
WINDOW = 7
CONTEXT = 16  # the "original" context of scaled rope
VOCABULARY = 131
WIDE = 16  # a head width that is not D/H = 8

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_GPT2_SIZES = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tiny model: `family` is its row on the page, `variant` what distinguishes it from the row's other models."""

    family: str
    variant: str
    kind: str
    """Name of transformers' config class, without "Config"."""
    fields: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """Unique in the table."""
        return f"{self.family} {self.variant}"

    def config(self, **changes: Any):
        """Return transformers' config."""
        import transformers

        sizes = _GPT2_SIZES if self.kind == "GPT2" else _SIZES
        if self.kind == "GPTNeoX":  # each query head has a key/value head of its own, in GPT-2 too
            sizes = {name: value for name, value in sizes.items() if name != "num_key_value_heads"}
        return getattr(transformers, f"{self.kind}Config")(**sizes | self.fields | changes)


def _heads(family: str, kind: str, *, wide: bool = True, tied: bool = False, **fields: Any) -> list[Case]:
    """The family with 8 query heads over 8, 2 and 1 key/value heads; the last wide and with the head tied otherwise."""
    one = {"head_dim": WIDE} if wide and "head_dim" not in fields else {}
    name = {True: "tied", False: "untied"}
    return [
        Case(family, f"8/8, {name[tied]}", kind, {"tie_word_embeddings": tied, "num_key_value_heads": 8, **fields}),
        Case(family, f"8/2, {name[tied]}", kind, {"tie_word_embeddings": tied, **fields}),
        Case(family, f"8/1, {name[not tied]}{', wide heads' if one else ''}", kind,
             {"tie_word_embeddings": not tied, "num_key_value_heads": 1, **fields, **one}),
    ]  # fmt: skip


def _rope(kind: str, theta: float = 1e4, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def _longrope(pairs: int, **fields: Any) -> dict[str, Any]:
    """Scaled differently below and beyond CONTEXT, each pair of a head by its own factor."""
    short, long = [1 + 0.1 * i for i in range(pairs)], [1.5 + 0.75 * i for i in range(pairs)]
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
                                **fields}}  # fmt: skip


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 36}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
_MULTIPLIERS = {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
                "logits_scaling": 3.0}  # fmt: skip
_NO_ROPE = {"num_hidden_layers": 4, "no_rope_layer_interval": 4}
_GEMMA2 = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "attn_logit_softcapping": 4.0,
           "final_logit_softcapping": 3.0, "head_dim": WIDE}  # fmt: skip
_GEMMA3 = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "head_dim": WIDE,
           "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}  # fmt: skip
_PHI_CONTEXT = {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 64}


FAMILIES = [
    *_heads("Llama 2", "Llama"),
    *_heads("Llama 3", "Llama", **_rope("default", 5e5), rms_norm_eps=1e-5),
    *_heads("Llama 3.1, 3.2, 3.3", "Llama", tied=True, head_dim=WIDE, **_rope("llama3", 5e5, **_LLAMA3)),
    Case("Llama, every bias", "8/2, untied", "Llama", {"attention_bias": True, "mlp_bias": True}),
    *_heads("SmolLM2", "Llama", tied=True, **_rope("default", 1e5)),
    *_heads("SmolLM3", "SmolLM3", tied=True, wide=False, **_NO_ROPE, **_rope("default", 5e6)),
    *_heads("Mistral", "Mistral", sliding_window=WINDOW),
    *_heads("Mistral Nemo", "Mistral", sliding_window=None, head_dim=WIDE, **_rope("default", 1e6)),
    *_heads("Qwen2", "Qwen2", wide=False, **_rope("default", 1e6)),
    *_heads("Qwen2.5", "Qwen2", tied=True, wide=False, **_rope("default", 1e6)),
    Case("Qwen2, sliding window", "8/2, untied", "Qwen2",
         {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    *_heads("Qwen3", "Qwen3", tied=True, **_rope("default", 1e6)),
    *_heads("Gemma", "Gemma", tied=True, head_dim=WIDE),
    *_heads("Gemma 2", "Gemma2", tied=True, **_GEMMA2),
    *_heads("Gemma 3", "Gemma3Text", tied=True, **_GEMMA3),
    Case("Gemma 3, global rope scaled", "8/2, tied", "Gemma3Text",
         {"tie_word_embeddings": True, "rope_parameters": _GEMMA3_ROPE, **_GEMMA3}),
    *_heads("Phi-3", "Phi3", wide=False, sliding_window=WINDOW),
    *_heads("Phi-3.5", "Phi3", wide=False, **_PHI_CONTEXT, **_longrope(4)),
    *_heads("Phi-4-mini", "Phi3", tied=True, wide=False, **_PHI_CONTEXT, **_longrope(3, partial_rotary_factor=0.75)),
    *_heads("OLMo-2", "Olmo2", wide=False, **_rope("default", 5e5)),
    *_heads("Granite", "Granite", tied=True, wide=False, **_MULTIPLIERS),
    Case("GPT-2", "8/8, tied", "GPT2", {}),
    Case("GPT-2", "4/4, untied, inner width", "GPT2", {"tie_word_embeddings": False, "n_inner": 80, "n_head": 4}),
    Case("GPT-2", "8/8, tied, exact GELU", "GPT2", {"activation_function": "gelu"}),
    Case("GPT-NeoX, Pythia", "4/4, untied", "GPTNeoX", {"num_attention_heads": 4}),
    Case("GPT-NeoX, Pythia", "8/8, tied, half turned", "GPTNeoX",
         {"tie_word_embeddings": True, **_rope("default", partial_rotary_factor=0.5)}),
    Case("GPT-NeoX, Pythia", "4/4, untied, sequential", "GPTNeoX",
         {"num_attention_heads": 4, "use_parallel_residual": False}),
]  # fmt: skip

_SCALED = {"head_dim": WIDE, "max_position_embeddings": CONTEXT}
_YARN = {"factor": 4.0, "original_max_position_embeddings": CONTEXT}
_LONG = {"original_max_position_embeddings": CONTEXT}
_BANDS = {"beta_fast": 1.5, "beta_slow": 0.5}  # so that a head of 16 has pairs on both sides of the ramp and on it

ROPES = [
    Case("rope: default", "Llama", "Llama", {"head_dim": WIDE}),
    Case("rope: linear", "Llama", "Llama", {**_SCALED, **_rope("linear", factor=4.0)}),
    Case("rope: dynamic", "Llama", "Llama", {**_SCALED, **_rope("dynamic", factor=4.0)}),
    Case("rope: dynamic", "Qwen3", "Qwen3", {**_SCALED, **_rope("dynamic", factor=2.0)}),
    Case("rope: llama3", "Llama", "Llama", {"head_dim": WIDE, **_rope("llama3", **_LLAMA3)}),
    Case("rope: yarn", "Llama", "Llama", {"head_dim": WIDE, **_rope("yarn", **_YARN, **_BANDS)}),
    Case("rope: yarn", "Qwen3", "Qwen3", {"head_dim": WIDE, **_rope("yarn", **_YARN)}),
    Case("rope: yarn", "Llama, attention factor, not truncated", "Llama",
         {"head_dim": WIDE, **_rope("yarn", **_YARN, **_BANDS, attention_factor=1.3, truncate=False)}),
    Case("rope: yarn", "Llama, mscale", "Llama",
         {"head_dim": WIDE, **_rope("yarn", **_YARN, **_BANDS, mscale=1.0, mscale_all_dim=0.5)}),
    Case("rope: longrope", "Llama", "Llama",
         {"head_dim": WIDE, **_longrope(8, **_LONG)}),
    Case("rope: longrope", "Llama, factor", "Llama", {"head_dim": WIDE, **_longrope(8, **_LONG, factor=4.0)}),
    Case("rope: longrope", "Qwen3, attention factor", "Qwen3",
         {"head_dim": WIDE, **_longrope(8, **_LONG, attention_factor=1.2)}),
]  # fmt: skip


def main_cases() -> list[Case]:
    """One model a family, the one with the most typical heads: for what need not be repeated over head counts."""
    chosen: dict[str, Case] = {}
    for case in FAMILIES:
        if case.family not in chosen or case.variant.startswith("8/2"):
            chosen[case.family] = case
    return list(chosen.values())
