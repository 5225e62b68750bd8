"""Tokenizers against the libraries that own the formats, and against a byte-pair encoder written out by hand."""

import json
import random
import time
from unicodedata import normalize

import gguf
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.gguf_io import read_file
from minitune.text.splits import SPLITS
from minitune.text.stream import byte_level_alphabet
from minitune.text.tokenizer import load_tokenizer

TEXTS = [
    "",
    "Hello world",
    "  two spaces,\ttab\nand\r\nlines  ",
    "In 2024, 1234567 + 0.5 = ½ ² Ⅷ ٣",
    "naïve café e\u0301 👩‍👩‍👧 🎉🎉 🇫🇷",
    "مرحبا بالعالم، كيف حالك؟",
    "สวัสดีชาวโลก ไม่มีช่องว่าง",
    "日本語のテキスト。中文字符",
    "\x00\x01\x1b\x7f\x85\u200b\u2028\ufeff\ufffd",
    "for (i=0; i<10; i++) { x['a'] += \"b\\n\"; }  // don't",
    "</s><s> <unk> <|im_end|> [INST] <0x41> <think>",
    "a" * 300 + " " * 40 + "\n" * 9,
]
fast = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


def bpe_by_hand(text, vocabulary, ranks):
    """GPT-2's algorithm on words split as SmolLM2 does: each digit alone, then GPT-2's pattern."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for short, unicode in ((r"\s", r"\p{White_Space}"), (r"\S", r"\P{White_Space}")):  # as Unicode defines white space
        pattern = pattern.replace(short, unicode)
    words = regex.compile(pattern)
    characters = {byte: character for character, byte in byte_level_alphabet().items()}
    ids = []
    for part in regex.split(r"(\p{N})", text):
        for word in words.findall(part):
            symbols = [characters[byte] for byte in word.encode()]
            while len(symbols) > 1:
                pairs = list(zip(symbols, symbols[1:], strict=False))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                merged, at = [], 0
                while at < len(symbols):
                    both = tuple(symbols[at : at + 2]) == best
                    merged.append("".join(best) if both else symbols[at])
                    at += 2 if both else 1
                symbols = merged
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return load_tokenizer(smollm2_path)


def test_smollm2_ids_equal_byte_pair_encoding_by_hand(smollm2, smollm2_path):
    fields, _ = read_file(smollm2_path, arrays=True)
    vocabulary = {token: id for id, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    shuffled = random.Random(0)
    alphabet = [character for text in TEXTS for character in text]
    mixtures = ["".join(shuffled.choices(alphabet, k=30)) for _ in range(200)]
    for text in TEXTS + mixtures:
        assert smollm2.encode(text) == bpe_by_hand(text, vocabulary, ranks), text
        assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_facts(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)
    assert smollm2.end_ids == (2,) and not smollm2.add_bos
    assert smollm2.encode("12") == smollm2.encode("1") + smollm2.encode("2")


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "deepseek"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_json_gives_the_ids_of_transformers(fast_folder, style, add_bos):
    folder = fast_folder(style, add_bos=add_bos)
    judge, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.add_bos == add_bos
    for text in TEXTS[:-2]:
        assert ours.encode(text) == judge(text).input_ids, text
        assert ours.encode(text, bos=False) == judge(text, add_special_tokens=False).input_ids
        assert ours.decode(judge(text).input_ids) == text
        assert ours.decode(ours.encode(text)) == text
    for name in ("bos", "eos"):
        assert getattr(ours, f"{name}_id") == getattr(judge, f"{name}_token_id")
    assert ours.vocab_size == len(judge)


@pytest.mark.parametrize("scheme", ["prepend", "first", "always"])
def test_prefix_spaces_as_in_transformers(fast_folder, scheme):
    folder = fast_folder("llama2", scheme)
    judge, ours = PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    for text in ["Hello world", "</s>fox", "fox</s>the dog</s> x</s>", "<s></s>", " fox"]:
        assert ours.encode(text, control=True, bos=False) == judge(text, add_special_tokens=False).input_ids, text
    for text in ["The quick brown fox", "x  y"]:  # Metaspace itself writes "fox" and " fox" alike
        assert ours.decode(ours.encode(text)) == text


def test_text_cut_inside_gets_no_prefix_space(fast_folder, piece_folder):
    for folder in [fast_folder("llama2", s) for s in ("prepend", "first", "always")] + [piece_folder()]:
        ours = load_tokenizer(folder)
        first = ours.encode("The quick")
        assert ours.decode(first + ours.encode_run(" brown fox", "inside")) == "The quick brown fox"
        assert ours.decode(first + ours.encode_run("ly", "inside")) == "The quickly"
        assert ours.decode(first + ours.encode_run("\u4e16é", "inside")) == "The quick\u4e16é"


@pytest.mark.parametrize("options", [{}, {"split_digits": True}, {"byte_fallback": False}, {"add_dummy_prefix": False}])
def test_tokenizer_model_gives_the_ids_of_sentencepiece(piece_folder, options):
    folder = piece_folder(**options)
    judge = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = load_tokenizer(folder)
    shuffled = random.Random(0)
    alphabet = [character for text in TEXTS for character in text]
    for text in TEXTS + ["".join(shuffled.choices(alphabet, k=30)) for _ in range(200)]:
        if "byte_fallback" in options:
            assert ours.encode(text, bos=False) == judge.encode(text), text
            continue
        assert ours.encode(text) == [judge.bos_id(), *judge.encode(text)], text
        assert ours.decode(ours.encode(text)) == judge.decode(judge.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size, ours.add_bos) == (1, 2, len(judge), True)


def test_of_equal_merges_the_leftmost_is_done_first(piece_folder):
    """Of equal scores, that is: Llama and Mistral give one to all their runs of spaces, of the lengths below."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder = piece_folder()
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    del model.pieces[259:]  # what stays are control tokens and bytes
    runs = ["=" * length for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1)]
    for piece in [*runs, "\u2581"]:
        model.pieces.add(piece=piece, score=-1e9)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    judge = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = load_tokenizer(folder)
    for length in range(80):
        assert ours.encode("=" * length, bos=False) == judge.encode("=" * length)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "identity"])
