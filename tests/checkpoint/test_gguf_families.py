"""GGUF of every architecture, in and out: a converter of the test's own, transformers' import, and round trips."""

import dataclasses
import math

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitune.checkpoint import gguf as gguf_module
from minitune.checkpoint.gguf_metadata import _llama3_settings, lost
from minitune.checkpoint.gguf_writer import save_gguf
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import CheckpointError, ConfigError
from minitune.gguf_io import read_file
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from tests.checkpoint.gguf_cases import CASES, NAMES, convert, folder_of
from tests.parity.cases import Case
from tests.parity.twins import quiet, write

IDS = torch.randint(0, 288, (2, 30), generator=torch.Generator().manual_seed(0))
IMPORTED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")  # by transformers 5
# What transformers' import does not read: any rope but the default one, soft-caps, a query scale.
NOT_IMPORTED = ("llama3 rope", "linear rope", "yarn", "caps", "scaled", "longrope", "biases, tied")
VECTORS = ("llama3 rope", "longrope")  # ropes that the test's own converter leaves out


def apart(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def matrices(path):
    """Return the stored bytes of every matrix, but for learned positions, which are fp32 beside any other dtype."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: bytes(t.data) for t in tensors if len(t.shape) == 2 and "position" not in t.name}


def case_named(family, variant=""):
    return next(case for case in CASES if (case.family, case.variant) == (family, variant))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a case to its Hugging Face folder, with a tokenizer, written once."""
    made = {}

    def make(case):
        if case.name not in made:
            made[case.name] = folder_of(case, tmp_path_factory.mktemp("hf"))
        return made[case.name]

    return make


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case.variant not in VECTORS], ids=lambda case: case.name)
def test_a_file_as_llama_cpp_writes_it_answers_as_transformers(case, tmp_path):
    theirs = write(case, tmp_path / "hf")
    path = convert(case, theirs, tmp_path / "model.gguf")
    expected = theirs(IDS).logits
    assert apart(load_model(path)(IDS), expected) < 1e-5
    with pytest.MonkeyPatch.context() as patch:  # without rows put back and norms shifted, it would not
        patch.setattr(gguf_module, "layout_of", lambda config, name: gguf_module.Layout())
        untouched = apart(load_model(path)(IDS), expected) < 1e-5
    assert untouched == (case.family in ("qwen2", "qwen3", "phi3", "olmo2", "gpt2"))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_round_trips_are_exact(case, folders, tmp_path):
    """in -> out -> in: from fp32 all bits but those of Gemma's norms, of which 1 + w is stored; then all of them."""
    model = load_model(folders(case))
    for dtype in ("float32", "bfloat16", "q8_0"):
        first, second = tmp_path / f"{dtype}.gguf", tmp_path / f"{dtype}_again.gguf"
        save_gguf(model, None, first, dtype=dtype)
        once = load_model(first)
        save_gguf(once, None, second, dtype=dtype)
        weights, again = once.state_dict(), load_model(second).state_dict()
        assert weights.keys() == again.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert first.stat().st_size == second.stat().st_size and matrices(first) == matrices(second)
        if dtype == "float32":
            offset = model.config.norm_offset
            assert all(torch.equal(weight + offset * ("norm" in name), weights[name] + offset * ("norm" in name))
                       for name, weight in model.state_dict().items())  # fmt: skip
            assert apart(once(IDS), model(IDS)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.family in IMPORTED and case.variant not in NOT_IMPORTED],
    ids=lambda case: case.name,
)  # fmt: skip
def test_transformers_imports_what_we_write(case, folders, tmp_path):
    folder = folders(case)
    model = load_model(folder)
    for dtype, bar in (("float32", 1e-5), ("q8_0", 1e-5)):
        path = tmp_path / f"{dtype}.gguf"
        save_gguf(model, load_tokenizer(folder), path, dtype=dtype)
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        logits, ours = theirs(IDS).logits, load_model(path, dtype="float32")(IDS)
        assert apart(ours, logits) < bar and torch.equal(ours.argmax(-1), logits.argmax(-1))


def test_a_file_says_all_that_the_folder_said(folders, tmp_path):
    """Config, tokenizer, template and ids, and the types and keys that llama.cpp expects of them."""
    for case in CASES:
        model, tokenizer = load_model(folders(case)), load_tokenizer(folders(case))
        path = tmp_path / "model.gguf"
        notes = save_gguf(model, tokenizer, path, dtype="float16", overwrite=True)
        by_length = model.config.rope is not None and model.config.rope.kind == "longrope"
        assert len(notes) == by_length and all("long factors" in note for note in notes)
        config = load_model(path).config
        family = {"mistral": "llama"}.get(model.config.family, model.config.family)
        ids = {"bos_id": 256, "eos_ids": (258,), "pad_id": 259}
        expected = dataclasses.replace(model.config, family=family, initializer_range=0.02, **ids)
        assert not lost(expected, config) and (config.family, config.eos_ids) == (family, (258,))
        assert (config.bos_id, config.pad_id) == (256, 259)
        again = load_tokenizer(path)
        text = "hello <|im_start|> wörld 123\n🎉"
        assert again.encode(text) == tokenizer.encode(text)
        assert again.settings["chat_template"] == tokenizer.settings["chat_template"]
        assert again.end_ids == tokenizer.end_ids and again.control_ids == tokenizer.control_ids
    metadata, tensors = read_file(path, arrays=True)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.tokens"][287] == "[PAD287]"
    assert metadata["tokenizer.ggml.token_type"][255:269] == [1, 3, 3, 3, 3, *[1] * 8, 5]
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16 and metadata["general.type"] == "model"
    assert kinds["token_embd.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_qkv.bias"] == "F32"


