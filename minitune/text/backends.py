"""The two libraries that read tokenizers, behind one small face: text runs to ids, ids to bytes.

    backend.encode(text, place) -> ids      no BOS, no special token from text that the library can keep out
    backend.offsets(text, place) -> [(start, end)] of each id in `text`, in characters
    backend.piece(id) -> bytes;  backend.find(token) -> id or None;  backend.save(folder)

`place` says where the run stands, because some tokenizers put a space before a text's first word: "start" of the
text, after a "control" token, or "inside" a text that was cut in two, where no space may ever be added.
Converting tokenizer.model into tokenizer.json was rejected: `sentencepiece` itself is the reference for its ids.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import sentencepiece
from tokenizers import AddedToken, Tokenizer

from minitune.errors import CheckpointError
from minitune.text.stream import byte_level_alphabet

Place = Literal["start", "control", "inside"]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
ANCHOR = "\ue000"  # private use: in no vocabulary, so no piece ever spans it and the text behind it


@dataclass(frozen=True)
class Added:
    """A token that is matched in text as a whole: its id, whether it is special, which white space it swallows."""

    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def _set_prefix(part: object, place: Place) -> None:
    """Edit a serialised normalizer or pre-tokenizer so that it adds no space at `place`."""
    if isinstance(part, list):
        for item in part:
            _set_prefix(item, place)
    if not isinstance(part, dict):
        return
    if part.get("prepend_scheme") == "first" or (part.get("prepend_scheme") and place == "inside"):
        part["prepend_scheme"] = "never"
    if place == "inside" and part.get("type") == "Prepend":
        part["prepend"] = ""
    if place == "inside" and part.get("add_prefix_space"):
        part["add_prefix_space"] = False
    for child in ("normalizers", "pretokenizers"):
        _set_prefix(part.get(child), place)


class FastBackend:
    """A `tokenizers.Tokenizer`: tokenizer.json, or one built from a GGUF file's metadata."""

    def __init__(self, tokenizer: Tokenizer, origin: str):
        """Take over `tokenizer`; truncation and padding stored in its file are switched off.

        Raises CheckpointError where its decoder is not one of a language model (WordPiece and the like).
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": "none"}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "Metaspace", "Replace"} or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
            raise CheckpointError(
                f"{origin}: decoder '{decoder['type']}' is not that of a language model (ByteLevel or Metaspace)"
            )
        self._byte_level = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds

    @property
    def added(self) -> dict[str, Added]:
        """Tokens that are matched in text as a whole."""
        tokens = self._tokenizer.get_added_tokens_decoder()
        return {t.content: Added(id, t.special, t.lstrip, t.rstrip) for id, t in tokens.items()}

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary cannot write."""
        name = getattr(self._tokenizer.model, "unk_token", None)
        return None if name is None else self.find(name)

    @property
    def adds_bos(self) -> int | None:
        """The id that the file's own post-processor puts before a text, if any."""
        ids = self._tokenizer.encode("").ids
        return ids[0] if ids else None

    @cached_property
    def strips_space(self) -> bool:
        """Whether decoding drops the space that encoding put before the first word."""
        spaced = (id for token, id in self._tokenizer.get_vocab().items() if token.startswith(SPACE))
        first = next(spaced, None)
        return self._byte_level is None and first is not None and not self._tokenizer.decode([first]).startswith(" ")

    @cached_property
    def _variants(self) -> dict[Place, Tokenizer]:
        variants = dict.fromkeys(("start", "control", "inside"), self._tokenizer)
        steps = {"normalizer": self._tokenizer.normalizer, "pre_tokenizer": self._tokenizer.pre_tokenizer}
        written = {name: step.__getstate__() for name, step in steps.items() if step is not None}
        for place in ("control", "inside"):
            edited = {name: json.loads(step) for name, step in written.items()}
            for step in edited.values():
                _set_prefix(step, place)
            if edited != {name: json.loads(step) for name, step in written.items()}:
                whole = json.loads(self._tokenizer.to_str()) | edited
                variants[place] = Tokenizer.from_str(json.dumps(whole))
                variants[place].encode_special_tokens = True
        return variants

    def find(self, token: str) -> int | None:
        """Return the id of `token`, or None."""
        return self._tokenizer.token_to_id(token)

    def add(self, content: str, id: int, special: bool, lstrip: bool, rstrip: bool) -> None:
        """Add a token that another file declares; its id must come out as declared (else CheckpointError)."""
        token = AddedToken(content, special=special, lstrip=lstrip, rstrip=rstrip, normalized=False)
        self._tokenizer.add_tokens([token])
        if self.find(content) != id:
            raise CheckpointError(f"token '{content}' is declared with id {id} but the vocabulary ends before it")

    def encode(self, text: str, place: Place) -> list[int]:
        """Return the ids of a run of text."""
        return self._variants[place].encode(text, add_special_tokens=False).ids

    def offsets(self, text: str, place: Place) -> list[tuple[int, int]]:
        """Return where each id of `encode` stands in `text`."""
        return self._variants[place].encode(text, add_special_tokens=False).offsets

    def piece(self, id: int) -> bytes:
        """Return the bytes that an id writes; b"" for an id outside the vocabulary (padded embeddings have them)."""
        token = self._tokenizer.id_to_token(id)
        if token is None or token in self._added_contents:
            return (token or "").encode()
        if self._byte_level is not None:
            table = self._byte_level
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    @cached_property
    def _added_contents(self) -> frozenset[str]:
        return frozenset(self.added)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        self._tokenizer.save(str(folder / "tokenizer.json"))