@pytest.mark.parametrize("extra", [False, True])
def test_sentencepiece_models_of_other_kinds_give_its_ids(piece_folder, kind, rule, extra):
    options = {"model_type": kind, "normalization_rule_name": rule, "remove_extra_whitespaces": extra}
    folder = piece_folder(**options, byte_fallback=False)
    judge = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = load_tokenizer(folder)
    texts = [text for text in TEXTS if "<0x41>" not in text]  # whose control tokens we cut apart, it does not
    for text in [*texts, "ｶﾞ Ａ\u00a0\u0e35 ﬁ ① e\u0301 ", "   ", " ▁x▁ "]:
        assert ours.encode(text, bos=False) == judge.encode(text), text
        if judge.unk_id() not in judge.encode(text) and "▁" not in text:  # its signs for unknown text and for a space
            assert ours.decode(ours.encode(text)) == judge.decode(judge.encode(text))


def test_sentencepiece_models_of_words_and_characters_are_refused(piece_folder):
    for kind in ("word", "char"):
        with pytest.raises(CheckpointError, match="cuts by words or characters; known: BPE, unigram"):
            load_tokenizer(piece_folder(model_type=kind, byte_fallback=False))


def write_gguf(file, model, tokens, kinds, architecture="llama", **fields):
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# name -> transformers' class for that tokenizer: its own normaliser and split
SPLIT_CLASSES = {
    **dict.fromkeys(["gpt-2", "phi-2"], "GPT2Tokenizer"),
    **dict.fromkeys(["mpt", "olmo"], "GPTNeoXTokenizer"),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "megrez"], "Qwen2Tokenizer"),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r"], "CohereTokenizer"),
}


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_gguf_splits_as_the_models_own_tokenizers_do(fast_folder, tmp_path, split):
    """Judges: transformers' classes, or its table of expressions by GGUF's name; DeepSeek's have vectors only."""
    import transformers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    trained = json.loads((fast_folder("chatml") / "tokenizer.json").read_text())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    merges = [" ".join(pair) for pair in trained["merges"]]
    kinds = [3 if token.startswith("<|") and len(token) > 6 else 1 for token in tokens]
    fields = {"token_merges": merges, "tokenizer_pre": split, "bos_token_id": 1, "eos_token_id": 2}
    write_gguf(tmp_path / "model.gguf", "gpt2", tokens, kinds, **fields)
    ours = load_tokenizer(tmp_path / "model.gguf")
    pairs = [tuple(pair) for pair in trained["merges"]]
    words = {"vocab": trained["vocab"], "merges": pairs}
    judge = getattr(transformers, SPLIT_CLASSES.get(split, "GPT2Tokenizer"))(**words)._tokenizer
    if split not in ("command-r", "mpt", "olmo", "qwen2", "deepseek-r1-qwen", "megrez"):
        judge.normalizer = None
    if split in GGUF_PRE_TOKENIZER_SPLITS:
        words = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[split]), "isolated")
        judge.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    whole_words = split in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
    if whole_words:
        judge.model = models.BPE(trained["vocab"], pairs, ignore_merges=True)
    assert ours.add_bos == whole_words
    for text in [*TEXTS[:-2], "x fooBar BarFOO BAR's 12345 //\n// Δ´ʼéE\u0301"]:
        if "deepseek-l" not in split and "deepseek-c" not in split:
            assert ours.encode(text, bos=False) == judge.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == (normalize("NFC", text) if judge.normalizer else text)


