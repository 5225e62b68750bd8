"""4-bit folders: kept once and used again, read by transformers, read from transformers, and what is refused."""

import json
import os
import shutil
import signal

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minitune.checkpoint import huggingface, load, prequantized
from minitune.checkpoint.adapter import adapter_quantization, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model
from minitune.checkpoint.quantized import to_bitsandbytes
from minitune.errors import CheckpointError, ConfigError
from minitune.model.config import LoRAConfig, QuantizationConfig
from minitune.model.lora import add_lora, linear_modules, quantized_weights
from minitune.model.transformer import add_score_head
from minitune.ops.nf4 import quantize
from minitune.safetensors_io import StoredTensor, write_tensors
from minitune.training.config import LoRAOptions, QuantizationOptions, TrainConfig
from minitune.training.run import choose_parameters

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256
FORMS = [QuantizationConfig(kind, 64, double) for kind in ("nf4", "fp4") for double in (True, False)]
forms = pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.kind}-{'8 bits' if form.double_quant else 'fp32'}"
)


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """Where fetched and kept weights lie in these tests."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def bases(tiny_folder, tmp_path_factory):
    """Models with a tied head, and with one of their own and biases; rows are whole blocks (see tests/ops/test_nf4)."""
    return {
        tied: tiny_folder(tmp_path_factory.mktemp("base") / "base", tokenizer=False, hidden_size=64,
                          intermediate_size=128, tie_word_embeddings=tied, attention_bias=not tied)
        for tied in (True, False)
    }  # fmt: skip


@pytest.fixture
def base(bases, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(bases[True], tmp_path / "base")


def kept(weights):
    return sorted(path.name for path in (weights / "quantized").glob("*"))


def state(model):
    """Every tensor of a model, quantised ones in parts."""
    parts = {(path, f): t for path, w in quantized_weights(model).items() for f, t in w.tensors().items()}
    return {(name, ""): p for name, p in model.named_parameters()} | parts


def same(one, two):
    a, b = state(one), state(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def files_read(monkeypatch):
    """The files of which a tensor has been read, as they are read."""
    seen, original = [], StoredTensor.read_into
    monkeypatch.setattr(StoredTensor, "read_into", lambda self, to: seen.append(self.file) or original(self, to))
    return seen


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@forms
def test_kept_once_and_used_again(base, weights, files_read, form, dtype):
    first = load_model(base, quantize=form, dtype=dtype)
    assert {file.parent for file in files_read} == {base}
    (name,) = kept(weights)
    written = (weights / "quantized" / name / "model.safetensors").stat().st_mtime_ns
    files_read.clear()
    second = load_model(base, quantize=form, dtype=dtype)
    assert {file.parent for file in files_read} == {weights / "quantized" / name}
    assert kept(weights) == [name]
    assert (weights / "quantized" / name / "model.safetensors").stat().st_mtime_ns == written
    assert same(first, second) and first.config == second.config
    assert same(first, load_model(base, quantize=form, dtype=dtype, keep_quantized=False))
    with torch.no_grad():
        assert torch.equal(first(IDS), second(IDS))


def test_nothing_is_kept_of_int8_or_when_not_wanted(base, weights):
    load_model(base, quantize="int8")
    load_model(base, quantize="nf4", keep_quantized=False)
    load_model(base, quantize="none")
    load_model(base)
    assert kept(weights) == []


def test_the_folder_beside_the_fetched_weights_is_named_after_its_source(base, weights):
    load_model(base, quantize="nf4")
    (name,) = kept(weights)
    assert name.startswith("base-nf4-")


def rewritten(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def touched(base):
    file = base / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))


def reconfigured(base):
    file = base / "config.json"
    file.write_text(file.read_text().replace("1e-06", "1e-05"))


@pytest.mark.parametrize("change", [rewritten, touched, reconfigured])
def test_a_changed_source_is_quantised_anew(base, weights, change):
    load_model(base, quantize="nf4")
    before = kept(weights)
    change(base)
    model = load_model(base, quantize="nf4")
    assert len(kept(weights)) == 2 and set(before) < set(kept(weights))
    assert same(model, load_model(base, quantize="nf4", keep_quantized=False))
    assert model.config == load_model(base).config


def test_another_option_dtype_or_place_is_another_folder(base, weights, tmp_path):
    options = [
        {"quantize": form, "dtype": dtype}
        for form in (*FORMS, QuantizationConfig("nf4", 128))
        for dtype in ("float32", "bfloat16")
    ]
    for number, option in enumerate(options, 1):
        load_model(base, **option)
        assert len(kept(weights)) == number
    load_model(shutil.copytree(base, tmp_path / "elsewhere"), quantize="nf4")
    assert len(kept(weights)) == len(options) + 1
    for option in ({"quantize": "nf4"}, {"quantize": QuantizationConfig("nf4"), "dtype": torch.float32}):
        load_model(base, **option)  # the same said otherwise
    assert len(kept(weights)) == len(options) + 1


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half(path, tensors):
    write_tensors(path, tensors)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


@pytest.mark.parametrize("place", ["before the weights", "half of the weights", "before the rename"])
def test_what_a_killed_process_has_half_written_is_never_used(base, weights, monkeypatch, files_read, place):
    expected = load_model(base, quantize="nf4", keep_quantized=False)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        if place == "before the rename":
            monkeypatch.setattr("minitune.files._replace_folder", die)
        else:
            monkeypatch.setattr(huggingface, "write_tensors", half if place.startswith("half") else die)
        monkeypatch.setattr(load.os, "cpu_count", lambda: 1)
        try:
            load_model(base, quantize="nf4")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    leftover = kept(weights)
    assert len(leftover) == 1 and leftover[0].startswith("."), "it had begun to write"
    files_read.clear()
    assert same(load_model(base, quantize="nf4"), expected)
    assert {file.parent for file in files_read} == {base}
    (name,) = kept(weights)
    assert name.startswith("base-nf4-"), "and what was left of it is gone"
    assert same(load_model(base, quantize="nf4"), expected)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_block_size(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors |= to_bitsandbytes(name, quantize(torch.randn(128, 64), block_size=128))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_config(folder):
    (folder / "config.json").unlink()


DAMAGES = [truncated, without_weights, without_a_config, without_a_tensor, with_a_nan, of_another_block_size]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kept_folder_is_named_and_made_anew(base, weights, damage, capsys, files_read):
    expected = load_model(base, quantize="nf4")
    folder = weights / "quantized" / kept(weights)[0]
    damage(folder)
    assert same(load_model(base, quantize="nf4"), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and line.endswith("it was kept from an earlier load and is made anew")
    files_read.clear()
    assert same(load_model(base, quantize="nf4"), expected)
    assert {file.parent for file in files_read} == {folder} and capsys.readouterr().err == ""


def test_two_at_once_both_get_their_model(base, weights, monkeypatch):
    """Both find nothing kept, both quantise, and one of them is the second to write."""
    original, models = load.save_model, []

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(load, "save_model", original)
        models.append(load_model(base, quantize="nf4"))
        assert len(kept(weights)) == 1
        original(*arguments, **options)

    monkeypatch.setattr(load, "save_model", meanwhile)
    models.append(load_model(base, quantize="nf4"))
    assert same(*models) and len(kept(weights)) == 1
    assert same(load_model(base, quantize="nf4"), models[0])


def test_a_place_that_cannot_be_written_to_does_not_cost_the_model(base, weights, capsys):
    weights.mkdir()
    (weights / "quantized").write_text("in the way")
    model = load_model(base, quantize="nf4")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the quantised model cannot be kept (") and line.endswith("the next load quantises again")
    assert same(model, load_model(base, quantize="nf4", keep_quantized=False))


# With transformers and bitsandbytes. In eval() their layers repack the weights for AVX-512 and compute in bf16, hence
# train() everywhere.


def linear4bit(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def decoded_by_them(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def quantised_by_them(base, form, dtype):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=form.kind, bnb_4bit_compute_dtype=dtype,
                                bnb_4bit_use_double_quant=form.double_quant)  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype).train()


def same_weights(ours, theirs):
    decoded, layers = quantized_weights(ours), linear4bit(theirs)
    return decoded.keys() == layers.keys() == linear_modules(ours).keys() and all(
        torch.equal(weight.dequantize(), decoded_by_them(layers[path])) for path, weight in decoded.items()
    )


@torch.no_grad()
def apart(ours, theirs):
    a, b = ours(IDS).double(), theirs(IDS).logits.double()
    return ((a - b).norm() / b.norm()).item()


@forms
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_keep_is_read_by_transformers(bases, weights, form, tied, dtype):
    ours = load_model(bases[tied], quantize=form, dtype=dtype)
    (name,) = kept(weights)
    theirs = AutoModelForCausalLM.from_pretrained(weights / "quantized" / name, dtype=dtype).train()
    assert same_weights(ours, theirs)
    state = linear4bit(theirs)["model.layers.0.mlp.up_proj"].weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested, state.dtype) == (form.kind, 64, form.double_quant, dtype)
    if dtype == torch.float32:
        assert apart(ours, theirs) < 1e-5
        assert apart(load_model(bases[tied]), theirs) > 1e-3, "else nothing was quantised"


@forms
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saved_is_read_here(bases, weights, tmp_path, form, tied, dtype):
    theirs = quantised_by_them(bases[tied], form, dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=dtype)
    assert same_weights(ours, theirs)
    assert {(w.kind, w.block_size, w.absmax is None) for w in quantized_weights(ours).values()} == {
        (form.kind, 64, form.double_quant)
    }
    assert same(ours, load_model(tmp_path / "theirs", dtype=dtype, quantize=form)), "asking for what it is anyway"
    assert kept(weights) == []
    if dtype == torch.float32:
        assert apart(ours, theirs) < 1e-5
    save_model(ours, None, tmp_path / "ours")
    assert same(load_model(tmp_path / "ours", dtype=dtype), ours)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "quant_state" not in name:
            assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name


def test_a_swapped_nibble_would_be_seen(bases, monkeypatch, tmp_path):
    theirs = quantised_by_them(bases[True], FORMS[0], torch.float32)
    theirs.save_pretrained(tmp_path)
    original = prequantized.from_bitsandbytes

    def swapped(*arguments):
        weight = original(*arguments)
        return weight.apply(lambda part: (part << 4 | part >> 4) if part is weight.packed else part)

    monkeypatch.setattr(prequantized, "from_bitsandbytes", swapped)
    ours = load_model(tmp_path)
    assert not same_weights(ours, theirs) and apart(ours, theirs) > 1e-2


def test_the_dtype_of_the_files_is_that_of_every_weight_in_them(bases, tmp_path):
    """Otherwise a 4-bit weight would be decoded to the dtype that the model was loaded in once."""
    model = load_model(bases[True], quantize="nf4", dtype="bfloat16").float()
    save_model(model, None, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.head_weight.dtype == torch.float32
    assert {weight.dtype for weight in quantized_weights(again).values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).train()
    assert same_weights(again, theirs) and apart(model, theirs) < 1e-5


def test_a_reward_head_stays_in_fp32_over_a_base_in_4_bits(base, tmp_path):
    model = load_model(base, dtype="bfloat16")
    add_score_head(model)
    save_model(model, None, tmp_path / "reward")
    for _ in range(2):  # quantised, then from what was kept
        again = load_model(tmp_path / "reward", quantize="nf4", dtype="bfloat16")
        assert again.dtype == torch.bfloat16 and again.score.weight.dtype == torch.float32
        assert torch.equal(again.score.weight, model.score.weight)


def test_shards(bases, weights, tmp_path):
    model = load_model(bases[False], quantize="nf4")
    save_model(model, None, tmp_path / "sharded", max_shard_bytes=40_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(load_model(tmp_path / "sharded"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32).train()
    assert same_weights(model, theirs)


@pytest.mark.parametrize("skipped", [["v_proj"], ["lm_head", "k_proj", "gate_proj", "up_proj"]])
def test_a_model_of_which_some_layers_are_not_quantised(bases, tmp_path, skipped):
    """As `llm_int8_skip_modules` leaves them: one of a group, or all of it. The head too if it is not named."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
                                llm_int8_skip_modules=skipped)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(bases[False], quantization_config=config, dtype=torch.float32)
    theirs.train().save_pretrained(tmp_path)
    if "lm_head" not in skipped:
        with pytest.raises(CheckpointError, match="lm_head.weight is quantised"):
            load_model(tmp_path)
        return
    ours = load_model(tmp_path)
    assert len(quantized_weights(ours)) == 2 * 4
    assert apart(ours, theirs) < 1e-5


