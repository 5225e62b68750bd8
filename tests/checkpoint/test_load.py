"""Hugging Face folders against transformers, and every way in which one can be wrong."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import CheckpointError, ConfigError

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.no_grad()
def assert_same_logits(folder, tolerance=1e-5, **options):
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits
    ours = load_model(folder)(IDS)
    assert ours.dtype == theirs.dtype
    assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("tie", [True, False])
def test_folder_has_the_logits_of_transformers(tiny_folder, tmp_path, tie, shard):
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=tie, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert_same_logits(folder)


def test_biases_and_dtypes(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m", attention_bias=True, mlp_bias=True, dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_model(folder).state_dict().items())
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)):
        state = load_model(folder, dtype=name).state_dict()
        assert all(torch.equal(state[key], tensor.to(dtype)) for key, tensor in stored.items() if key in state)
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        load_model(folder, dtype="bflaot16")


def test_stop_ids_of_the_generation_config_are_kept(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    assert load_model(folder).config.eos_ids == (258, 256)


def test_head_stored_beside_a_tied_embedding_must_equal_it(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_model(folder)


def test_folder_without_tokenizer_loads(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m", tokenizer=False)
    load_model(folder)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_tokenizer(folder)


def test_every_misfit_is_listed(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.zeros(3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(32, 48)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    for part in ("model.norm.weight is missing", "model.extra.weight is not part", "[32, 48] instead of [48, 32]",
                 "stored as torch.int32"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "padded", "header", "empty", "text"])
def test_damaged_safetensors_are_refused(tiny_folder, tmp_path, damage):
    folder = tiny_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "padded": content + b"\0",
        "header": struct.pack("<Q", 1 << 62) + content[8:],
        "empty": b"",
        "text": b"not safetensors at all",
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="model.safetensors is not a whole safetensors file"):
        load_model(folder)


def test_shards_stay_inside_the_folder(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    (tmp_path / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        moved = {tensor: name if file == shard else file for tensor, file in content["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(CheckpointError, match="leads outside the folder"):
            load_model(folder)
    index.write_text(json.dumps(content))
    (folder / shard).unlink()
    (folder / shard).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_model(folder)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"lacks shards that .* names: {shard}"):
        load_model(folder)


def test_index_must_tell_the_truth(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    wrong = next(file for file in names.values() if file != names["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": {**names, "model.norm.weight": wrong}}))
    with pytest.raises(CheckpointError, match="lacks model.norm.weight"):
        load_model(folder)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(folder)


def test_hub_cache_layout_is_followed(tiny_folder, tmp_path):
    made = tiny_folder(tmp_path / "m")
    expected = load_model(made).state_dict()
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    found = load_model(snapshot).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickles_and_other_things_are_refused(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_model(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither a folder"):
        load_model(folder / "config.json")
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model(tmp_path / "absent")
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(CheckpointError, match="is an adapter"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"rope_scalling": {}}, "did you mean 'rope_scaling'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_unknown_configs_are_refused(tiny_folder, tmp_path, change, expected):
    folder = tiny_folder(tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ConfigError, match=expected):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 9_999},
        {"vocab_size": 10**30},
        {"vocab_size": 2**62, "hidden_size": 2**40},
        {"hidden_size": 2**60},
        {"intermediate_size": 10**18},
        {"num_attention_heads": 2**40, "num_key_value_heads": 2**40, "head_dim": 2},
        {"head_dim": 10**12},
        {"eos_token_id": list(range(10**5, 2 * 10**5))},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 10**5, "long_factor": [1.0] * 10**5}},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [None] * 4,
                "long_factor": [1.0] * 4,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [10**400] * 4,
                "long_factor": [1.0] * 4,
            }
        },
        {"layer_types": ["full_attention"] * 10**5},
        {"rope_theta": -1},
    ],
    ids=lambda change: ", ".join(change),
)
def test_absurd_sizes_are_refused_at_once(tiny_folder, tmp_path, change):
    folder = tiny_folder(tmp_path / "m", tokenizer=False)
    fields = json.loads((folder / "config.json").read_text())
    if "rope_theta" in change:
        del fields["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**fields, **change}))
    began = time.process_time()
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(folder)
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_a_key_given_twice_is_refused(tiny_folder, tmp_path):
    """Which of the two counts differs from one program to another."""
    folder = tiny_folder(tmp_path / "m", max_shard_size="20KB")
    for name in ("config.json", "model.safetensors.index.json"):
        file = folder / name
        text = file.read_text()
        key = next(iter(json.loads(text)))
        file.write_text(text.replace("{", f'{{"{key}": null, ', 1))
        with pytest.raises(CheckpointError, match=f"{name}: .*'{key}' is given twice"):
            load_model(folder)
        file.write_text(text)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode().rstrip()
    (name, entry), *_ = [one for one in json.loads(header).items() if one[0] != "__metadata__"]
    twice = f'{header[:-1]}, "{name}": {json.dumps(entry)}}}'.encode()
    shard.write_bytes(struct.pack("<Q", len(twice)) + twice + content[8 + length :])
    with pytest.raises(CheckpointError, match=f"'{name}' is given twice"):
        load_model(folder)


def test_a_file_name_that_cannot_be_one_is_refused(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for strange in ("a\0b", "x" * 5000, "", "."):
        index.write_text(json.dumps({"weight_map": {**names, "model.norm.weight": strange}}))
        with pytest.raises(CheckpointError, match="cannot be a file's name|lacks shards"):
            load_model(folder)


MEASURE = """
import resource, sys
import torch
from minitune.checkpoint.load import load_model, load_adapter
import minitune.checkpoint.gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_model(sys.argv[1], dtype=sys.argv[2])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_stays_under_one_point_two_models(smollm2_path, dtype):
    done = subprocess.run([sys.executable, "-c", MEASURE, smollm2_path, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tiny_folder, tmp_path, value):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight holds a NaN or infinity"):
        load_model(folder)


def test_weights_too_large_for_a_dtype_are_named_and_a_large_sum_is_no_infinity(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 6e4  # their sum is beyond float16, each is not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, dtype="float16")
    tensors["model.norm.weight"][0] = 7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight holds a NaN or infinity as float16"):
        load_model(folder, dtype="float16")


def test_one_parameter_under_two_names_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"wte.weight": torch.zeros(9, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="both model.embed_tokens.weight of this model"):
        load_model(tmp_path)
