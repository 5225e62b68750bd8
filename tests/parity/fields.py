"""The walk over a family's config: each field is used as transformers uses it, refused by name, or has no effect.

Every field of transformers' config is set to another plausible value, the weights staying as they are. Then the
engine must raise an error that names the field (or lists the tensors that no longer fit), or answer as transformers
does with the changed config. Where neither answer changes the field has to stand in INERT.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import minitune
from minitune.errors import CheckpointError, ConfigError
from tests.parity.cases import CONTEXT, FAMILIES, ROPES, Case
from tests.parity.measures import BAR, apart
from tests.parity.twins import quiet, rewritten, their_forward, token_ids, write

# Fields without effect on an answer, in every family or where another field switches them off.
INERT = {
    # ids that only generation and padding use, and what draws fresh weights
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    # how other software runs the model or describes the file
    "_name_or_path", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache",
    # of classifiers and of dropout, which evaluation does not do
    "classifier_dropout", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "attention_dropout", "attn_pdrop", "embd_pdrop", "hidden_dropout", "resid_pdrop",
    # the longest text that the model was made for, where rope does not depend on it
    "max_position_embeddings", "original_max_position_embeddings",
    # windows that use_sliding_window or layer_types switch off
    "sliding_window", "use_sliding_window", "max_window_layers",
    # from which layer_types or no_rope_layers were made that stand in the file too
    "_sliding_window_pattern", "no_rope_layer_interval",
    # of no effect in transformers
    "pretraining_tp", "is_decoder", "reorder_and_upcast_attn",
}  # fmt: skip

_OTHER: dict[str, Any] = {
    "model_type": "unheard_of",
    "architectures": ["SomeModelForSequenceClassification"],
    "hidden_act": "relu", "hidden_activation": "relu", "activation_function": "relu",
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 4,
    "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0, "n_inner": 80,
    "dtype": "bfloat16", "id2label": {"0": "A"}, "label2id": {"A": 0}, "problem_type": "regression",
    "transformers_version": "4.0.0", "_name_or_path": "elsewhere",
    "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9, "use_bidirectional_attention": True,
    "summary_type": "last", "summary_activation": "tanh", "rope_type": "unheard_of", "max_window_layers": 2,
    "_sliding_window_pattern": 2, "factor": 3.0, "attention_factor": 1.7, "max_position_embeddings": 96,
    "n_positions": 48, "rms_norm_eps": 1e-2, "layer_norm_eps": 1e-2, "layer_norm_epsilon": 1e-2, "beta_fast": 0.4,
    "beta_slow": 0.1, "original_max_position_embeddings": 8, "partial_rotary_factor": 0.5,
}  # fmt: skip
# Fields that others in the same file contradict when they change; an error may name those instead.
_CONTRADICTS = {
    "num_hidden_layers": ("layer_types",), "use_sliding_window": ("layer_types",), "hidden_size": ("short_factor",),
    "num_attention_heads": ("short_factor",), "head_dim": ("short_factor",), "partial_rotary_factor": ("short_factor",),
}  # fmt: skip
_FLIPPED = {"sliding_attention": "full_attention", "full_attention": "sliding_attention", 0: 1, 1: 0}


def another(name: str, value: Any) -> Any:
    """Return a plausible value that is not the given one."""
    if name in _OTHER and _OTHER[name] != value:
        return _OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 or 1
    if isinstance(value, float):
        return value * 1.5 or 0.1
    if isinstance(value, list) and isinstance(value[0], int | str):
        return [_FLIPPED[value[0]], *value[1:]]
    if isinstance(value, list):
        return [value[0] * 1.5, *value[1:]]
    raise NotImplementedError(f"no other value is known for {name} = {value!r}; add one")


def changes(fields: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each field's dotted path, its other value, and the fields with it; objects are walked into."""
    for name, value in fields.items():
        if isinstance(value, dict) and name not in _OTHER:
            for path, other, inner in changes(value):
                yield f"{name}.{path}", other, fields | {name: inner}
        else:
            other = another(name, value)
            yield name, other, fields | {name: other}


@dataclass
class Verdict:
    """How a changed field ended: used, refused or inert; or wrong, with what was found."""

    path: str
    kind: str
    found: str = ""


