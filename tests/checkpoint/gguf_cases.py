"""A tiny model of each architecture that GGUF has, and a converter written from llama.cpp's facts alone.

The converter is this test's own: names come from the gguf package's table for Hugging Face's names, and what happens to
rows, norms and layouts is stated for each architecture here, apart from the engine's table.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import CHAT_TEMPLATE, SPECIAL
from tests.parity.cases import Case
from tests.parity.twins import write

SIZES = {"vocab_size": 288, "pad_token_id": None, "bos_token_id": 256, "eos_token_id": 258}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 36}  # fmt: skip
_LONGROPE = {
    "original_max_position_embeddings": 16, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                        "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.25, 3.0]},
}  # fmt: skip
_GEMMA3_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                 "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}  # fmt: skip


def _case(architecture: str, kind: str, variant: str = "", **fields) -> Case:
    return Case(architecture, variant, kind, {**SIZES, **fields})


CASES = [
    _case("llama", "Llama", "wide heads", head_dim=16),
    _case("llama", "Llama", "biases, tied", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    _case("llama", "Llama", "llama3 rope", head_dim=16, rope_parameters=_LLAMA3),
    _case("llama", "Llama", "linear rope", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    _case("llama", "Mistral", "Nemo", sliding_window=None, head_dim=16),
    _case("qwen2", "Qwen2", tie_word_embeddings=True),
    _case("qwen2", "Qwen2", "yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                                      "original_max_position_embeddings": 16}),
    _case("qwen3", "Qwen3", head_dim=128, num_attention_heads=2, num_key_value_heads=1),
    _case("gemma", "Gemma", head_dim=16, tie_word_embeddings=True),
    _case("gemma2", "Gemma2", head_dim=256, num_attention_heads=2, num_key_value_heads=1, query_pre_attn_scalar=256,
          sliding_window=7, tie_word_embeddings=True),
    _case("gemma2", "Gemma2", "caps", head_dim=16, query_pre_attn_scalar=16, sliding_window=7,
          tie_word_embeddings=True, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    _case("gemma3", "Gemma3Text", head_dim=256, num_attention_heads=2, num_key_value_heads=1,
          query_pre_attn_scalar=256, sliding_window=7, tie_word_embeddings=True, num_hidden_layers=6),
    _case("gemma3", "Gemma3Text", "scaled", head_dim=16, query_pre_attn_scalar=16, sliding_window=7,
          tie_word_embeddings=True, num_hidden_layers=6, rope_parameters=_GEMMA3_ROPES),
    _case("phi3", "Phi3", sliding_window=None),
    _case("phi3", "Phi3", "longrope", sliding_window=None, **_LONGROPE),
    _case("olmo2", "Olmo2"),
    _case("granite", "Granite", embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.4,
          logits_scaling=3.0, tie_word_embeddings=True),
    _case("smollm3", "SmolLM3", num_hidden_layers=4, no_rope_layer_interval=4, tie_word_embeddings=True),
    _case("gpt2", "GPT2", n_positions=1024, tie_word_embeddings=True),
    _case("gptneox", "GPTNeoX", rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                  "partial_rotary_factor": 0.5}),
]  # fmt: skip
NAMES = [case.name.strip().replace(" ", "-") for case in CASES]
_INTERLEAVED = ("llama", "granite", "smollm3")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: 256 bytes, the four special tokens of the tests, and some merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("a", "n"), ("an", "d"), ("1", "2")]
    tokens = [*alphabet, *SPECIAL, *map("".join, merges)]
    inner = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[3]}
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    outer.chat_template = CHAT_TEMPLATE
    outer.save_pretrained(folder)


def folder_of(case: Case, folder: Path) -> Path:
    """Write model and tokenizer as transformers does, with fields that older converters read; return the folder."""
    write(case, folder)
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    if case.kind == "GPT2":
        config["n_ctx"] = config["n_positions"]
    if case.kind == "GPTNeoX":
        config["rotary_pct"] = config["rope_parameters"].get("partial_rotary_factor", 0.25)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(case: Case, model: torch.nn.Module, path: Path, kind: str = "F32") -> Path:
    """Write transformers' model as llama.cpp's converter would; the vectors that describe a rope are left out."""
    config, architecture = model.config, case.family
    writer = gguf.GGUFWriter(path, architecture)
    _keys(writer, config, architecture)
    ids = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(ids[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, leaf = name.rpartition(".")
        rows = _as_stored(architecture, config, name, tensor.numpy())
        stored = gguf.GGMLQuantizationType[kind if rows.ndim > 1 and "wpe" not in name else "F32"]
        new = f"{names.get_name(stem)}.{leaf}"
        writer.add_tensor(new, gguf.quants.quantize(np.ascontiguousarray(rows), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(architecture: str, config, name: str, rows: np.ndarray) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    module = name.split(".")[-2]
    if architecture in _INTERLEAVED and module in heads:
        half = len(rows) // heads[module] // 2
        order = [h * 2 * half + j * half + i for h in range(heads[module]) for i in range(half) for j in (0, 1)]
        return rows[order]
    if architecture.startswith("gemma") and module.endswith("norm"):
        return rows + np.float32(1)
    if architecture == "gpt2" and module in ("c_attn", "c_proj", "c_fc") and rows.ndim == 2:
        return rows.T
    if module == "query_key_value":
        d = len(rows) // config.num_attention_heads // 3
        return np.concatenate([rows[h * 3 * d + c * d :][:d] for c in range(3) for h in range(len(rows) // d // 3)])
    return rows


def _keys(writer: gguf.GGUFWriter, config, architecture: str) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * width))
    writer.add_head_count(heads)
    writer.add_eos_token_id(258)
    if architecture in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", getattr(config, "layer_norm_eps", None)))
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
    rope = getattr(config, "rope_parameters", None) or {}
    whole = rope.get("full_attention", rope)
    if architecture not in ("gemma", "gemma2", "gpt2", "gptneox"):
        writer.add_rope_freq_base(whole["rope_theta"])
    if whole.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(whole["rope_type"]))
        writer.add_rope_scaling_factor(whole["factor"])
    if whole.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])
    if architecture == "gptneox":
        writer.add_rope_dimension_count(int(whole["partial_rotary_factor"] * width // heads))
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