# Refusals


def settings(folder, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "quantization_config": changes}))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "in 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "awq", "load_in_4bit": True}, "quantised by awq"),
        ({"bits": 4}, "can't be read here"),
    ],
)
def test_other_quantisations_are_refused(base, changes, words):
    settings(base, **changes)
    for quantization in (None, "nf4"):
        with pytest.raises(ConfigError, match=words) as caught:
            load_model(base, quantize=quantization)
        assert str(base) in str(caught.value) and "\n" not in str(caught.value)


def four_bits(folder, tmp_path, name=None):
    """A 4-bit folder, in which the tensor `name` is quantised too."""
    target = tmp_path / "four"
    save_model(load_model(folder, quantize="nf4", keep_quantized=False), None, target)
    if name:
        tensors = load_file(target / "model.safetensors")
        tensors |= to_bitsandbytes(name, quantize(tensors[name]))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_quantised_head_embedding_or_norm_is_refused(bases, tmp_path, name):
    folder = four_bits(bases[False], tmp_path, name)
    with pytest.raises(CheckpointError, match=f"{name} is quantised, which is supported for"):
        load_model(folder)


@pytest.mark.parametrize("asked", ["fp4", "int8", QuantizationConfig("nf4", 128), QuantizationConfig("nf4", 64, False)])
def test_another_kind_than_stored_is_refused(bases, tmp_path, asked):
    folder = four_bits(bases[True], tmp_path)
    with pytest.raises(ConfigError, match="is stored as .*nf4.*, not .*ask for that"):
        load_model(folder, quantize=asked)