def _named(path: str, value: Any, error: Exception) -> bool:
    """Tell whether an error names the field, its value, a field that it now contradicts, or tensors that misfit."""
    *parents, name = path.split(".")
    misfit = isinstance(error, CheckpointError) and "does not fit its own config" in str(error)
    return misfit or any(word in str(error) for word in (*parents, name, repr(value), *_CONTRADICTS.get(name, ())))


def _judge(path: str, value: Any, folder: Path, base: torch.Tensor, state: dict[str, torch.Tensor]) -> Verdict:
    try:
        ours = minitune.load_model(folder, dtype="float32")
    except (ConfigError, CheckpointError) as error:
        if _named(path, value, error):
            return Verdict(path, "refused")
        return Verdict(path, "wrong", f"refused without its name: {error}")
    with torch.no_grad():
        answer = _answers(ours)
        try:
            expected = _their_answers(folder, state)
        except Exception as error:  # whatever transformers raises, it does not take this config
            return Verdict(path, "wrong", f"accepted, but transformers refuses it ({type(error).__name__}: {error})")
    error, moved, theirs_moved = apart(answer, expected), apart(answer, base), apart(expected, base)
    if not error <= BAR:
        return Verdict(path, "wrong", f"logits {error:.0e} from transformers', which moved by {theirs_moved:.0e}")
    if moved > BAR:
        return Verdict(path, "used")
    return (
        Verdict(path, "inert")
        if path.rsplit(".", 1)[-1] in INERT
        else Verdict(path, "wrong", "changes nothing, and is not listed")
    )


def _answers(forward) -> torch.Tensor:
    """Return the logits of a text beyond the original context and of one within it."""
    ids = token_ids()
    return torch.cat((forward(ids), forward(ids[:, : CONTEXT - 4])), 1)


def _their_answers(folder: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, return_dict=True)  # tuples say the same in another form
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(state)
    return _answers(lambda ids: their_forward(model, ids))


def whole_config(case: Case) -> dict[str, Any]:
    """Return every field of the family's config as its file would hold it."""
    return json.loads(json.dumps(case.config().to_dict()))


def walk(case: Case, folder: Path) -> list[Verdict]:
    """Change each field of the family's config in turn; of a case for its rope those that rope depends on."""
    theirs = write(case, folder / "drawn")
    state, fields = copy.deepcopy(theirs.state_dict()), whole_config(case)
    verdicts = []
    with quiet():
        whole = rewritten(folder / "drawn", folder / "whole", **fields)
        with torch.no_grad():
            base = _answers(lambda ids: their_forward(theirs, ids))
            assert apart(_answers(minitune.load_model(whole, dtype="float32")), base) < BAR
        for path, value, changed in changes(fields):
            if case in ROPES and not path.startswith(("rope_parameters", "max_position_embeddings", "head_dim")):
                continue
            (whole / "config.json").write_text(json.dumps(changed))
            verdicts.append(_judge(path, value, whole, base, state))
    return verdicts


def walked_cases() -> list[Case]:
    """One model of each config class, and those whose fields switch others on."""
    names = {
        "Llama 2 8/2, untied", "Llama, every bias 8/2, untied", "Llama 3.1, 3.2, 3.3 8/2, tied", "SmolLM3 8/2, tied",
        "Mistral 8/2, untied", "Qwen2 8/2, untied", "Qwen2, sliding window 8/2, untied", "Qwen3 8/2, tied",
        "Gemma 8/2, tied", "Gemma 2 8/2, tied", "Gemma 3, global rope scaled 8/2, tied", "Phi-3 8/2, untied",
        "Phi-4-mini 8/2, tied", "OLMo-2 8/2, untied", "Granite 8/2, tied", "GPT-2 8/8, tied",
        "GPT-2 4/4, untied, inner width", "GPT-NeoX, Pythia 4/4, untied", "rope: linear Llama", "rope: dynamic Llama",
        "rope: yarn Llama, attention factor, not truncated", "rope: yarn Llama, mscale",
        "rope: longrope Llama, factor", "rope: longrope Qwen3, attention factor",
    }  # fmt: skip
    found = [case for case in FAMILIES + ROPES if case.name in names]
    assert len(found) == len(names)
    return found
