"""Where tokenizers come from: tokenizer.json, tokenizer.model, or the metadata of a GGUF file.

Each becomes a `tokenizers.Tokenizer` and the content of its tokenizer_config.json. Every value that the building
uses is checked before: the library's answer to a wrong one is at best an error without a place.
"""

from math import isfinite
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from minitune.errors import CheckpointError
from minitune.text.encoder import library_errors
from minitune.text.pieces import add_declared, from_pieces, from_sentencepiece, put_before
from minitune.text.settings import read_settings
from minitune.text.splits import split_named

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
PHI3_KEEPING = ("<unk>", "<s>", "<|endoftext|>")  # the tokens of Phi-3 that swallow no space
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def read_folder(folder: Path) -> tuple[Tokenizer, dict, list[int]]:
    """Return the tokenizer of a model's folder, its settings, and the ids of text's end that its configs name.

    Raises CheckpointError where there is none or it is damaged.
    """
    settings, ends = read_settings(folder)
    if (folder / "tokenizer.json").is_file():
        with library_errors(f"{folder}/tokenizer.json"):
            return Tokenizer.from_file(str(folder / "tokenizer.json")), settings, ends
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder / "tokenizer.model", settings), settings, ends
    raise CheckpointError(f"{folder}: {_instead(folder)}")


def _instead(folder: Path) -> str:
    """Say what a folder without a tokenizer is, and which one to give instead."""
    if (folder / "adapter_config.json").is_file():
        return "an adapter, not a model; give its base as the model, this as the adapter"
    if (folder / "model" / "config.json").is_file():
        return f"a run, not a model; its model is {folder / 'model'}"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return f"a run, not a model; give its base as the model, {folder / 'adapter'} as the adapter"
    return "no tokenizer.json or tokenizer.model; copy the model's files there"


def read_gguf(path: Path) -> tuple[Tokenizer, dict, list[int]]:
    """Return the tokenizer of a GGUF file, its settings, and the ids that end a text or turn.

    Raises CheckpointError where the file is damaged, or its kind of tokenizer or split is unknown.
    """
    from minitune.gguf_io import read_file  # loads numpy

    fields = {name.removeprefix("tokenizer."): value for name, value in read_file(path, arrays=True)[0].items()}
    kind, architecture = fields.get("ggml.model"), fields.get("general.architecture")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{path}: tokenizer.ggml.model {kind!r}; known: 'gpt2' (byte-level BPE), 'llama' (BPE)")
    tokens = _column(fields, "ggml.tokens", str, path)
    types = _column(fields, "ggml.token_type", int, path, len(tokens))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocabulary[token] != id)
        raise CheckpointError(f"{path}: the token {twice!r} stands twice in tokenizer.ggml.tokens; fetch it again")
    ids = {name: _id(fields, name, len(tokens), path) for name in (*SPECIAL, "eot", "eom")}
    for name, wanted in {"chat_template": str, "ggml.add_bos_token": bool, "ggml.add_space_prefix": bool}.items():
        if not isinstance(fields.get(name, wanted()), wanted):
            found = str(fields[name])[:60]
            raise CheckpointError(f"{path}: tokenizer.{name} is {found!r}, no {wanted.__name__}; fetch it again")
    adds_bos = kind == "llama"
    if kind == "gpt2":
        split = split_named(fields.get("ggml.pre"), architecture, path)
        if not any(len(token) > 1 for token, flag in zip(tokens, types, strict=True) if flag == NORMAL):
            fields.setdefault("ggml.merges", [])  # nothing to merge: an empty array is not written
        merges = [tuple(merge.split(" ", 1)) for merge in _column(fields, "ggml.merges", str, path)]
        with library_errors(path):
            tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))
        tokenizer.normalizer = normalizers.NFC() if split.nfc else None
        tokenizer.pre_tokenizer, tokenizer.decoder = split.pre_tokenizer(), decoders.ByteLevel()
        adds_bos = split.bos
    else:
        scores = _column(fields, "ggml.scores", float, path, len(tokens))
        if not all(map(isfinite, scores)):
            raise CheckpointError(f"{path}: tokenizer.ggml.scores are not finite; fetch it again")
        typed = zip(scores, types, strict=True)
        scores = [None if flag in (UNKNOWN, CONTROL, BYTE) else score for score, flag in typed]
        prefix = fields.get("ggml.add_space_prefix", True)
        with library_errors(path):
            tokenizer = from_pieces(tokens, scores, ids["unknown"] or 0, prefix, repeat=True)
    add_declared(tokenizer, _declared(tokens, types, strips=kind == "llama" and architecture == "phi3"), path)
    if fields.get("ggml.add_bos_token", adds_bos) and ids["bos"] is not None:
        put_before(tokenizer, tokens[ids["bos"]])
    settings = {key: tokens[ids[name]] for name, key in SPECIAL.items() if ids[name] is not None}
    settings |= {"clean_up_tokenization_spaces": False, "chat_template": fields.get("chat_template")}
    return tokenizer, settings, [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]


def _declared(tokens: list[str], types: list[int], strips: bool) -> dict[int, dict]:
    """Return id -> flags of the tokens that are matched as a whole; `strips`: Phi-3's swallow the space behind them."""
    return {
        id: {"content": token, "special": kind == CONTROL, "rstrip": strips and token not in PHI3_KEEPING}
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    }


def _column(fields: dict[str, Any], name: str, kind: type, where: Path, count: int | None = None) -> list:
    """Return an array of the metadata: `count` values of a kind, or any number; CheckpointError for anything else."""
    values = fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{where}: tokenizer.{name} is missing or no list of {kind.__name__}; fetch it again")
    if count is not None and len(values) != count:
        raise CheckpointError(f"{where}: tokenizer.{name} has {len(values):,} values for {count:,} tokens")
    return values


def _id(fields: dict[str, Any], name: str, count: int, where: Path) -> int | None:
    """Return the id of a special token, None where the file names none; CheckpointError where there is no such id."""
    id = fields.get(f"ggml.{name}_token_id")
    if id is not None and (not isinstance(id, int) or not 0 <= id < count):
        raise CheckpointError(f"{where}: tokenizer.ggml.{name}_token_id is {id!r}, but there are {count:,} tokens")
    return id