@pytest.mark.parametrize("method", ["full", "lora", "last_layers", "pattern"])
def test_other_methods_than_qlora_cannot_train_a_4_bit_folder(bases, tmp_path, method):
    model = load_model(four_bits(bases[True], tmp_path))
    pattern = "norm" if method == "pattern" else None
    with pytest.raises(ConfigError, match=f"stored in 4 bits, which method {method} cannot train; use qlora"):
        choose_parameters(model, TrainConfig(data="x", method=method, pattern=pattern))
    assert choose_parameters(model, TrainConfig(data="x", method="qlora", lora=LoRAOptions(rank=2)))


@pytest.mark.parametrize("method", ["full", "lora", "last_layers", "pattern"])
@pytest.mark.parametrize("options", [{"kind": "nf4"}, {"block_size": 64}, {"double_quant": True}])
def test_options_of_qlora_are_refused_for_other_methods(method, options):
    with pytest.raises(ConfigError, match=f"quantization is set but method is {method}"):
        TrainConfig(data="x", method=method, quantization=QuantizationOptions(**options))


@pytest.mark.parametrize("size", [0, 1, 16, 48, 100, 8192, -64])
def test_block_sizes_that_are_no_powers_of_two_are_refused(base, size):
    makes = (
        lambda: QuantizationConfig("nf4", size),
        lambda: TrainConfig(data="x", method="qlora", quantization=QuantizationOptions(block_size=size)),
    )
    for make in makes:
        with pytest.raises(ConfigError, match=f"block_size is {size}; it must be a power of two from 32 to 4096"):
            make()