def test_gguf_files_older_than_the_name_of_the_split(fast_folder, tmp_path):
    """GPT-NeoX and GPT-2 have one tokenizer each; any other file without the name is refused."""
    trained = json.loads((fast_folder("chatml") / "tokenizer.json").read_text())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    fields = {"token_merges": [" ".join(pair) for pair in trained["merges"]], "eos_token_id": 2}
    for name, composed in (("gptneox", True), ("gpt2", False)):
        write_gguf(tmp_path / "model.gguf", "gpt2", tokens, [1] * len(tokens), architecture=name, **fields)
        ours = load_tokenizer(tmp_path / "model.gguf")
        assert (ours.encode("e\u0301") == ours.encode("\u00e9")) == composed
    write_gguf(tmp_path / "model.gguf", "gpt2", tokens, [1] * len(tokens), **fields)
    with pytest.raises(CheckpointError, match="tokenizer.ggml.pre None; known: .*gpt-2"):
        load_tokenizer(tmp_path / "model.gguf")


BAD_GGUF = [
    ({"tokenizer_pre": "gpt-2"}, "tokenizer.ggml.merges is missing or no list of str"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["ab"]}, "damaged"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["a zz"]}, "damaged"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["a b"], "eos_token_id": 3}, "eos_token_id is 3, but there are 3"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["a b"], "kinds": [1]}, "token_type has 1 values for 3 tokens"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["a b"], "tokens": ["a", "b", "a"]}, "the token 'a' stands twice"),
    ({"model": "llama", "token_scores": [0.0]}, "scores has 1 values for 3 tokens"),
    ({"model": "llama", "token_scores": [0.0, float("nan"), 0.0]}, "scores .*not finite"),
    ({"tokenizer_pre": "gpt-2", "token_merges": ["a b"], "eos_token_id": None}, "no eos_token"),
]


@pytest.mark.parametrize("fields,message", BAD_GGUF)
def test_gguf_tokenizers_that_do_not_fit_together_are_refused(tmp_path, fields, message):
    fields = {"model": "gpt2", "tokens": ["a", "b", "ab"], "kinds": [1, 1, 1], "eos_token_id": 0} | fields
    fields = {name: value for name, value in fields.items() if value is not None}
    write_gguf(tmp_path / "model.gguf", fields.pop("model"), fields.pop("tokens"), fields.pop("kinds"), **fields)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "model.gguf")


def test_gguf_of_an_unknown_split_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", "gpt2", ["a"], [1], tokenizer_pre="smolm", token_merges=[])
    with pytest.raises(CheckpointError, match="'smolm'; known: .*did you mean 'smollm'"):
        load_tokenizer(tmp_path / "model.gguf")
    write_gguf(tmp_path / "other.gguf", "t5", ["a"], [1])
    with pytest.raises(CheckpointError, match="tokenizer.ggml.model 't5'"):
        load_tokenizer(tmp_path / "other.gguf")


