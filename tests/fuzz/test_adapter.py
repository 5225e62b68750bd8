"""PEFT adapter folders: config and tensors made wrong; refused with the model untouched, or loaded and able to run."""

import copy
import json

import pytest
import torch
from hypothesis import strategies as st

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.load import load_model
from minitune.inspect import as_text, describe
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora, lora_modules
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome

IDS = torch.arange(5).view(1, 5)
# Fields that PEFT writes and that a plain adapter of ours lacks.
MORE = {"rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "layers_to_transform": None, "layers_pattern": None,
        "loftq_config": {}, "lora_bias": False, "peft_version": "0.21.2"}  # fmt: skip


@pytest.fixture(scope="module")
def case(tiny_folder, tmp_path_factory):
    """A model, and the content of each file of an adapter for it."""
    made = tmp_path_factory.mktemp("fuzz")
    base = load_model(tiny_folder(made / "m", tokenizer=False))
    model = copy.deepcopy(base)
    for lora in add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))).values():
        lora.B.data.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, made / "a", str(made / "m"))
    file = made / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **MORE}))
    load_adapter(copy.deepcopy(base), made / "a")
    return base, made / "a", {file.name: file.read_bytes() for file in (made / "a").iterdir()}


@COUNTS
@torch.no_grad()
def test_mutated_adapters(case, count):
    base, place, contents = case
    expected, seen = base(IDS), {"loaded": 0, "refused": 0}
    config = json.loads(contents["adapter_config.json"])
    cases = [mutated_bytes(content).map(lambda text, name=name: (name, text)) for name, content in contents.items()]
    cases += [mutated_json(config).map(lambda text: ("adapter_config.json", text))] * 3

    def check(drawn) -> None:
        name, content = drawn
        for other, original in contents.items():
            (place / other).write_bytes(original)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        model = copy.deepcopy(base)
        found = outcome(lambda: load_adapter(model, place))
        seen["refused" if found is None else "loaded"] += 1
        assert bool(lora_modules(model)) == (found is not None)
        logits = model(IDS)
        assert logits.shape == expected.shape
        assert found is not None or torch.equal(logits, expected)
        if sum(seen.values()) % 4 == 0:
            facts = outcome(lambda: describe(place))
            assert json.loads(json.dumps(facts, default=str)) and as_text(facts)

    fuzz(st.one_of(cases), check, count)
    assert min(seen.values()) > count // 50  # both happen