@pytest.mark.parametrize(
    "variant, change, expected",
    [
        ("llama3 rope", {"rope_freqs.weight": [1.0, 1, 1, 1, 2, 2, 2, 3]}, "not a rope of Llama 3's kind"),
        ("llama3 rope", {"rope_freqs.weight": [1.0]}, "not a rope of Llama 3's kind"),
        (
            "wide heads",
            {"rope_factors_short.weight": [1.0]},
            "rope_factors_short.weight is there in a rope of kind def",
        ),
        ("linear rope", {"rope_freqs.weight": [1.0] * 4}, "rope_freqs.weight is there in a rope of kind linear"),
    ],
)
def test_vectors_that_are_no_rope_are_refused(folders, tmp_path, monkeypatch, variant, change, expected):
    from minitune.checkpoint import gguf_writer

    model = load_model(folders(case_named("llama", variant)))
    values, _ = gguf_writer.write_values(model.config)
    monkeypatch.setattr(gguf_writer, "write_values", lambda config: (values, change))
    with pytest.raises(CheckpointError, match=expected):
        save_gguf(model, None, tmp_path / "model.gguf")  # which reads it again


@pytest.mark.parametrize(
    "factor, context, width", [(8.0, 8192, 128), (32.0, 8192, 64), (8.0, 8192, 64), (4.0, 4096, 32)]
)
def test_the_settings_of_llama3_come_out_of_its_factors(factor, context, width):
    """Factors as llama.cpp's converter computes them, in fp32 and pair by pair, for Llama 3.1 and 3.2's settings."""
    factors = []
    for frequency in 1.0 / 500000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width):
        wave = 2 * math.pi / frequency
        smooth = (context / wave - 1) / 3
        kept = 1.0 if wave < context / 4 else factor if wave > context else 1 / ((1 - smooth) / factor + smooth)
        factors.append(float(kept))
    found = _llama3_settings(factors, width, 500000.0, "x")
    assert found == {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": context}  # fmt: skip


def test_what_gguf_cannot_say_is_refused(tmp_path, folders):
    """Values of a family for which llama.cpp has no key, or only one value."""
    cases = [
        (Case("x", "", "Mistral", {"sliding_window": 7}), "architecture llama cannot say windows"),
        (Case("x", "", "Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}),
         "cannot say attention_scale"),
        (Case("x", "", "Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
         "cannot say rope Rope"),
        (Case("x", "", "SmolLM3", {"no_rope_layers": [1, 0, 1]}), "cannot say rope_layers"),
        (Case("x", "", "Gemma", {"head_dim": 16, "tie_word_embeddings": False}), "the head is untied from"),
        (Case("x", "", "Olmo2", {"tie_word_embeddings": True}), "the head is tied to"),
    ]  # fmt: skip
    for number, (case, expected) in enumerate(cases):
        write(case, tmp_path / str(number))
        with pytest.raises(CheckpointError, match=expected):
            save_gguf(load_model(tmp_path / str(number)), None, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_models_and_paths_that_are_refused(tmp_path, folders, monkeypatch):
    folder = folders(case_named("llama", "wide heads"))
    path, model = tmp_path / "model.gguf", load_model(folder)
    with pytest.raises(ConfigError, match="dtype 'q4_0' cannot be written to GGUF.*did you mean 'q8_0'"):
        save_gguf(model, None, path, dtype="q4_0")
    with pytest.raises(CheckpointError, match="must end in .gguf"):
        save_gguf(model, None, tmp_path / "model.bin")
    path.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        save_gguf(model, None, path)
    with monkeypatch.context() as patch:  # a disk that fills up
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *a: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match="No space"):
            save_gguf(model, None, path, overwrite=True)
    assert path.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    path.unlink()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight is not finite in F16"):
        save_gguf(model, None, path, dtype="float16")
    with pytest.raises(CheckpointError, match="quantised"):
        save_gguf(load_model(folder, quantize="nf4", keep_quantized=False), None, path)
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(CheckpointError, match="merge it first"):
        save_gguf(model, None, path)
    write(Case("x", "", "Llama", {"hidden_size": 40, "num_attention_heads": 4}), tmp_path / "odd")
    with pytest.raises(
        CheckpointError, match=r"q8_0 takes rows of a multiple of 32: model.embed_tokens.weight \(131, 40\); .*"
    ):
        save_gguf(load_model(tmp_path / "odd"), None, path, dtype="q8_0")
    assert not path.exists()
