"""Hugging Face folders: config, generation config, index and shards made wrong; refused, or loaded and able to run."""

import json

import pytest
import torch
from hypothesis import strategies as st

from minitune.checkpoint.huggingface import INDEX, save_model
from minitune.checkpoint.load import load_model
from minitune.inspect import as_text, describe
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome
from tests.parity.cases import main_cases
from tests.parity.twins import write

IDS = torch.arange(5).view(1, 5)
FAMILIES = {"Llama 3.1, 3.2, 3.3", "Gemma 3, global rope scaled", "Phi-4-mini", "SmolLM3", "GPT-2", "GPT-NeoX, Pythia"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of several shards, and the content of each of their files."""
    made, contents = tmp_path_factory.mktemp("fuzz"), {}
    for number, case in enumerate(case for case in main_cases() if case.family in FAMILIES):
        write(case, made / f"source{number}")
        place = made / f"m{number}"
        save_model(load_model(made / f"source{number}"), None, place, max_shard_bytes=100_000)
        (place / "config.json").write_bytes((made / f"source{number}" / "config.json").read_bytes())  # all its fields
        contents[place] = {file.name: file.read_bytes() for file in place.iterdir()}
    assert len(contents) == len(FAMILIES)
    return contents


@COUNTS
@torch.no_grad()
def test_mutated_folders(folders, count):
    cases = []
    for place, contents in folders.items():
        texts = [name for name in contents if name.endswith(".json")]
        assert set(texts) == {"config.json", "generation_config.json", INDEX}
        shard = next(name for name in contents if name.endswith(".safetensors"))
        for name in ("config.json", *texts):
            document = mutated_json(json.loads(contents[name]))
            cases.append(document.map(lambda text, place=place, name=name: (place, name, text)))
        for name in (*texts, shard):
            content = mutated_bytes(contents[name])
            cases.append(content.map(lambda text, place=place, name=name: (place, name, text)))
    seen = {"loaded": 0, "refused": 0}

    def check(case) -> None:
        place, name, content = case
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        try:
            model = outcome(lambda: load_model(place))
            facts = outcome(lambda: describe(place))  # it never refuses what is a model at all
        finally:
            (place / name).write_bytes(folders[place][name])
        seen["refused" if model is None else "loaded"] += 1
        assert json.loads(json.dumps(facts, default=str)) and as_text(facts)
        if model is not None:
            assert facts["problems"] == []
            assert model(IDS).shape == (1, 5, model.config.vocab_size)

    fuzz(st.one_of(cases), check, count)
    assert min(seen.values()) > count // 50  # both happen
