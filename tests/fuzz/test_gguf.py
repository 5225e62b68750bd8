"""GGUF files made wrong: refused, or loaded, tokenizer too, and able to run."""

import json

import gguf
import numpy as np
import torch
from gguf import GGUFValueType as Kind
from hypothesis import strategies as st

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.inspect import as_text, describe
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, outcome

IDS = torch.arange(5).view(1, 5)
HEADS, KV_HEADS, WIDTH, INNER, VOCAB = 4, 2, 32, 32, 12
TYPES = [1, 2, 3, *[1] * (VOCAB - 3)]  # tokenizer.ggml.token_type: normal, unknown, control


ODD = [
    (Kind.UINT32, 0), (Kind.UINT32, 1), (Kind.UINT32, 3), (Kind.UINT32, 2**32 - 1), (Kind.UINT64, 2**63),
    (Kind.INT32, -1), (Kind.INT64, -(2**63)), (Kind.FLOAT32, 0.0), (Kind.FLOAT32, float("nan")),
    (Kind.FLOAT32, float("inf")), (Kind.FLOAT64, 1e300), (Kind.BOOL, True), (Kind.BOOL, False), (Kind.STRING, ""),
    (Kind.STRING, "x"), (Kind.STRING, "a" * 5000), (Kind.STRING, "\0"),
    (Kind.ARRAY, [1, 2, 3]), (Kind.ARRAY, ["a", "b"]),
    (Kind.ARRAY, [-1.0] * VOCAB), (Kind.ARRAY, ["a"] * VOCAB), (Kind.ARRAY, [[1], [2]]), None,
]  # fmt: skip
MORE = ["rope.scaling.type", "rope.scaling.factor", "rope.dimension_count", "attention.key_length", "expert_count",
        "attention.sliding_window", "attention.layer_norm_rms_epsilon", "unheard_of"]  # fmt: skip


def write(path, kind: str, change: dict | None = None):
    """Write a random Llama of one layer with the gguf package; `kind` is that of its tokenizer.

    `change`: fields of the metadata to replace by (type, value), None to leave out.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 128), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS),
        (writer.add_rope_freq_base, 10000.0), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, VOCAB),
        (writer.add_tokenizer_model, kind), (writer.add_token_types, TYPES), (writer.add_eos_token_id, 2),
        (writer.add_token_list, ["a", "<unk>", "</s>", "b", "c", "ab", "bc", "▁", "▁a", "d", "e", "f"]),
    ):  # fmt: skip
        add(value)
    if kind == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b", "b c"])
    else:
        writer.add_token_scores([-float(number) for number in range(VOCAB)])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,),
              "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (WIDTH // 2, WIDTH), "blk.0.attn_v": (WIDTH // 2, WIDTH),
              "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_norm": (WIDTH,), "blk.0.ffn_gate": (INNER, WIDTH),
              "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}  # fmt: skip
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, odd in (change or {}).items():
        writer.kv_data[0].pop(name, None)
        if odd is not None:
            writer.add_key_value(name, odd[1], odd[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(file, seen: dict[str, int]) -> None:
    """Load a file in every way."""
    model = outcome(lambda: load_model(file))
    seen["refused" if model is None else "loaded"] += 1
    if model is not None:
        assert model(IDS).shape == (1, 5, model.config.vocab_size)
    tokenizer = outcome(lambda: load_tokenizer(file))
    if tokenizer is not None:
        outcome(lambda: tokenizer.decode(tokenizer.encode("abc cab")))
    facts = outcome(lambda: describe(file))
    assert json.loads(json.dumps(facts, default=str)) and as_text(facts)


@COUNTS
@torch.no_grad()
def test_mutated_files(tmp_path, count):
    file, seen = tmp_path / "m.gguf", {"loaded": 0, "refused": 0}
    write(file, "gpt2")
    content = file.read_bytes()
    head = content.index(b"token_embd.weight") + 600  # then come the tensors

    def mutated(content: bytes) -> None:
        file.write_bytes(content)
        check(file, seen)

    fuzz(mutated_bytes(content, head=head), mutated, count)
    assert min(seen.values()) > 0  # both happen


@COUNTS
@torch.no_grad()
def test_mutated_fields(tmp_path, count):
    """Sound files, in which fields have other values, other types, or are gone."""
    file, seen = tmp_path / "m.gguf", {"loaded": 0, "refused": 0}
    write(file, "gpt2")
    names = sorted(name for name in gguf.GGUFReader(file).fields if not name.startswith("GGUF."))
    names += [f"llama.{name}" for name in MORE]
    changes = st.dictionaries(st.sampled_from(names), st.sampled_from(ODD), min_size=1, max_size=2)

    def changed(case) -> None:
        write(file, *case)
        check(file, seen)

    fuzz(st.tuples(st.sampled_from(["gpt2", "llama"]), changes), changed, count)
    assert min(seen.values()) > count // 50  # both happen
