"""Tokenizers against the test material of llama.cpp, sentencepiece and Mistral, fetched by name."""

import json
import random
import shutil
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from sentencepiece import SentencePieceProcessor
from test_tokenizers import TEXTS

from minitune.errors import CheckpointError
from minitune.sources import fetch
from minitune.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.real

# Vocabularies of supported families, and whose vectors judge them: GPT-NeoX has none, but MPT took its tokenizer over.
VOCABULARIES = {
    **{name: name for name in ("gpt-2", "llama-spm", "llama-bpe", "qwen2", "phi-3", "mpt", "refact", "starcoder")},
    **{name: name for name in ("command-r", "deepseek-llm", "deepseek-coder")},
    "gpt-neox": "mpt",
}
SENTENCEPIECE = ["botchan_en_bpe_1000.model", "botchan_en_unigram_1000.model", "kyoto_ja_unigram_8000.model"]
ALPHABET = [character for text in TEXTS[:-2] for character in text]
MIXTURES = ["".join(random.Random(n).choices(ALPHABET, k=30)) for n in range(1000)]


def vectors(name):
    """Return (text, ids) as llama.cpp's test-tokenizer-0 reads them."""
    folder = fetch("llama-cpp-vocab", progress=False)
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    ids = [[int(id) for id in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == len(ids) == 47
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_the_vectors_of_llama_cpp(name):
    folder = fetch("llama-cpp-vocab", progress=False)
    ours = load_tokenizer(folder / f"ggml-vocab-{name}.gguf")
    for text, ids in vectors(VOCABULARIES[name]):
        assert ours.encode(text, bos=False) == ids, text
        assert ours.decode(ids) == text
    composes = name in ("qwen2", "mpt", "gpt-neox", "command-r")  # models that were trained on NFC
    for text in TEXTS[:10]:
        assert ours.decode(ours.encode(text)) == (normalize("NFC", text) if composes else text)


@pytest.mark.parametrize("name,judge", [("gpt-2", "qwen2"), ("llama-bpe", "gpt-2"), ("qwen2", "llama-bpe")])
def test_the_vectors_notice_a_wrong_split(name, judge, monkeypatch):
    """With the split of another name some vector differs: the test above can fail."""
    from minitune.text import readers, splits

    monkeypatch.setattr(readers, "split_named", lambda *_: splits.SPLITS[judge])
    with pytest.raises(AssertionError):
        test_ids_equal_the_vectors_of_llama_cpp(name)


@pytest.fixture
def folder_of(tmp_path):
    """Return a function that puts a sentencepiece model into a folder as a model has it."""

    def get(file, config=None):
        shutil.copyfile(file, tmp_path / "tokenizer.model")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or {}))
        return tmp_path

    return get


@pytest.mark.parametrize("file", SENTENCEPIECE)
def test_ids_equal_those_of_sentencepiece(folder_of, file):
    material = fetch("sentencepiece-models", progress=False)
    judge = SentencePieceProcessor(model_file=str(material / file))
    ours = load_tokenizer(folder_of(material / file))
    text = (material / "botchan.txt").read_text(encoding="utf-8")
    lines = [line.lstrip("\ufeff") for line in text.split("\n")]
    assert len(lines) > 4000
    for line in [*lines, "吾輩は猫である。名前はまだ無い。", "ｶﾞｷﾞ ﾊﾟ ①ﬁ Ａ\u3000x\r\n\u00a0\u0e35", *TEXTS[:-2]]:
        assert ours.encode(line, bos=False) == judge.encode(line), line
        if 0 not in judge.encode(line):  # the unknown token: sentencepiece writes a sign of its own for it
            assert ours.decode(ours.encode(line)) == judge.decode(judge.encode(line))


@pytest.mark.parametrize("legacy", [True, False])
def test_mistral_ids_equal_those_of_sentencepiece_and_of_its_twin(folder_of, tmp_path, legacy):
    """The twin is the tokenizer.json that transformers' converter makes of the same file."""
    from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

    class Extractor:  # transformers' own fails on a vocabulary with scores
        def __init__(self, file):
            pass

        def extract(self, scored):
            return None, generate_merges({piece: id for id, (piece, _) in enumerate(scored)}, dict(scored))

    file = fetch("mistral-tokenizer", progress=False)
    judge = SentencePieceProcessor(model_file=str(file))
    ours = load_tokenizer(folder_of(file, {"legacy": legacy}))
    converter = type("Converter", (LlamaConverter,), {"SpmExtractor": Extractor})
    slow = SimpleNamespace(vocab_file=str(file), legacy=legacy, convert_ids_to_tokens=judge.id_to_piece)
    (tmp_path / "twin").mkdir()
    converter(slow).converted().save(str(tmp_path / "twin" / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "twin" / "tokenizer_config.json").write_text(json.dumps(special))
    twin = load_tokenizer(tmp_path / "twin")
    for text in [*TEXTS, *MIXTURES]:
        ids = ours.encode(text, bos=False)
        assert twin.encode(text, bos=False) == ids, text
        if legacy:  # the other way writes "fox" and " fox" alike
            assert ids == judge.encode(text), text
            assert ours.decode(ids) == twin.decode(ids) == text
    assert ours.bos_id == twin.bos_id == 1 and ours.eos_id == twin.eos_id == 2


def test_a_vocabulary_without_a_known_split_is_refused(tmp_path):
    """Aquila's file names none: llama.cpp guesses with a warning, we do not."""
    folder = fetch("llama-cpp-vocab", progress=False)
    whole = (folder / "ggml-vocab-command-r.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole.replace(b"command-r", b"unheard-o"))
    with pytest.raises(CheckpointError, match="tokenizer.ggml.pre 'unheard-o'; known: "):
        load_tokenizer(tmp_path / "x.gguf")