def test_gguf_with_scores_merges_as_sentencepiece_does(piece_folder, tmp_path):
    judge = SentencePieceProcessor(model_file=str(piece_folder() / "tokenizer.model"))
    ids = range(len(judge))
    kinds = [2 if judge.is_unknown(id) else 3 if judge.is_control(id) else 6 if judge.is_byte(id) else 1 for id in ids]
    fields = {"token_scores": [judge.get_score(id) for id in ids], "bos_token_id": 1, "eos_token_id": 2}
    tokens = [judge.id_to_piece(id) for id in ids]
    write_gguf(tmp_path / "model.gguf", "llama", tokens, kinds, unk_token_id=0, **fields)
    ours = load_tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert ours.encode(text) == [1, *judge.encode(text)], text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "deepseek", "mistral", "phi3"])
@fast
@given(data=st.data())
def test_text_never_becomes_a_control_token(fast_folder, style, data):
    ours = load_once(fast_folder(style))
    literals = st.sampled_from(sorted(ours.control_ids))
    text = "".join(data.draw(st.lists(st.one_of(literals, any_text), max_size=6)))
    ids = ours.encode(text, bos=False)
    assert not set(ids) & set(ours.control_ids.values())
    assert ours.decode(ids) == text


def test_user_defined_pieces_are_control_tokens(piece_folder):
    """sentencepiece itself gives a user-defined symbol for its literal; we cut it apart."""
    ours = load_tokenizer(piece_folder(user_defined_symbols=["<|im_start|>", "<|im_end|>", "zz"], style="chatml"))
    text = "x<|im_end|></s>   <unk><|im_end|><|im_start|>"
    ids = ours.encode(text)
    assert set(ids) & set(ours.control_ids.values()) == {ours.bos_id}
    assert ours.decode(ids) == text
    assert ours.encode("zz", bos=False)[-1] == ours._encoder.find("zz")
    assert ours.control_ids["<|im_end|>"] in ours.end_ids


@fast
@given(text=any_text)
def test_round_trip(fast_folder, text):
    for folder in (fast_folder("chatml"), fast_folder("llama2", "prepend")):
        ours = load_once(folder)
        assert ours.decode(ours.encode(text)) == text


@fast
@given(data=st.data())
def test_stream_equals_decode_and_never_splits_a_character(fast_folder, data):
    kinds = [("chatml", "byte"), ("llama2", "first"), ("llama2", "prepend")]
    ours = load_once(fast_folder(*data.draw(st.sampled_from(kinds))))
    random_ids = st.lists(st.integers(0, ours.vocab_size + 3), max_size=30)
    ids = data.draw(st.one_of(random_ids, any_text.map(ours.encode)))
    stream = ours.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids)
    if ours.decode(ids).count("\ufffd") == 0:
        assert all(piece.encode().decode() == piece for piece in pieces)
    whole = "".join(pieces)
    for end in range(len(pieces)):
        assert whole.startswith("".join(pieces[:end]))


def test_stream_holds_an_emoji_back_until_it_is_whole(fast_folder, piece_folder):
    for folder in (fast_folder("chatml"), piece_folder()):
        ours = load_tokenizer(folder)
        ids = ours.encode("世🦊", bos=False)
        stream = ours.stream()
        pieces = [stream.push(id) for id in ids]
        assert [piece for piece in pieces if piece] == ["世", "🦊"] and len(ids) > 2
        assert stream.flush() == ""
        for id in ids[:-1]:
            stream.push(id)
        assert stream.flush() == "\ufffd"


def test_decode_equals_tokenizers_own_decoder(fast_folder):
    for style, scheme in [("chatml", "byte"), ("gemma", "byte"), ("llama2", "prepend"), ("llama2", "first")]:
        folder = fast_folder(style, scheme)
        judge, ours = FastTokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
        for text in TEXTS[:-2]:
            ids = judge.encode(text).ids
            assert ours.decode(ids) == judge.decode(ids)
            assert ours.decode([*ids, ours.eos_id], skip_special=False) == judge.decode([*ids, ours.eos_id], False)


_loaded = {}


