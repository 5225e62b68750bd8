"""Tokenizers to GGUF metadata and back: llama.cpp's own vocabularies, a sentencepiece model, and what is refused."""

import io

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minitune.checkpoint.gguf_writer import save_gguf
from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError
from minitune.gguf_io import read_file
from minitune.sources import fetch
from minitune.text.encoder import Encoder
from minitune.text.gguf_vocabulary import WORDS, gguf_vocabulary
from minitune.text.readers import read_gguf
from minitune.text.splits import SPLITS
from minitune.text.tokenizer import Tokenizer, load_tokenizer

SAMPLE = "The harbour was quiet when the first boats came in; two of them carried mackerel, the third a broken mast. "


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a tokenizer.model that sentencepiece trained: BPE with bytes to fall back on."""
    folder, model = tmp_path_factory.mktemp("pieces"), io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "character_coverage": 1.0,
               "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
               "user_defined_symbols": ["<|user|>"], "num_threads": 1}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE] * 9), model_writer=model, minloglevel=2, **options
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("settings", ["{}", '{"legacy": false}'])
def test_a_sentencepiece_model_comes_back(pieces, tiny_folder, tmp_path, settings):
    """Ids are sentencepiece's own, before and after; that newer rules about spaces are lost is said."""
    (pieces / "tokenizer_config.json").write_text(settings)
    tokenizer = load_tokenizer(pieces)
    folder = tiny_folder(tmp_path / "hf", vocab_size=330, tokenizer=False)
    notes = save_gguf(load_model(folder), tokenizer, tmp_path / "model.gguf")
    assert [("after each control token" in note) for note in notes] == [True] * (settings != "{}")
    judge = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    again = load_tokenizer(tmp_path / "model.gguf")
    for text in (SAMPLE, WORDS, " two  spaces", "a<0x41>b", ""):
        assert again.encode(text, bos=False) == judge.encode(text)
        assert notes or again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(WORDS)) == tokenizer.decode(tokenizer.encode(WORDS))
    values = read_file(tmp_path / "model.gguf", arrays=True)[0]
    ours = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True))
    order = [judge.id_to_piece(id) for id in range(len(judge)) if judge.get_score(id) < 0]
    merged = [piece for piece in order if ours[piece] > min(ours.values())]
    assert merged == sorted(merged, key=lambda piece: -ours[piece]) and len(merged) > 20
    assert len(values["tokenizer.ggml.tokens"]) == 330 and values["tokenizer.ggml.tokens"][-1] == "[PAD329]"


def byte_level(split, **model):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({token: id for id, token in enumerate([*alphabet, "he"])}, [("h", "e")], **model))
    fast.pre_tokenizer, fast.decoder = split, decoders.ByteLevel()
    return fast


def made(fast):
    return Tokenizer(Encoder(fast, "a tokenizer"), {"eos_token": "!"})


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_is_found_again(name):
    """The name found may be another one, but then of the very same split."""
    from tokenizers import normalizers

    split = SPLITS[name]
    fast = byte_level(split.pre_tokenizer(), ignore_merges=split.whole_words)
    fast.normalizer = normalizers.NFC() if split.nfc else None
    found = SPLITS[gguf_vocabulary(made(fast), 257)["tokenizer.ggml.pre"]]
    assert (found.rules, found.whole_words, found.nfc) == (split.rules, split.whole_words, split.nfc)


def test_what_gguf_has_no_words_for_is_refused():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(CheckpointError, match="no name for how this tokenizer cuts text"):
        gguf_vocabulary(made(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))), 257)
    with pytest.raises(CheckpointError, match="embedding has 200 rows"):
        gguf_vocabulary(made(byte_level(plain)), 200)
    unigram = FastTokenizer(models.Unigram([("a", -1.0), ("!", -2.0)], unk_id=0, byte_fallback=False))
    unigram.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="of kind Unigram cannot be written to GGUF"):
        gguf_vocabulary(made(unigram), 2)
    ends = Tokenizer(Encoder(byte_level(plain), "a tokenizer"), {"eos_token": "!"}, [1, 2, 3])
    with pytest.raises(CheckpointError, match="4 tokens end a turn; GGUF has keys for 3"):
        gguf_vocabulary(ends, 257)
    stray = FastTokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "!": 3}, []))
    stray.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="no merge makes the piece 'ab'"):
        gguf_vocabulary(made(stray), 4)


@pytest.mark.real
def test_llama_cpps_vocabularies_come_out_as_they_went_in():
    """What its converter wrote of each supported model: tokens, types, merges, ids and the split's name."""
    compared = 0
    for path in sorted(fetch("llama-cpp-vocab", progress=False).glob("*.gguf")):
        try:
            read_gguf(path)
        except CheckpointError:
            continue  # of another family
        stored = read_file(path, arrays=True)[0]
        tokenizer = load_tokenizer(path)
        written = gguf_vocabulary(tokenizer, len(stored["tokenizer.ggml.tokens"]))
        for key, value in written.items():
            if key.endswith(("scores", "token_type")) or key not in stored:
                continue  # scores have another scale
            same_split = key.endswith("pre") and SPLITS.get(value) == SPLITS.get(stored[key])
            assert value == stored[key] or same_split, (path.name, key)
        kinds = zip(stored["tokenizer.ggml.token_type"], written["tokenizer.ggml.token_type"], strict=True)
        # Markup that the template writes is control here; llama.cpp calls padding rows unknown where we say normal.
        assert {pair for pair in kinds if pair[0] != pair[1]} <= {(4, 3), (2, 1)}, path.name
        compared += 1
    assert compared >= 10
