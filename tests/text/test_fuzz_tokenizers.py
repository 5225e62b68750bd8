"""Tokenizer files made wrong at random: each is refused by a clear error of ours, or loads and can be used."""

import json

import pytest
from chat_styles import CHATML, HELPERS, LLAMA3, THINKING
from conftest import write_fast
from hypothesis import strategies as st
from test_tokenizers import write_gguf
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minitune.text.chat import render_chat
from minitune.text.templates import ChatTemplate
from minitune.text.tokenizer import load_tokenizer
from tests.fuzz.mutations import COUNTS, fuzz, mutated_bytes, mutated_json, outcome

TEXT = "Hello ab <s> café 🎉\n\t \x00 0<|im_end|> <0x41>"
TALK = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "ab"}]


def use(path):
    """Load a tokenizer and do with it what the rest of the engine does."""
    ours = load_tokenizer(path)
    ids = ours.encode(TEXT)
    assert all(0 <= id < ours.vocab_size for id in ids)
    ours.decode([*ids, *range(300), ours.vocab_size + 5])
    ours.encode(TEXT, control=True)
    ours.encode_run("ab", "inside")
    ours.check_fits(ours.vocab_size)
    assert ours.end_ids
    stream = ours.stream()
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == ours.decode(ids)
    if ours.chat_template is not None:
        render_chat(ours, TALK)
    if path.is_dir():
        ours.save(path / "again")
    return ours


def small_documents():
    """Return tokenizer.json files of each kind, small, so that a mutation is likely to hit a step or a flag."""
    letters = ["<s>", "</s>", "<unk>", "\u2581", *"abHelo", "ab", "ll", *(f"<0x{n:02X}>" for n in range(8))]
    vocabulary = {token: id for id, token in enumerate(letters)}
    pairs = [("a", "b"), ("l", "l")]
    byte = FastTokenizer(models.BPE({c: n for n, c in enumerate(pre_tokenizers.ByteLevel.alphabet())} | {"ab": 256},
                                    [("a", "b")]))  # fmt: skip
    split = pre_tokenizers.Split(" ", "isolated")
    byte.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    byte.decoder, byte.normalizer = decoders.ByteLevel(), normalizers.NFC()
    piece = FastTokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    unigram = FastTokenizer(models.Unigram([(token, -float(id)) for token, id in vocabulary.items()], 2, False))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    for tokenizer in (byte, piece, unigram):
        tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
        tokenizer.enable_truncation(100)
        tokenizer.enable_padding(length=8)
        tokenizer.decoder = tokenizer.decoder or decoders.Sequence(steps)
    return [json.loads(tokenizer.to_str()) for tokenizer in (byte, piece, unigram)]


SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None, "add_bos_token": True,
    "legacy": False, "extra_special_tokens": {"image": "<s>"}, "additional_special_tokens": ["<s>"],
    "chat_template": "{% for m in messages %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}",
    "added_tokens_decoder": {"480": {"content": "<new>", "special": True, "lstrip": False, "rstrip": True}},
}  # fmt: skip
BESIDE = {
    "tokenizer_config.json": SETTINGS,
    "special_tokens_map.json": {"bos_token": "<s>", "pad_token": {"content": "</s>"}},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"eos_token_id": 2},
    "added_tokens.json": {"<late>": 481},
}


@COUNTS
def test_mutated_tokenizer_json(tmp_path, count):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    small = small_documents()
    whole = (write_fast(tmp_path / "whole", "llama3") / "tokenizer.json").read_bytes()
    texts = st.one_of(*(mutated_json(document).map(str.encode) for document in small), mutated_bytes(whole))

    def check(text):
        (tmp_path / "tokenizer.json").write_bytes(text)
        outcome(lambda: use(tmp_path))

    for document in small:  # as they are, they are read
        check(json.dumps(document).encode())
        assert outcome(lambda: use(tmp_path)) is not None
    fuzz(texts, check, count)


@COUNTS
@pytest.mark.parametrize("kind", ["json", "model"])
def test_mutated_files_beside_the_tokenizer(tmp_path, piece_folder, count, kind):
    if kind == "json":
        (tmp_path / "tokenizer.json").write_text(json.dumps(small_documents()[0]))
    else:
        (tmp_path / "tokenizer.model").write_bytes((piece_folder(vocab_size=480) / "tokenizer.model").read_bytes())
    cases = st.one_of(*(st.tuples(st.just(name), mutated_json(content)) for name, content in BESIDE.items()))

    def check(case):
        for name, content in BESIDE.items():
            (tmp_path / name).write_text(json.dumps(content))
        (tmp_path / case[0]).write_bytes(case[1].encode())
        outcome(lambda: use(tmp_path))

    fuzz(cases, check, count)


@COUNTS
def test_mutated_tokenizer_model(tmp_path, piece_folder, count):
    options = [{}, {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}]
    wholes = [(piece_folder(vocab_size=400, **each) / "tokenizer.model").read_bytes() for each in options]

    def check(content):
        (tmp_path / "tokenizer.model").write_bytes(content)
        outcome(lambda: use(tmp_path))

    fuzz(st.one_of(*map(mutated_bytes, wholes)), check, count)


@COUNTS
def test_mutated_chat_templates(fast_folder, tmp_path, count):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fast_folder("chatml") / name).read_bytes())
    sources = [source.encode() for source in (CHATML, LLAMA3, THINKING, HELPERS)]
    ours = load_tokenizer(tmp_path)

    def rendered(text):
        ours.chat_template = ChatTemplate(text, "x")
        for prompt in (False, True):
            chat = render_chat(ours, TALK[:1] if prompt else TALK, add_generation_prompt=prompt)
            assert len(chat.ids) == len(chat.targets) and any(chat.targets) != prompt

    def check(content):
        outcome(lambda: rendered(content.decode("utf-8", "replace")))

    fuzz(st.one_of(*map(mutated_bytes, sources)), check, count)


@COUNTS
def test_mutated_gguf(tmp_path, count):
    letters = ["<s>", "</s>", "<unk>", "\u2581", *"abHelo", "ab", "ll"]
    common = {"bos_token_id": 0, "eos_token_id": 1, "unk_token_id": 2, "chat_template": SETTINGS["chat_template"]}
    kinds = [3, 3, 2, *[1] * (len(letters) - 3)]
    scores = {"token_scores": [-float(n) for n in range(len(letters))], "add_space_prefix": True}
    write_gguf(tmp_path / "piece.gguf", "llama", letters, kinds, **common, **scores)
    alphabet = [*letters[:3], *pre_tokenizers.ByteLevel.alphabet(), "ab"]
    types = [3, 3, 3, *[1] * (len(alphabet) - 3)]
    write_gguf(
        tmp_path / "byte.gguf", "gpt2", alphabet, types, tokenizer_pre="llama-bpe", token_merges=["a b"], **common
    )
    wholes = [(tmp_path / name).read_bytes() for name in ("piece.gguf", "byte.gguf")]
    file = tmp_path / "mutated.gguf"

    def check(content):
        file.write_bytes(content)
        outcome(lambda: use(file))

    for whole in wholes:
        file.write_bytes(whole)
        assert outcome(lambda: use(file)) is not None
    fuzz(st.one_of(*map(mutated_bytes, wholes)), check, count)
