"""Every field of config.json is used, known to be inert, fixed, or refused by name."""

import pytest
import transformers
from transformers import CONFIG_MAPPING, LlamaConfig

from minitune.errors import ConfigError
from minitune.model.config import ModelConfig
from minitune.model.families import FAMILIES
from minitune.model.transformer import Transformer, add_score_head

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {}}, "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip


def test_a_published_config():
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.num_layers, config.hidden_size, config.num_kv_heads, config.head_dim) == (30, 576, 3, 64)
    assert (config.rope.theta, config.norm_eps, config.eos_ids, config.tie_embeddings) == (100000, 1e-5, (2,), True)


def test_round_trip_through_transformers():
    config = ModelConfig.from_hf(SMOLLM2)
    theirs = LlamaConfig(**config.to_hf())
    assert theirs.num_key_value_heads == 3 and theirs.rope_parameters["rope_theta"] == 100000
    assert ModelConfig.from_hf(config.to_hf()) == config == ModelConfig.from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "mamba"}, "not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier of several labels"),
        ({"logit_scale": 2.0}, "'logit_scale' is not known"),
        ({"rms_norm_epss": 1e-5}, "did you mean 'rms_norm_eps'"),
        ({"one": 1, "two": 2, "three": 3}, "'one' is not known.*so are 'two', 'three'"),
        ({"rope_parameters": 0}, "rope_parameters is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor is True"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 100000, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": 10, "head_dim": 64}, "share"),
        ({"num_attention_heads": 10}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_hidden_layers": "30"}, "num_layers"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"eos_token_id": 99999}, "eos"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 63}, "odd"),
    ],
)
def test_what_is_not_implemented_is_refused_with_its_place(change, words):
    with pytest.raises(ConfigError, match=f"^some/folder: .*{words}"):
        ModelConfig.from_hf(SMOLLM2 | change, where="some/folder")


def test_a_family_that_transformers_cannot_score_with_makes_no_reward_model():
    size = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 2, "head_dim": 4}  # fmt: skip
    with pytest.raises(ConfigError, match="granite"):
        add_score_head(Transformer(ModelConfig(**size, family="granite")))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_classes_are_those_of_transformers(name):
    family = FAMILIES[name]
    assert transformers.AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[name]].__name__ == family.architecture
    try:
        scorer = transformers.AutoModelForSequenceClassification._model_mapping[CONFIG_MAPPING[name]].__name__
    except KeyError:
        scorer = None
    assert scorer == family.reward_architecture


GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3,
}  # fmt: skip
LOCAL = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "change,words",
    [
        ({"rope_parameters": {"sliding_attention": LOCAL}}, "'dynamic' is not implemented for layers with a window"),
        ({"query_pre_attn_scalar": None}, "no model can have"),
        ({"query_pre_attn_scalar": 0}, "no model can have"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
        ({"rms_norm_eps": 10**30}, "norm_eps is 10+;"),
        ({"model_type": ["gemma"]}, "is not supported"),
        ({"layer_types": ["sliding_attention"]}, "each of 2 layers"),
        ({"num_hidden_layers": 10**12}, "num_layers is 10+"),
    ],
)
def test_what_no_gemma_3_can_have_is_refused(change, words):
    assert ModelConfig.from_hf(GEMMA3).windows == (3, 3)
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(GEMMA3 | change)


def test_a_window_that_no_layer_has_is_none_and_is_written_so():
    qwen = SMOLLM2 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
                      "sliding_window": 8, "max_window_layers": 99}  # fmt: skip
    llama = ("pretraining_tp", "rope_interleaved", "is_llama_config", "attention_bias", "mlp_bias")
    config = ModelConfig.from_hf({name: value for name, value in qwen.items() if name not in llama})
    assert config.windows == () and ModelConfig.from_hf(config.to_hf()) == config