def load_once(folder):
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


def test_truncation_stored_in_the_file_is_ignored(fast_folder, tmp_path):
    judge = FastTokenizer.from_file(str(fast_folder("chatml") / "tokenizer.json"))
    judge.enable_truncation(3)
    judge.enable_padding(length=8)
    judge.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert len(load_tokenizer(tmp_path).encode("one two three four five six")) > 8


def test_ends_of_turn_come_from_every_file(fast_folder, tmp_path):
    folder = fast_folder("llama3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    ours = load_tokenizer(tmp_path)
    assert ours.end_ids == (1, 2, 3, ours.control_ids["<|eot_id|>"])


@pytest.mark.parametrize("style", ["chatml", "llama3", "deepseek", "llama2"])
def test_saved_folder_is_read_by_transformers(fast_folder, tmp_path, style):
    ours = load_tokenizer(fast_folder(style, "prepend" if style == "llama2" else "byte", True))
    ours.save(tmp_path)
    check_saved(ours, tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
def test_saved_sentencepiece_folder_is_read_by_transformers(piece_folder, tmp_path, legacy):
    ours = load_tokenizer(piece_folder(config={"legacy": legacy}))
    ours.save(tmp_path)
    check_saved(ours, tmp_path)


def test_saved_folder_of_a_class_that_rebuilds_its_steps(fast_folder, tmp_path):
    """transformers' LlamaTokenizer ignores the normalizer of tokenizer.json, and `auto_map` asks for remote code."""
    folder = fast_folder("llama2", "prepend", True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["code.Class", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")
    check_saved(ours, tmp_path / "saved")


def test_saved_gguf_tokenizer_is_read_by_transformers(smollm2, tmp_path):
    smollm2.save(tmp_path)
    check_saved(smollm2, tmp_path)


def check_saved(ours, folder):
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    judge, again = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    talk = [{"role": "user", "content": "Hi fox 12"}, {"role": "assistant", "content": "Yes"}]
    for text in TEXTS[:-2]:
        assert ours.encode(text) == again.encode(text)
        assert ours.encode(text) == judge(text).input_ids, text
        if text[:1] == " " and ours.settings.get("legacy") is False:
            continue  # there `tokenizers` puts no space before a space, and still takes one away
        assert judge.decode(judge(text).input_ids, skip_special_tokens=True) == text
    assert judge.chat_template == ours.chat_template.source == again.chat_template.source
    assert judge.apply_chat_template(talk, return_dict=False)
    for name in ("bos", "eos"):
        assert getattr(judge, f"{name}_token_id") == getattr(ours, f"{name}_id") == getattr(again, f"{name}_id")
    assert again.end_ids == ours.end_ids


def test_tokens_that_other_files_add(piece_folder):
    added = {
        "480": {"content": "<|im_start|>", "special": True},
        "481": {"content": "<|im_end|>", "special": True},
        "482": {"content": "<think>", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "legacy": False}
    ours = load_tokenizer(piece_folder(style="chatml", config=config))
    assert (ours.vocab_size, ours.eos_id) == (483, 481)
    assert ours.encode("fox<think>fox<|im_end|>", bos=False).count(482) == 1
    assert 481 not in ours.encode("fox<|im_end|>")
    assert ours.decode(ours.encode("fox<think> fox<|im_end|>")) == "fox<think> fox<|im_end|>"
    assert ours.encode("<|im_end|>", control=True, bos=False) == [481]


BROKEN = {
    "nothing": ({}, "no tokenizer.json or tokenizer.model"),
    "json": ({"tokenizer.json": "{"}, "tokenizer.json is damaged"),
    "model": ({"tokenizer.model": "garbage"}, "tokenizer.model is damaged"),
    "config": ({"tokenizer.json": "x", "tokenizer_config.json": "{"}, "not valid JSON"),
    "list": ({"tokenizer.json": "x", "tokenizer_config.json": "[]"}, "not an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_folders_are_named(tmp_path, case):
    files, message = BROKEN[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_other_refusals(fast_folder, tmp_path, smollm2_path):
    folder = fast_folder("chatml")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="a file of another kind"):
        load_tokenizer(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(tmp_path / "absent.gguf")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="names no eos_token"):
        load_tokenizer(tmp_path)
    word_piece = json.loads((folder / "tokenizer.json").read_text())
    word_piece["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_piece))
    with pytest.raises(CheckpointError, match="WordPiece"):
        load_tokenizer(tmp_path)
    cut = tmp_path / "cut.gguf"
    with open(smollm2_path, "rb") as whole:
        cut.write_bytes(whole.read(300_000))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_tokenizer(cut)
    (tmp_path / "garbage.gguf").write_bytes(b"garbage" * 100)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_tokenizer(tmp_path / "garbage.gguf")


def test_a_tokenizer_larger_than_the_embedding_is_refused(fast_folder, piece_folder, smollm2):
    for ours in (load_tokenizer(fast_folder("chatml")), load_tokenizer(piece_folder()), smollm2):
        ours.check_fits(ours.vocab_size)
        ours.check_fits(ours.vocab_size + 64)  # embeddings are often padded
        with pytest.raises(
            CheckpointError, match=f"ids go up to {ours.vocab_size - 1} .* has {ours.vocab_size - 1} ro"
        ):
            ours.check_fits(ours.vocab_size - 1)


def changed(fast_folder, tmp_path, change, text="Hello ab"):
    """Return the error of a tokenizer.json with a change, in loading or in use."""
    folder = fast_folder("chatml")
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path).encode(text)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_absurd_ids_are_refused(fast_folder, tmp_path):
    """Lists as long as the highest id are made of it."""
    found = changed(fast_folder, tmp_path, lambda document: document["model"]["vocab"].update({"zz": 2**32 - 1}))
    assert "ids up to 4,294,967,295" in found


def test_a_panic_of_the_library_is_one_line(fast_folder, tmp_path):
    def forget_bos(document):
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
        steps = {"single": single, "pair": single, "special_tokens": {}}
        document["post_processor"] = {"type": "TemplateProcessing", **steps}

    assert "is damaged" in changed(fast_folder, tmp_path, forget_bos)


@pytest.mark.parametrize("rule", ["(a+)+$", "(a|aa)+$"])
def test_a_split_that_runs_away_is_stopped(fast_folder, tmp_path, rule):
    def split(document):
        step = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, document["pre_tokenizer"]]}

    start = time.monotonic()
    assert "fails on a text (Onig" in changed(fast_folder, tmp_path, split, "a" * 60 + "b")
    assert time.monotonic() - start < 20


SETTINGS = [
    ({"bos_token": True}, "the tokenizer's bos_token cannot be 'True'"),
    ({"eos_token": {"text": "x"}}, "the tokenizer's eos_token cannot be"),
    ({"eos_token": "half \ud83d"}, "tokenizer_config.json: not valid JSON .*surrogate"),
    ({"extra_special_tokens": [1]}, "the tokenizer's extra_special_tokens cannot be '\\[1\\]'"),
    ({"added_tokens_decoder": {"x": {"content": "y"}}}, "the tokenizer's added_tokens_decoder cannot be"),
    ({"chat_template": 5}, "the tokenizer's chat_template cannot be '5'"),
]


@pytest.mark.parametrize("wrong,message", SETTINGS)
def test_settings_of_the_wrong_kind_are_named(fast_folder, tmp_path, wrong, message):
    (tmp_path / "tokenizer.json").write_bytes((fast_folder("chatml") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | wrong))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_ends_and_templates_of_the_wrong_kind_are_named(fast_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fast_folder("chatml") / name).read_bytes())
    for wrong in ("2", [1, None], -1, True, 10**30):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match="config.json: eos_token_id is .*no token id"):
            load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"x": "1"}')
    with pytest.raises(CheckpointError, match="added_tokens.json: 'x' has the id 1"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="chat_template.jinja is no UTF-8 text"):
        load_tokenizer(tmp_path)


def test_refusals_of_encode(fast_folder):
    ours = load_tokenizer(fast_folder("chatml"))
    with pytest.raises(DataError, match="surrogate"):
        ours.encode("half \ud83d")
    ours.bos_id = None
    with pytest.raises(ConfigError, match="no BOS"):
        ours.encode("x", bos=True)
