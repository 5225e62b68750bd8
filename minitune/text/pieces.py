"""SentencePiece models as `tokenizers`: a vocabulary of pieces, each with a score, and how text is prepared for it.

    BPE       two neighbours merge while their joined piece is in the vocabulary, best score first
    unigram   of all ways to cut a text into pieces, the one with the greatest sum of scores (Kudo 2018, eq. 1)

`sentencepiece` reads its file and then judges the rebuilt tokenizer on a sample text: where the ids differ the file
is refused. Running both libraries side by side was rejected: it doubles every rule about control tokens, prefix
spaces and streaming. A GGUF file with scores is the BPE kind.
"""

from math import copysign, isfinite
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minitune.errors import CheckpointError
from minitune.text.encoder import library_errors

SAMPLE = "The ①②, ﬁne  Ａ\u3000ｶﾞ caf\u00e9 cafe\u0301\t\n\nx=1;  don't 世界 🎉 <0x41> "
UNIGRAM, BPE = 1, 2  # ModelType in sentencepiece_model.proto


def from_sentencepiece(file: Path, settings: dict) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model file, and complete `settings` with what it knows.

    Raises CheckpointError where the file is damaged, of another kind, or not rebuilt exactly.
    """
    with library_errors(file):
        return _rebuilt(file, settings)


def _rebuilt(file: Path, settings: dict) -> Tokenizer:
    """Do the work of `from_sentencepiece`; what either library raises passes."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(id) for id in range(len(model))]
    kind, preparation = _preparation(model.serialized_model_proto())
    reserved = [model.is_control(id) or model.is_unknown(id) for id in range(len(model))]
    scores = [None if reserved[id] or model.is_byte(id) else model.get_score(id) for id in range(len(model))]
    if not all(map(isfinite, (score for score in scores if score is not None))):
        raise CheckpointError(f"{file}: its scores are not finite; fetch it again")
    if kind not in (UNIGRAM, BPE):
        raise CheckpointError(f"{file}: a sentencepiece model that cuts by words or characters; known: BPE, unigram")
    prefix = model.normalize("a") != "a"
    build = from_pieces if kind == BPE else _unigram
    repeat = settings.get("legacy") is not False
    tokenizer = build(pieces, scores, model.unk_id(), prefix, repeat, preparation)
    add_declared(tokenizer, _declared(settings, pieces, scores, reserved), file)
    for name, id in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("unk_token", model.unk_id())):
        settings.setdefault(name, pieces[id] if id >= 0 else None)
    if settings.get("add_bos_token", True) and settings["bos_token"]:
        put_before(tokenizer, settings["bos_token"])
    if tokenizer.encode(SAMPLE, add_special_tokens=False).ids != model.encode(SAMPLE):
        raise CheckpointError(f"{file}: cannot be rebuilt exactly; save it as tokenizer.json with transformers")
    return tokenizer


def _declared(settings: dict, pieces: list[str], scores: list[float | None], reserved: list[bool]) -> dict[int, dict]:
    """Return id -> flags of the tokens that are matched in text as a whole: the folder's own and the model's."""
    declared = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    for id, piece in enumerate(pieces):  # a user-defined symbol scores 0, the first merge -0; markup is control
        if reserved[id] or (scores[id] == 0 and copysign(1, scores[id]) > 0):
            markup = piece[0] + piece[-1] in ("<>", "[]")
            declared.setdefault(id, {"content": piece.replace("▁", " "), "special": reserved[id] or markup})
    return declared


