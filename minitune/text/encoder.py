"""Runs of plain text to ids, ids to bytes: one face for every kind of tokenizer, over the `tokenizers` library.

`place` says where a run stands, because some tokenizers put a space before a text's first word: at the "start" of
the text, after a "control" token, or "inside" a text that was cut in two, where no space may ever be added. The
library knows only whole texts, so a run elsewhere is encoded by a copy whose serialised steps add no space.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Literal

from tokenizers import AddedToken, Encoding, Tokenizer, models

from minitune.errors import CheckpointError, MinituneError
from minitune.text.stream import byte_level_alphabet

Place = Literal["start", "control", "inside"]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


@contextmanager
def library_errors(where: object, problem: str = "is damaged") -> Iterator[None]:
    """Raise CheckpointError, beginning with `where` and its `problem`, for what `tokenizers` or `sentencepiece` raise.

    Errors of ours pass. `tokenizers` raises plain Exception for anything wrong with a file, and a panic of its Rust
    code is not even that.
    """
    try:
        yield
    except MinituneError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{where} {problem} ({' '.join(str(error).split())}); fetch it again") from error


class Encoder:
    """A `tokenizers.Tokenizer` that never truncates, never pads and reads no special token from text."""

    def __init__(self, tokenizer: Tokenizer, origin: str):
        """Take over `tokenizer`, read from `origin`.

        Raises CheckpointError where its decoder is not that of a language model (WordPiece and the like).
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer, self.origin = tokenizer, origin
        self.kind = type(tokenizer.model).__name__
        self.save, self.find = tokenizer.save, tokenizer.token_to_id
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": "none"}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "Metaspace", "Replace"} or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
            raise CheckpointError(
                f"{origin}: decoder '{decoder['type']}' is not that of a language model (ByteLevel or Metaspace)"
            )
        self._alphabet = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._known_pieces: dict[int, bytes] = {}

    def with_tokens(self, tokens: list[str]) -> "Encoder":
        """Return a copy that has `tokens` too, found whole in text wherever they stand."""
        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        return Encoder(copy, self.origin)

    @cached_property
    def added(self) -> dict[str, tuple[int, AddedToken]]:
        """Token -> (id, flags) of those that are matched in text as a whole."""
        return {token.content: (id, token) for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1; CheckpointError where it is absurd beside the number of tokens (some ids may be unused)."""
        ids = self._tokenizer.get_vocab().values()
        size = max(ids, default=-1) + 1
        if size > 2 * len(ids) + 1000:
            raise CheckpointError(f"{self.origin}: {len(ids):,} tokens, but ids up to {size - 1:,}; fetch it again")
        return size

    @cached_property
    def bos_id(self) -> int | None:
        """The id that the tokenizer's own post-processor puts before a text, if any."""
        with library_errors(self.origin):
            ids = self._tokenizer.encode("").ids
        return ids[0] if ids else None

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of text that the vocabulary cannot write, if there is one."""
        model = self._tokenizer.model
        if isinstance(model, models.Unigram):  # it has no accessor
            return json.loads(model.__getstate__())["unk_id"]
        name = getattr(model, "unk_token", None)
        return None if name is None else self.find(name)

    @cached_property
    def strips_space(self) -> bool:
        """Whether decoding drops the space that encoding put before the first word."""
        id = self.find(SPACE)
        return id is not None and self._tokenizer.decode([id]) == ""

    @cached_property
    def _at(self) -> dict[Place, Tokenizer]:
        """The tokenizer for each place: itself, or a copy that adds no space there."""
        tokenizers = dict.fromkeys(("start", "control", "inside"), self._tokenizer)
        steps = {"normalizer": self._tokenizer.normalizer, "pre_tokenizer": self._tokenizer.pre_tokenizer}
        states = {name: step.__getstate__() for name, step in steps.items() if step is not None}
        for place in ("control", "inside"):
            edited = {name: json.loads(state) for name, state in states.items()}
            _add_no_space(list(edited.values()), place)
            if edited != {name: json.loads(state) for name, state in states.items()}:
                whole = json.loads(self._tokenizer.to_str()) | edited
                tokenizers[place] = Tokenizer.from_str(json.dumps(whole))
                tokenizers[place].encode_special_tokens = True
        return tokenizers

    def encode(self, text: str, place: Place) -> list[int]:
        """Return the ids of a run of text."""
        return self._run(text, place).ids

    def offsets(self, text: str, place: Place) -> list[tuple[int, int]]:
        """Return (start, end) in `text` of each id of `encode`."""
        return self._run(text, place).offsets

    def _run(self, text: str, place: Place) -> Encoding:
        with library_errors(self.origin, "has a tokenizer that fails on a text"):  # it names no unknown token, perhaps
            return self._at[place].encode(text, add_special_tokens=False)

    def piece(self, id: int) -> bytes:
        """Return the bytes that an id writes; b"" for an id outside the vocabulary (padded embeddings have them)."""
        if id not in self._known_pieces:
            self._known_pieces[id] = self._piece(self._tokenizer.id_to_token(id) or "")
        return self._known_pieces[id]

    def _piece(self, token: str) -> bytes:
        if token in self.added:
            return token.encode()
        if self._alphabet is not None:
            known = all(character in self._alphabet for character in token)
            return bytes(self._alphabet[character] for character in token) if known else token.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


def _add_no_space(parts: list[dict], place: Place) -> None:
    """Edit serialised normalizers and pre-tokenizers so that they add no space at `place`."""
    for part in parts:
        if part.get("prepend_scheme") == "first" or ("prepend_scheme" in part and place == "inside"):
            part["prepend_scheme"] = "never"
        if place == "inside":
            part |= {name: off for name, off in (("prepend", ""), ("add_prefix_space", False)) if name in part}
        _add_no_space([*part.get("normalizers", []), *part.get("pretokenizers", [])], place)
