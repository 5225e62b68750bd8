"""Hugging Face folders: config, generation config, index and shards made wrong; refused, or loaded and able to run."""

import json

import pytest
import torch
from hypothesis import strategies as st

from minitune.checkpoint.huggingface import INDEX, save_model
from minitune.checkpoint.load import load_model
from minitune.inspect import as_text, describe
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome

IDS = torch.arange(5).view(1, 5)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A folder of several shards, and the content of each of its files."""
    made = tmp_path_factory.mktemp("fuzz")
    model = load_model(tiny_folder(made / "source", tokenizer=False))
    save_model(model, None, made / "m", max_shard_bytes=20_000)
    return made / "m", {file.name: file.read_bytes() for file in (made / "m").iterdir()}


@COUNTS
@torch.no_grad()
def test_mutated_folders(folder, count):
    place, contents = folder
    texts = [name for name in contents if name.endswith(".json")]
    shard = next(name for name in contents if name.endswith(".safetensors"))
    cases = [mutated_json(json.loads(contents[name])).map(lambda text, name=name: (name, text)) for name in texts]
    cases += [mutated_bytes(contents[name]).map(lambda text, name=name: (name, text)) for name in (*texts, shard)]
    seen = {"loaded": 0, "refused": 0}

    def check(case) -> None:
        name, content = case
        for other, original in contents.items():
            (place / other).write_bytes(original)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        model = outcome(lambda: load_model(place))
        seen["refused" if model is None else "loaded"] += 1
        if model is not None:
            assert model(IDS).shape == (1, 5, model.config.vocab_size)
        facts = outcome(lambda: describe(place))  # it never refuses what is a model at all
        assert json.loads(json.dumps(facts, default=str)) and as_text(facts)
        if model is not None:
            assert facts["problems"] == []

    assert set(texts) == {"config.json", "generation_config.json", INDEX}
    fuzz(st.one_of(cases), check, count)
    assert min(seen.values()) > count // 50  # both happen
