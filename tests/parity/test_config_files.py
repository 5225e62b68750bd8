"""Config files: those of transformers 4 are read as 5 reads them, and what we write says the same to both."""

import json
from pathlib import Path

import pytest
import torch

import minitune
from minitune.model.config import ModelConfig
from minitune.model.transformer import Transformer
from tests.parity.cases import CONTEXT, FAMILIES, LENGTH, ROPES, WINDOW, main_cases
from tests.parity.fields import whole_config
from tests.parity.measures import BAR, apart
from tests.parity.twins import quiet, rewritten, their_forward, token_ids, write

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 36}
_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.25, 3.0, 3.75]
OLD = {
    "Llama 3 8/2, untied": {"rope_theta": 5e5, "rope_scaling": None},
    "Llama 3.1, 3.2, 3.3 8/2, tied": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
    "rope: linear Llama": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope: dynamic Llama": {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "rope: yarn Qwen3": {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    },
    "Mistral 8/2, untied": {"rope_theta": 1e4},
    "Qwen2, sliding window 8/2, untied": {"rope_theta": 1e4, "max_window_layers": 1, "sliding_window": WINDOW},
    "SmolLM3 8/2, tied": {"rope_theta": 5e6, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4},
    "Gemma 8/2, tied": {"rope_theta": 1e4, "hidden_act": "gelu", "hidden_activation": None},
    "Gemma 3 8/2, tied": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
    "Gemma 3, global rope scaled 8/2, tied": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "Phi-3.5 8/2, untied": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
    },
    "Phi-4-mini 8/2, tied": {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT[:3], "long_factor": _LONG[:3]},
    },
    "Granite 8/2, tied": {"rope_theta": 1e4, "rope_scaling": None},
    "OLMo-2 8/2, untied": {"rope_theta": 5e5},
    "GPT-NeoX, Pythia 4/4, untied": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "GPT-2 8/8, tied": {"n_ctx": 64, "attn_pdrop": 0.1},
}
# Written by transformers 5 alone.
_NEW = ("rope_parameters", "layer_types", "_sliding_window_pattern", "dtype")


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_transformers_4_is_read_as_transformers_5_reads_it(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    case = next(case for case in FAMILIES + ROPES if case.name == name)
    drawn = write(case, tmp_path)
    fields = {key: value for key, value in whole_config(case).items() if key not in _NEW}
    fields |= {"architectures": [type(drawn).__name__], "torch_dtype": "float32", "transformers_version": "4.44.0"}
    (tmp_path / "config.json").write_text(json.dumps(fields | OLD[name]))
    with quiet(), torch.no_grad():
        config = AutoConfig.from_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        theirs.load_state_dict(drawn.state_dict())
        expected, as_drawn = (their_forward(model, token_ids()) for model in (theirs, drawn))
        assert apart(expected, as_drawn) < BAR  # the old file says the same as the new one
        assert apart(minitune.load_model(tmp_path, dtype="float32")(token_ids()), expected) < BAR


WRITTEN = main_cases() + ROPES


@pytest.mark.parametrize("case", WRITTEN, ids=[case.name for case in WRITTEN])
def test_a_file_that_we_write_says_the_same_to_both(case, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    drawn = write(case, tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    with quiet(), torch.no_grad():
        theirs = AutoConfig.from_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").float().eval()
        again.load_state_dict(drawn.state_dict())
        for length in (LENGTH, CONTEXT - 4):
            ids = token_ids(length=length)
            assert torch.equal(their_forward(again, ids), their_forward(drawn, ids))


PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
"""The fields of published models' files, with all that has no say in the arithmetic."""
# Parameters as the models' pages say them, or as transformers counts them.
COUNTS = {
    "Llama-2-7b": 6_738_415_616, "Llama-3.2-1B": 1_235_814_400, "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B-Instruct": 494_032_768, "gemma-2b": 2_506_172_416, "gpt2": 124_439_808,
    "Phi-3-mini-4k-instruct": 3_821_079_552, "pythia-160m": 162_322_944,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    config = ModelConfig.from_hf(PUBLISHED[name], name)
    assert ModelConfig.from_hf(config.to_hf()) == config
    if name in COUNTS:
        parameters = Transformer(config, device="meta", init=False).parameters()
        assert sum(parameter.numel() for parameter in parameters) == COUNTS[name]


def _without_outer_name(tensors):
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def _with_tables(tensors):
    tables = {}
    for layer in range(3):
        block = f"gpt_neox.layers.{layer}.attention."
        tables |= {
            f"{block}bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
            f"{block}masked_bias": torch.tensor(-1e9),
        }
        tables[f"{block}rotary_emb.inv_freq"] = torch.ones(2)
    return tensors | tables


@pytest.mark.parametrize(
    "name,change", [("GPT-2 8/8, tied", _without_outer_name), ("GPT-NeoX, Pythia 4/4, untied", _with_tables)]
)
def test_tensors_as_the_first_files_have_them(name, change, tmp_path):
    case = next(case for case in FAMILIES if case.name == name)
    theirs = write(case, tmp_path / "new")
    ours = minitune.load_model(rewritten(tmp_path / "new", tmp_path / "old", change), dtype="float32")
    with torch.no_grad():
        assert apart(ours(token_ids()), their_forward(theirs, token_ids())) < BAR
