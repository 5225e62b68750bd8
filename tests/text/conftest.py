"""Small tokenizers, trained on the spot, in the shape of those that models ship."""

import json

import pytest
import sentencepiece
from chat_styles import STYLES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog; 12 of 3456 foxes don't.",
    "def add(a, b):\n    return a + b  # <tag> [INST] {'x': 1}\n\n\tprint(add(1, 2))",
    "Καλημέρα κόσμε, こんにちは世界, مرحبا بالعالم, สวัสดีชาวโลก, naïve café 🎉👩‍👩‍👧 e\u0301",
    "system user assistant model tool You are a helpful assistant. Yes, it is positive. No, negative.",
] * 20


def write_fast(folder, style, *, scheme="byte", add_bos=False):
    """Train a tokenizer.json in the given style; `scheme`: byte, prepend (Llama 2), first or always (Metaspace)."""
    template, special, bos, eos, added = STYLES[style]
    tokens = [AddedToken(t.rstrip("*"), special=True, normalized=False, rstrip=t.endswith("*")) for t in special]
    byte_pieces = [f"<0x{n:02X}>" for n in range(256)]
    byte = scheme == "byte"
    fast = Tokenizer(models.BPE(byte_fallback=not byte, fuse_unk=True))
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.ByteLevel() if byte else decoders.Sequence(decode)
    if byte:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif scheme == "prepend":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: no piece spans two words
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*tokens, *([] if byte else byte_pieces)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte else [],
        limit_alphabet=256 if byte else 60,
        max_token_length=12,
        show_progress=False,
    )
    fast.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    whole = json.loads(fast.to_str())  # byte pieces are vocabulary, not tokens matched in text
    whole["pre_tokenizer"] = None if scheme == "prepend" else whole["pre_tokenizer"]
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] not in byte_pieces]
    fast = Tokenizer.from_str(json.dumps(whole))
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    if add_bos:
        fast.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, fast.token_to_id(bos))])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    config |= {"chat_template": template, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def fast_folder(tmp_path_factory):
    """Return a function that gives the folder of a style, trained once."""
    made = {}

    def get(style, scheme="byte", add_bos=False):
        key = f"{style}-{scheme}-{add_bos}"
        if key not in made:
            made[key] = write_fast(tmp_path_factory.mktemp(key), style, scheme=scheme, add_bos=add_bos)
        return made[key]

    return get


@pytest.fixture(scope="session")
def piece_folder(tmp_path_factory):
    """Return a function that gives a folder with a tokenizer.model as Llama 2 ships it."""

    def get(style="llama2", config=None, **options):
        folder = tmp_path_factory.mktemp("piece")
        template, _, bos, eos, _ = STYLES[style]
        llama = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
        llama |= {"remove_extra_whitespaces": False, "character_coverage": 0.98, "vocab_size": 480}
        llama |= {"hard_vocab_limit": False, "minloglevel": 2}
        with open(folder / "tokenizer.model", "wb") as file:
            sentences = {"sentence_iterator": iter(CORPUS), "model_writer": file}
            sentencepiece.SentencePieceTrainer.train(**(sentences | llama | options))
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"chat_template": template, "clean_up_tokenization_spaces": False} | (config or {})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return get
