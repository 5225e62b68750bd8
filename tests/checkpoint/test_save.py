"""Folders that we write, read by transformers; a full disk loses nothing."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minitune import safetensors_io
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.checkpoint.merge import merge
from minitune.errors import CheckpointError
from minitune.inspect import describe
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.safetensors_io import read_tensors, write_tensors
from tests.parity.cases import FAMILIES, ROPES, Case, main_cases
from tests.parity.twins import quiet, write

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
def test_folder_goes_round_through_transformers(tiny_folder, tmp_path, tie, limit):
    source = tiny_folder(tmp_path / "source", tie_word_embeddings=tie)
    model = load_model(source)
    save_model(model, load_tokenizer(source), tmp_path / "saved", max_shard_bytes=limit)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10**9)
    if limit == 20_000:
        assert all(file.stat().st_size < 20_000 + 4_000 or len(read_tensors(file)) == 1 for file in files)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    original = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(theirs(IDS).logits, original(IDS).logits)
    assert torch.equal(load_model(tmp_path / "saved")(IDS), model(IDS))
    assert load_model(tmp_path / "saved").config == model.config


# Of each family the model whose config says most; the others with the slow tests.
RICHEST = {case.kind: case for case in sorted(main_cases(), key=lambda case: len(str(case.fields)))}
OTHERS = [case for case in (*FAMILIES, *ROPES) if case not in RICHEST.values()]


@pytest.fixture(
    scope="module",
    params=[*RICHEST.values(), *(pytest.param(case, marks=pytest.mark.real) for case in OTHERS)],
    ids=lambda case: case.name,
)
def family(request, tmp_path_factory) -> tuple[Case, Path]:
    """A tiny model of each family, as transformers writes it in fp32."""
    folder = tmp_path_factory.mktemp("family") / "m"
    write(request.param, folder)
    return request.param, folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's tensors by the names that its files have."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def theirs(folder: Path):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_family_goes_round_in_equal_bits(family, tmp_path, dtype):
    """In, out, in, single and sharded; what is in our files is what transformers wrote, names and layout included."""
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored(family[1]).items()}
    source = tmp_path / "source"
    shutil.copytree(family[1], source)
    write_tensors(source / "model.safetensors", expected)
    model = load_model(source)
    for name, limit in {"one": 10**9, "many": 30_000}.items():
        folder = tmp_path / name
        save_model(model, None, folder, max_shard_bytes=limit)
        assert (len(list(folder.glob("*.safetensors"))) > 3) == (name == "many")
        again = load_model(folder)
        assert again.dtype == getattr(torch, dtype) and again.config == model.config
        assert same(again.state_dict(), model.state_dict()) and same(stored(folder), expected)
        facts = describe(folder)
        assert facts["problems"] == [] and "other" not in {row["part"] for row in facts["parts"]}


@torch.no_grad()
def test_transformers_reads_every_family(family, tmp_path):
    """From several files: the logits of the folder that it wrote itself, and those of a merged adapter."""
    model = load_model(family[1])
    save_model(model, None, tmp_path / "m", max_shard_bytes=30_000)
    before, after = theirs(family[1]), theirs(tmp_path / "m")
    ids = IDS % before.config.vocab_size
    assert after.dtype == torch.float32 and torch.equal(after(ids).logits, before(ids).logits)
    for lora in add_lora(model, LoRAConfig(rank=2)).values():
        lora.B.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    live = model(ids)
    merge(model)
    save_model(model, None, tmp_path / "merged")
    merged = theirs(tmp_path / "merged")(ids).logits
    assert (merged - live).norm() / live.norm() < 1e-5 < (live - before(ids).logits).norm() / live.norm()


@torch.no_grad()
def test_every_family_goes_round_in_four_bits(family, tmp_path):
    """GPT-2's weights lie the other way round in its folders, but not when they are quantised."""
    if family[0].kind not in ("GPT2", "GPTNeoX", "Phi3", "Llama"):
        pytest.skip("has the layout of Llama")
    model = load_model(family[1], quantize="nf4", keep_quantized=False)
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(again(IDS % model.config.vocab_size), model(IDS % model.config.vocab_size))
    assert describe(tmp_path / "m")["problems"] == []


def test_tokenizer_template_and_stop_ids_come_along(tiny_folder, tmp_path):
    source = tiny_folder(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    save_model(load_model(source, dtype="bfloat16"), load_tokenizer(source), tmp_path / "saved")
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "héllo <b>"}, {"role": "assistant", "content": "1 2"}]
    expected = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ours.apply_chat_template(messages, tokenize=True)["input_ids"] == expected
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [258, 256]
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path / "saved").model.norm.weight.dtype == torch.bfloat16


def test_files_have_the_usual_permissions(tiny_folder, tmp_path):
    save_model(load_model(tiny_folder(tmp_path / "m")), None, tmp_path / "saved")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1


def test_full_disk_keeps_the_earlier_folder(tiny_folder, tmp_path, monkeypatch):
    model = load_model(tiny_folder(tmp_path / "m"))
    save_model(model, None, tmp_path / "saved")
    before = (tmp_path / "saved/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is not empty"):
        save_model(model, None, tmp_path / "saved")

    def full(tensors, path, metadata):
        with open(path, "wb") as stream:
            stream.write(b"half")
        raise safetensors_io.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_io, "save_file", full)
    model.model.norm.weight.data.zero_()
    with pytest.raises(OSError) as caught:
        save_model(model, None, tmp_path / "saved", overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["m", "saved"]


def test_tensors_of_every_dtype_go_round(tmp_path):
    tensors = {
        str(dtype): (torch.arange(-6, 6).view(3, 4) * 1.5).to(dtype).t() for dtype in safetensors_io.DTYPES.values()
    } | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
