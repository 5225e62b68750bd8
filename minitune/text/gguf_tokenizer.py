"""The tokenizer inside a GGUF file, rebuilt for `tokenizers` from the file's metadata.

    tokenizer.ggml.model = "gpt2"  -> byte-level BPE: tokens, merges, and `pre`, the name of a split into words
    tokenizer.ggml.model = "llama" -> SentencePiece BPE: tokens and scores; a pair merges when its joined piece is
                                      in the vocabulary, best score first (Sennrich et al. 2016, kudo/sentencepiece)

GGUF stores only the *name* of the split; the splits below are those that llama.cpp and the models' own
tokenizer.json give to these names. An unknown name is refused: a guess would tokenise almost right, silently.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minitune.errors import CheckpointError, nearest

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_words(digits: str) -> list:
    """Split as Llama 3 and Qwen 2 do; `digits` is how many of them stay together."""
    split = pre_tokenizers.Split(Regex(_CONTRACTIONS + _WORDS % digits), behavior="isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _pre_tokenizers() -> dict[str, list]:
    """Return the splits by their GGUF name (llama.cpp: src/llama-vocab.cpp)."""
    gpt2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    digits = [pre_tokenizers.Digits(individual_digits=True), *gpt2]
    names = {"gpt-2": gpt2, "llama-bpe": _by_words("{1,3}"), "qwen2": _by_words("")}
    return names | dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), digits)


def read_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict, list[int]]:
    """Return the tokenizer, the content of its tokenizer_config.json, and the ids that end a text.

    Raises CheckpointError where the file is damaged, or its kind of tokenizer or split is unknown.
    """
    fields = open_gguf(path).fields

    def get(name: str, default=None):
        field = fields.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    kind, tokens = get("ggml.model"), get("ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise CheckpointError(f"{path}: tokenizer.ggml.model is {kind!r}; known: 'gpt2', 'llama'")
    ids = {name: get(f"ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    if kind == "gpt2":
        tokenizer = _byte_level(path, tokens, get("ggml.merges", []), get("ggml.pre", "default"))
    else:
        tokenizer = _sentencepiece(tokens, get("ggml.scores", []), get("ggml.add_space_prefix", True), ids["unknown"])
    kinds = enumerate(get("ggml.token_type", []))
    tokenizer.add_tokens(
        [
            AddedToken(tokens[id], special=flag == CONTROL, normalized=False)
            for id, flag in kinds
            if flag in (CONTROL, USER_DEFINED)
        ]
    )
    add_bos = get("ggml.add_bos_token", kind == "llama" or get("ggml.pre") == "llama-bpe") and ids["bos"] is not None
    if add_bos:
        bos = tokens[ids["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, ids["bos"])])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {key: tokens[ids[name]] for key, name in named.items() if ids[name] is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": bool(add_bos)}
    if get("chat_template"):
        settings["chat_template"] = get("chat_template")
    return tokenizer, settings, [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]


def _byte_level(path: Path, tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    splits = _pre_tokenizers()
    if pre not in splits:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is '{pre}'; known: {', '.join(sorted(splits))}{nearest(pre, splits)}"
        )
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], prefix: bool, unknown: int | None) -> Tokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [
        (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    space = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def open_gguf(path: Path):
    """Return a `gguf.GGUFReader`; the last file stays open, because its header is read for weights and for text.

    Raises CheckpointError for a file that is missing, damaged or cut short.
    """
    try:
        status = path.stat()
        return _open(path, status.st_mtime_ns, status.st_size)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a complete GGUF file ({error}); fetch it again") from error


@lru_cache(maxsize=1)
def _open(path: Path, changed: int, size: int):
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Views without `np.memmap`'s cost for each: a header with 100,000 strings is read 4x faster."""

        def _get(self, offset, dtype, count=1, override_order=None):
            order = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            return np.frombuffer(self.data, order, int(count), int(offset)) if count else np.empty(0, order)

    return Reader(path)
