"""Where tokenizers come from: tokenizer.json, tokenizer.model, or the metadata of a GGUF file.

Each becomes a `tokenizers.Tokenizer` and the content of its tokenizer_config.json. SentencePiece models, and GGUF
files that hold one, are BPE over pieces and scores: two neighbours merge when their joined piece is in the
vocabulary, best score first. `sentencepiece` reads its file and then judges the rebuilt tokenizer on a sample text:
where the ids differ (a model that normalises Unicode) the file is refused. Running both libraries side by side was
rejected: it doubles every rule about control tokens, prefix spaces and streaming.

GGUF stores only the name of the split into words. The splits below are those that llama.cpp and the models' own
tokenizer.json give to these names; an unknown name is refused, since a guess would tokenise almost right, silently.
"""

from math import copysign
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minitune.errors import CheckpointError, nearest
from minitune.files import read_json

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type
SAMPLE = "The ①②, ﬁne  Ａ\u3000ｶﾞ caf\u00e9 cafe\u0301\t\n\nx=1;  don't 世界 🎉 "
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_folder(folder: Path) -> tuple[Tokenizer, dict, list[int]]:
    """Return the tokenizer of a model's folder, its settings, and the ids of text's end that its configs name.

    Raises CheckpointError where there is none or it is damaged.
    """
    settings, ends = _settings(folder), []
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name, optional=True).get("eos_token_id")
        ends += found if isinstance(found, list) else [] if found is None else [found]
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise CheckpointError(f"{folder}/tokenizer.json: damaged ({error}); fetch it again") from error
        return tokenizer, settings, ends
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model", settings), settings, ends
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


def _settings(folder: Path) -> dict:
    """Gather tokenizer_config.json, the earlier files beside it and the chat template's own file into one dict."""
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    special, settings, added = (read_json(folder / name, optional=True) for name in names)
    settings = special | settings
    for content, id in added.items():
        settings.setdefault("added_tokens_decoder", {}).setdefault(str(id), {"content": content, "special": True})
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings | {"chat_template": template}


def _from_sentencepiece(file: Path, settings: dict) -> Tokenizer:
    """Rebuild a SentencePiece model and complete `settings` with what it knows."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: not a sentencepiece model ({error}); fetch it again") from error
    pieces = [model.id_to_piece(id) for id in range(len(model))]
    reserved = [model.is_control(id) or model.is_unknown(id) for id in range(len(model))]
    scores = [None if reserved[id] or model.is_byte(id) else model.get_score(id) for id in range(len(model))]
    prefix = model.normalize("a") != "a"
    tokenizer = _from_pieces(pieces, scores, model.unk_id(), prefix, repeat=settings.get("legacy", True))
    declared = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    for id, piece in enumerate(pieces):  # a user-defined symbol scores 0, the first merge -0; markup is control
        if reserved[id] or (scores[id] == 0 and copysign(1, scores[id]) > 0):
            markup = piece[0] + piece[-1] in ("<>", "[]")
            declared.setdefault(id, {"content": piece.replace("▁", " "), "special": reserved[id] or markup})
    for id, token in sorted(declared.items()):
        flags = {name: bool(token.get(name)) for name in ("special", "lstrip", "rstrip")}
        tokenizer.add_tokens([AddedToken(token["content"], normalized=False, **flags)])
        if tokenizer.token_to_id(token["content"]) != id:
            raise CheckpointError(f"{file}: the token '{token['content']}' of its folder has another id than {id}")
    for name, id in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("unk_token", model.unk_id())):
        settings.setdefault(name, pieces[id] if id >= 0 else None)
    if settings.get("add_bos_token", True) and settings["bos_token"]:
        _put_before(tokenizer, settings["bos_token"])
    if tokenizer.encode(SAMPLE, add_special_tokens=False).ids != model.encode(SAMPLE):
        raise CheckpointError(f"{file}: not BPE, or it normalises text; save it as tokenizer.json with transformers")
    return tokenizer


def _from_pieces(pieces: list[str], scores: list[float | None], unknown: int, prefix: bool, repeat: bool) -> Tokenizer:
    """Build BPE from pieces; `prefix`: a space before the text, and (`repeat`) after each control token."""
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    pairs = [
        (-score, vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in zip(pieces, scores, strict=True)
        if score is not None  # control, unknown and byte pieces are no result of merging
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    fallback = {"unk_token": pieces[unknown], "fuse_unk": True, "byte_fallback": "<0x00>" in vocabulary}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **fallback))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if prefix and not repeat:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        space = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    return tokenizer


def _put_before(tokenizer: Tokenizer, bos: str) -> None:
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special)


def _splits() -> dict[str, list]:
    """Return the splits into words by their GGUF name (llama.cpp, src/llama-vocab.cpp)."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"), byte_level],
    }


def read_gguf(path: Path) -> tuple[Tokenizer, dict, list[int]]:
    """Return the tokenizer of a GGUF file, its settings, and the ids that end a text or turn.

    Raises CheckpointError where the file is damaged, or its kind of tokenizer or split is unknown.
    """
    from minitune.gguf_io import read_file  # loads numpy

    metadata = {name.removeprefix("tokenizer."): value for name, value in read_file(path, arrays=True)[0].items()}
    tokens, kind, split = (metadata.get(name) for name in ("ggml.tokens", "ggml.model", "ggml.pre"))
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"ggml.{name}_token_id") for name in (*names, "eot", "eom")}
    if kind == "gpt2" and split in _splits():
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
        vocabulary = {token: id for id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splits()[split])
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "llama":
        prefix = metadata.get("ggml.add_space_prefix", True)
        typed = zip(metadata["ggml.scores"], metadata["ggml.token_type"], strict=True)
        scores = [None if flag in (UNKNOWN, CONTROL, BYTE) else score for score, flag in typed]
        tokenizer = _from_pieces(tokens, scores, ids["unknown"] or 0, prefix, repeat=True)
    else:
        known = f"'llama', or 'gpt2' split as {', '.join(sorted(_splits()))}"
        found = f"tokenizer.ggml.model {kind!r}, tokenizer.ggml.pre {split!r}"
        raise CheckpointError(f"{path}: {found}; known: {known}{nearest(str(split), _splits())}")
    for token, flag in zip(tokens, metadata["ggml.token_type"], strict=True):
        if flag in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=flag == CONTROL, normalized=False)])
    if metadata.get("ggml.add_bos_token", kind == "llama" or split == "llama-bpe") and ids["bos"] is not None:
        _put_before(tokenizer, tokens[ids["bos"]])
    settings = {key: tokens[ids[name]] for name, key in names.items() if ids[name] is not None}
    settings |= {"clean_up_tokenization_spaces": False, "chat_template": metadata.get("chat_template")}
    return tokenizer, settings, [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