def test_an_option_that_int8_ignores_is_refused():
    for options in ({"block_size": 128}, {"double_quant": False}):
        with pytest.raises(ConfigError, match="int8"):
            QuantizationOptions(kind="int8", **options)
        with pytest.raises(ConfigError, match="int8"):
            QuantizationConfig("int8", **options)


def test_an_unknown_kind_is_refused_with_the_nearest(base):
    with pytest.raises(ConfigError, match="'nf5'; known are nf4, fp4, int8; did you mean 'nf4'"):
        load_model(base, quantize="nf5")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named(base, weights, value, kind, name):
    tensors = load_file(base / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN or infinity"):
        load_model(base, quantize=kind)
    assert kept(weights) == []


def test_a_weight_of_another_shape_is_listed(bases, tmp_path):
    folder = four_bits(bases[True], tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors |= to_bitsandbytes(name, quantize(torch.randn(64, 128)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} is \[64, 128\] instead of \[128, 64\]"):
        load_model(folder)


def test_a_model_with_an_adapter_is_not_saved_and_one_in_int8_cannot_be(base, tmp_path):
    with pytest.raises(ConfigError, match="int8; bitsandbytes' 4-bit form holds nf4 and fp4"):
        save_model(load_model(base, quantize="int8"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = load_model(base, quantize="nf4")
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(CheckpointError, match="has an adapter"):
        save_model(model, None, tmp_path / "out")


@pytest.mark.parametrize("option", [*FORMS, QuantizationConfig("int8"), QuantizationConfig("nf4", 128), None])
def test_an_adapter_says_how_its_base_was_quantised(base, tmp_path, option):
    model = load_model(base, quantize=option)
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    assert adapter_quantization(tmp_path / "adapter") == option
    again = load_model(base, adapter=tmp_path / "adapter", quantize="auto")
    assert same(again, model)
    assert quantized_weights(load_model(base, adapter=tmp_path / "adapter")) == {}, "only when it is asked for"


def test_the_bytes_of_an_adapter_are_the_same_at_every_write(base, tmp_path):
    """Where a file has two entries of metadata, the safetensors library orders them differently each time."""
    model = load_model(base, quantize="nf4")
    add_lora(model, LoRAConfig(rank=2))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    contents = set()
    for _ in range(12):
        save_adapter(model, file.parent)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"format", "minitune.base_quantization"}
    assert same(load_model(base, adapter=file.parent, quantize="nf4"), model)


@pytest.mark.parametrize("record", ["{", "[1]", '{"kind": "nf9"}', '{"width": 3}'])
def test_a_damaged_record_in_an_adapter_is_named(base, tmp_path, record):
    model = load_model(base, quantize="nf4")
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "minitune.base_quantization": record})
    with pytest.raises(CheckpointError, match="its record of the base's quantisation is damaged"):
        load_model(base, adapter=tmp_path / "adapter", quantize="auto")


@pytest.mark.real
def test_smollm2_is_read_by_transformers_and_from_it(smollm2_path, weights):
    ours = load_model(smollm2_path, quantize="nf4", dtype="float32")
    (name,) = kept(weights)
    theirs = AutoModelForCausalLM.from_pretrained(weights / "quantized" / name, dtype=torch.float32).train()
    assert same_weights(ours, theirs) and apart(ours, theirs) < 1e-5
    save_model(load_model(smollm2_path, dtype="float32"), None, weights / "full")
    theirs = quantised_by_them(weights / "full", FORMS[0], torch.float32)
    theirs.save_pretrained(weights / "theirs")
    again = load_model(weights / "theirs")
    assert same_weights(again, theirs) and apart(again, theirs) < 1e-5
