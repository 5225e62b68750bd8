"""GGUF against transformers' own import of the same file, and damaged files."""

import time

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError, ConfigError
from minitune.gguf_io import read_file

HEADS, KV_HEADS, WIDTH, INNER, VOCAB = 4, 2, 64, 96, 96


@torch.no_grad()
def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@torch.no_grad()
def test_smollm2_equals_transformers_import(smollm2_path):
    expected, ours = theirs(smollm2_path), load_model(smollm2_path)
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert sum(parameter.numel() for parameter in ours.parameters()) == 134_515_008
    ids = torch.randint(0, 49152, (2, 21), generator=torch.Generator().manual_seed(0))
    reference = expected(ids).logits
    assert (ours(ids) - reference).norm() / reference.norm() < 1e-5
    config = ours.config
    assert (config.num_layers, config.rope.theta, config.norm_eps, config.eos_ids) == (30, 100_000, 1e-5, (2,))


def write_tiny(path, *, kind=gguf.GGMLQuantizationType.Q8_0, untied=False, skip=(), architecture="llama", extra=None):
    """Write a random GGUF with the gguf package; norms fp32, matrices quantised."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for name, value in (extra or {}).items():
        writer.add_uint32(name, value)
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)} | ({"output": (VOCAB, WIDTH)} if untied else {})
    kv_rows = WIDTH // HEADS * KV_HEADS
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_k": (kv_rows, WIDTH),
                   f"blk.{i}.attn_v": (kv_rows, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH),
                   f"blk.{i}.ffn_gate": (INNER, WIDTH), f"blk.{i}.ffn_up": (INNER, WIDTH),
                   f"blk.{i}.ffn_down": (WIDTH, INNER), f"blk.{i}.attn_norm": (WIDTH,),
                   f"blk.{i}.ffn_norm": (WIDTH,)}  # fmt: skip
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if name in skip:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("untied", [False, True])
def test_types_and_row_order_equal_transformers_import(tmp_path, kind, untied):
    path = write_tiny(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind], untied=untied)
    state = theirs(path).state_dict()
    ours = load_model(path, dtype="float32")
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert ours.config.tie_embeddings != untied
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    default = load_model(path)
    assert default.model.embed_tokens.weight.dtype == stored
    half = load_model(path, dtype="bfloat16").state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in ours.state_dict().items())


def test_row_order_mutant_is_caught(tmp_path, monkeypatch):
    """Without the un-permutation, q differs: the test above does guard it."""
    from minitune.checkpoint.gguf import Layout

    path = write_tiny(tmp_path / "tiny.gguf")
    state = theirs(path).state_dict()
    monkeypatch.setattr(Layout, "places", lambda self, rows: None)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(load_model(path).state_dict()[name], state[name])


def test_folder_with_one_gguf_is_that_file(tmp_path):
    write_tiny(tmp_path / "a.gguf")
    load_model(tmp_path)
    write_tiny(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"architecture": "qwen22"}, "architecture 'qwen22' is not supported in GGUF; did you mean 'qwen2'"),
        ({"architecture": "qwen3"}, "model.layers.0.self_attn.q_norm.weight is missing; layers.1.self_attn.k_norm"),
        ({"architecture": "phi3"}, "qkv_proj.weight is missing; q_proj.weight is not part; gate_up_proj.weight is [96"),
        ({"extra": {"split.count": 3, "split.no": 1}}, "not a whole model but part of one"),
        ({"extra": {"llama.rope.scaling.factor": 4, "llama.rope.scaling.yarn_beta_fast": 32}}, "'beta_fast'"),
        ({"extra": {"llama.rope.scaling.attn_factor": 2}}, "attn_factor is not implemented in a rope of kind default"),
        ({"extra": {"llama.attention.sliding_window": 7}}, "sliding_window is not known"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count is not known"),
        ({"extra": {"llama.rope.dimension_count": 8}}, "8 of a head's 16 elements are turned"),
        ({"extra": {"llama.attention.key_length": 8}}, "[64, 64] instead of [32, 64]"),
        ({"extra": {"llama.attention.key_length": 16, "llama.attention.value_length": 8}}, "value_length is 8"),
        ({"extra": {"llama.attention.key_length": 15}}, "rope turns 15 of"),
        ({"skip": ("blk.1.ffn_up", "output_norm")}, "model.norm.weight is missing; model.layers.1.mlp.up_proj"),
    ],
)
def test_other_models_are_refused(tmp_path, options, expected):
    path = write_tiny(tmp_path / "tiny.gguf", **options)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(path)
    assert all(part in str(caught.value) for part in expected.split("; "))


K_TYPES = {"Q5_0": 1, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2, "Q6_K": -1}  # number of fp16 scales, at the start or the end


@torch.no_grad()
@pytest.mark.parametrize("kind", K_TYPES)
def test_blocks_of_every_kind_equal_transformers_import(tmp_path, kind):
    """Blocks of random codes; only their scales are drawn to be numbers of a weight's size."""
    quantisation = gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[quantisation]
    generator = np.random.default_rng(0)

    def blocks(values, _):
        raw = generator.integers(0, 256, (len(values), values.shape[1] // size, width), dtype=np.uint8)
        scales = generator.uniform(0.001, 0.01, (*raw.shape[:2], abs(K_TYPES[kind]))).astype(np.float16).view(np.uint8)
        raw[..., slice(0, scales.shape[2]) if K_TYPES[kind] > 0 else slice(-2, None)] = scales
        return raw.reshape(len(values), -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", blocks)
        for name, value in (("WIDTH", 256), ("INNER", 512)):
            patch.setitem(globals(), name, value)
        path = write_tiny(tmp_path / "tiny.gguf", kind=quantisation)
    state, ours = theirs(path).state_dict(), load_model(path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())
    assert 0.01 < ours["model.layers.0.mlp.up_proj.weight"].std() < 10


def change(old, new):
    """Return a change to a file's content that keeps its length."""
    assert len(old) == len(new)
    return lambda content: content.__setitem__(slice(content.index(old), content.index(old) + len(old)), new)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "there are two tensors blk.0.ffn_up.weight"),
        (b"llama.embedding_length", b"llama.attention.head_c", "the field llama.attention.head_c is not known"),
        (b"general.architecture", b"general.architectura", "architecture None is not supported"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_op.weight", "blk.1.ffn_op.weight is not part of this model"),
        (b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight", "model.layers.7.mlp.up_proj.weight is not part"),
        (b"llama.block_count", b"llama.block_caunt", "llama.block_caunt is not known"),
        (b"llama.context_length", b"llama.embedding_len1", "is not known"),
    ],
)
def test_changed_names_are_refused(tmp_path, old, new, expected):
    assert expected in damaged(write_tiny(tmp_path / "tiny.gguf"), change(old, new))


def test_two_fields_of_one_name_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.kv_data[0]["aaaa"] = writer.kv_data[0]["bbbb"] = writer.kv_data[0]["general.architecture"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "Duplicate aaaa" in damaged(tmp_path / "tiny.gguf", change(b"bbbb", b"aaaa"))


@pytest.mark.parametrize("number, name", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_numbers_that_are_not_finite_are_named(tmp_path, number, name):
    path = write_tiny(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.F32)
    tensor = next(t for t in read_file(path, arrays=False)[1] if t.name == "blk.1.ffn_up.weight")
    place, stored = slice(tensor.data_offset, tensor.data_offset + 4), np.float32(number).tobytes()
    message = damaged(path, lambda content: content.__setitem__(place, stored))
    assert "model.layers.1.mlp.up_proj.weight holds a NaN or infinity" in message and name in message


@pytest.mark.parametrize("key, value", [
    ("llama.attention.head_count", 0), ("llama.embedding_length", 0), ("llama.embedding_length", 1 << 31),
    ("llama.attention.head_count_kv", 3), ("llama.vocab_size", 7), ("llama.feed_forward_length", 1 << 31),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused_at_once(tmp_path, key, value):
    def put(content):
        at = content.index(key.encode()) + len(key) + 4
        content[at : at + 4] = value.to_bytes(4, "little")

    assert damaged(write_tiny(tmp_path / "tiny.gguf"), put)


def test_a_value_of_another_type_is_refused(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", extra={"llama.attention.key_length": 16})
    text = gguf.GGUFValueType.FLOAT32.to_bytes(4, "little")

    def put(content):
        at = content.index(b"llama.attention.key_length") + len(b"llama.attention.key_length")
        content[at : at + 4] = text

    assert "llama.attention.key_length is 2.2" in damaged(path, put)


def damaged(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(path)
    assert time.monotonic() - started < 1
    return str(caught.value)


def test_wrong_magic_and_truncation(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    assert "not a GGUF file" in damaged(path, lambda content: content.__setitem__(slice(0, 4), b"PK\3\4"))
    for length in (0, 10, 23, 60, 500, 2000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole)
        message = damaged(path, lambda content, length=length: content.__delitem__(slice(length, None)))
        assert "truncated" in message or "not a GGUF" in message or "damaged" in message


def test_a_file_that_ends_early_names_its_first_lost_tensor(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    last = gguf.GGUFReader(path).tensors[-2:]  # the package's reader says where they lie
    ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in last]
    count = len(gguf.GGUFReader(path).tensors)
    message = damaged(path, lambda content: content.__delitem__(slice(ends[0] - 1, None)))
    assert f"the tensor {last[0].name} ends at byte {ends[0]:,}, the file at {ends[0] - 1:,}; " in message
    assert f"2 of its {count} tensors" in message
    write_tiny(path)
    message = damaged(path, lambda content: content.__delitem__(slice(ends[1] - 1, None)))
    assert f"the tensor {last[1].name} ends at byte {ends[1]:,}" in message and f"; 1 of its {count}" in message
    write_tiny(path)
    with open(path, "r+b") as stream:
        stream.truncate(ends[1])  # what pads the last tensor may be lacking
    load_model(path)


def test_absurd_counts_are_refused_within_a_second(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    huge = (2**63 - 1).to_bytes(8, "little")
    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    blocks = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
    dims = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    for place, value, expected in (
        (8, huge, "9,223,372,036,854,775,807 tensors"),
        (16, huge, "9,223,372,036,854,775,807 fields"),
        (tokens, huge, "claims 9,223,372,036,854,775,807 strings"),
        (dims, huge, "damaged"),
        (blocks, b"\xff\xff\xff\x7f", "2,147,483,647 layers are claimed"),
        (24, huge, "damaged"),
    ):
        path.write_bytes(whole)
        change = slice(place, place + len(value))
        assert expected in damaged(path, lambda c, change=change, value=value: c.__setitem__(change, value))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a damaged scale is a NaN
@settings(max_examples=150, deadline=None)
@example(place=140, value=b"\x00\x00@")  # a width whose square overflows
@given(place=st.integers(4, 3500), value=st.binary(min_size=1, max_size=8))
def test_random_damage_never_escapes(tmp_path_factory, place, value):
    """Any bytes anywhere in the header: a checkpoint error or a model of the same shape, never another error."""
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.gguf").exists():
        write_tiny(folder / "whole.gguf")
    content = bytearray((folder / "whole.gguf").read_bytes())
    content[place : place + len(value)] = value
    (folder / "changed.gguf").write_bytes(content)
    started = time.monotonic()
    try:
        load_model(folder / "changed.gguf")
    except (CheckpointError, ConfigError):
        pass
    assert time.monotonic() - started < 2