class SentencePieceBackend:
    """A `sentencepiece` model (tokenizer.model) and the tokens that its folder adds beyond it."""

    def __init__(self, path: Path, repeat_prefix: bool):
        """`repeat_prefix`: the dummy space is added after every control token, not only at the text's start."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: not a sentencepiece model ({error}); fetch the file again") from error
        self._repeat_prefix = repeat_prefix
        self._beyond: dict[str, Added] = {}
        self._anchor_ids = len(self._model.encode(ANCHOR))

    @cached_property
    def added(self) -> dict[str, Added]:
        """Control pieces, the unknown piece, user-defined markup such as `<start_of_turn>`, added tokens."""
        model = self._model
        found = {}
        for id in range(len(model)):
            token = model.id_to_piece(id)
            markup = len(token) > 2 and token[0] + token[-1] in ("<>", "[]") and model.get_score(id) == 0.0
            if model.is_control(id) or model.is_unknown(id) or (markup and not model.is_byte(id)):
                found[token] = Added(id, special=True)
        return found | self._beyond

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return max([len(self._model) - 1, *(token.id for token in self._beyond.values())]) + 1

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary cannot write."""
        return self._model.unk_id()

    @property
    def adds_bos(self) -> int | None:
        """The model's BOS id, if it has one."""
        return self._model.bos_id() if self._model.bos_id() >= 0 else None

    @cached_property
    def strips_space(self) -> bool:
        """Whether encoding adds a space before the first word, so that decoding drops it."""
        return self._model.encode("a", out_type=str)[0].startswith(SPACE)

    def find(self, token: str) -> int | None:
        """Return the id of `token`, or None."""
        if token in self._beyond:
            return self._beyond[token].id
        id = self._model.piece_to_id(token)
        return id if self._model.id_to_piece(id) == token else None

    def add(self, content: str, id: int, special: bool, lstrip: bool, rstrip: bool) -> None:
        """Add a token that the folder declares beyond the model's vocabulary, or flag one inside it."""
        self._beyond[content] = Added(id, special, lstrip, rstrip)
        self.__dict__.pop("added", None)

    def encode(self, text: str, place: Place) -> list[int]:
        """Return the ids of a run of text."""
        return [id for id, _ in self._located(text, place)]

    def offsets(self, text: str, place: Place) -> list[tuple[int, int]]:
        """Return where each id of `encode` stands in `text`."""
        return [span for _, span in self._located(text, place)]

    def _located(self, text: str, place: Place) -> list[tuple[int, tuple[int, int]]]:
        """Return (id, (start, end)); tokens that the folder adds as ordinary text are matched first."""
        plain = {token: added.id for token, added in self._beyond.items() if not added.special}
        if not plain:
            return self._run(text, place)
        found, at = [], 0
        for part in re.split("(" + "|".join(map(re.escape, sorted(plain, key=len, reverse=True))) + ")", text):
            run = [(plain[part], (0, len(part)))] if part in plain else self._run(part, place)
            found += [(id, (start + at, end + at)) for id, (start, end) in run]
            at += len(part)
            place = "inside"
        return found

    def _run(self, text: str, place: Place) -> list[tuple[int, tuple[int, int]]]:
        """Encode a run; without the dummy space by putting an anchor before it and dropping the anchor's ids."""
        if place == "start" or (place == "control" and self._repeat_prefix):
            mapping = self._model.encode_as_offset_mapping(text)
            return list(zip(mapping["ids"], mapping["offsets"], strict=True))
        mapping = self._model.encode_as_offset_mapping(ANCHOR + text)
        spans = [(max(start - 1, 0), end - 1) for start, end in mapping["offsets"]]
        first = self._anchor_ids
        if text and spans[first - 1][1] > 0:  # one unknown id covers the anchor and the first character
            first -= 1
        return list(zip(mapping["ids"][first:], spans[first:], strict=True))

    def piece(self, id: int) -> bytes:
        """Return the bytes that an id writes; b"" for an id outside the vocabulary."""
        if not 0 <= id < len(self._model):
            return next((token.encode() for token, added in self._beyond.items() if added.id == id), b"")
        token = self._model.id_to_piece(id)
        if self._model.is_byte(id):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def save(self, folder: Path) -> None:
        """Write tokenizer.model; the tokens beyond it are in tokenizer_config.json."""
        (folder / "tokenizer.model").write_bytes(self._model.serialized_model_proto())