def _preparation(model: bytes) -> tuple[int, list[normalizers.Normalizer]]:
    """Return the kind of a serialised model and what it does to text before cutting, spaces apart.

    These fields of sentencepiece_model.proto have no accessor: trainer_spec = 2 (model_type = 3), normalizer_spec = 3
    (name = 1, precompiled_charsmap = 2, remove_extra_whitespaces = 4); a field that is absent has its default.
    `Precompiled` alone loses combining marks (U+00A0 U+0E35) and leaves half-width kana apart: NFKC, of which the
    usual tables are made, goes first. It takes CR LF for one character: NMT's table makes a space of either. Then
    only nonsense (a ligature with an accent) is written otherwise.
    """
    whole = _message(model)
    trainer, normalizer = (_message(whole.get((number, 2), b"")) for number in (2, 3))
    name, charsmap = (normalizer.get((number, 2), b"") for number in (1, 2))
    steps = [normalizers.NFKC()] if b"nfkc" in name else []
    steps += [normalizers.Replace("\r", "\n")] if b"nmt" in name else []
    steps += [normalizers.Precompiled(charsmap)] if charsmap else []
    if normalizer.get((4, 0), 1):
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A |[ ▁]+\z"), "")]
    return trainer.get((3, 0), UNIGRAM), steps


def _message(data: bytes) -> dict[tuple[int, int], int | bytes]:
    """Return (number, wire type) -> last value of the fields of a protocol buffer: numbers as int, others as bytes.

    A field is a varint (number * 8 + wire type), then a varint (0), 8 bytes (1), a length and bytes (2), 4 bytes (5).
    Raises LookupError for anything else.
    """
    fields: dict[tuple[int, int], int | bytes] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            fields[number, wire] = varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        fields[number, wire] = data[at : at + size]
        at += size
    return fields


def from_pieces(
    pieces: list[str], scores: list[float | None], unknown: int, prefix: bool, repeat: bool, preparation: list = ()
) -> Tokenizer:
    """Build BPE from pieces; `prefix`: a space before the text, and (`repeat`) after each control token.

    A piece without a score (control, unknown and byte pieces) is no result of merging. `preparation` is done first.
    Of pairs with equal scores (all runs of spaces of Llama and Mistral have one) sentencepiece merges the leftmost in
    the text, whose left part is the longest, since what is to its left was merged before.
    """
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    pairs = [
        (score, cut, piece)
        for piece, score in zip(pieces, scores, strict=True)
        if score is not None
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    merges = [(piece[:cut], piece[cut:]) for _, cut, piece in pairs]
    fallback = {"unk_token": pieces[unknown], "fuse_unk": True, "byte_fallback": "<0x00>" in vocabulary}
    return _with_spaces(Tokenizer(models.BPE(vocabulary, merges, **fallback)), prefix, repeat, preparation)


def _unigram(
    pieces: list[str], scores: list[float | None], unknown: int, prefix: bool, repeat: bool, preparation: list
) -> Tokenizer:
    """Build the unigram model; pieces without a score get the least one, so that text seldom prefers them."""
    least = min((score for score in scores if score is not None), default=0.0)
    vocabulary = [(piece, least if score is None else score) for piece, score in zip(pieces, scores, strict=True)]
    model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback="<0x00>" in pieces)
    return _with_spaces(Tokenizer(model), prefix, repeat, preparation)


def _with_spaces(tokenizer: Tokenizer, prefix: bool, repeat: bool, preparation: list) -> Tokenizer:
    """Add how spaces are written and read, after `preparation`; see `from_pieces`."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if prefix and not repeat:
        tokenizer.normalizer = normalizers.Sequence(list(preparation)) if preparation else None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        space = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*preparation, *space, normalizers.Replace(" ", "▁")])
    return tokenizer


def add_declared(tokenizer: Tokenizer, declared: dict[int, dict], where: object) -> None:
    """Add tokens that are matched as a whole, id -> flags; CheckpointError, naming `where`, for another id."""
    tokens = []
    for _, token in sorted(declared.items()):
        flags = {name: bool(token.get(name)) for name in ("special", "lstrip", "rstrip")}
        tokens.append(AddedToken(token["content"], normalized=False, **flags))
    tokenizer.add_tokens(tokens)
    for id, token in sorted(declared.items()):
        if tokenizer.token_to_id(token["content"]) != id:
            raise CheckpointError(f"{where}: the token '{token['content']}' of its folder has another id than {id}")


def put_before(tokenizer: Tokenizer, bos: str) -> None:
    """Let the tokenizer put its BOS before each text."""
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special)
