"""A model's tokenizer: text <-> ids, with one owner for every special token.

    encode(text) = [BOS if the tokenizer's own files say so] + ids(text)        decode(encode(text)) = text

Text never becomes a control token: a run of text whose ids hold one is cut inside that token's characters and
encoded in two parts, until none is left. The rejected alternative, escaping or deleting the characters, would
change what the user wrote. A control token is one that its maker flags special, and one that the chat template
writes around turns (DeepSeek's `<|User|>` is not flagged). All others, `<think>` or runs of spaces, are text.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from minitune.errors import CheckpointError, ConfigError, DataError, MinituneError
from minitune.files import write_json
from minitune.text.encoder import Encoder, Place
from minitune.text.readers import read_folder, read_gguf
from minitune.text.settings import EXTRA, NAMED
from minitune.text.stream import StreamDecoder
from minitune.text.templates import ChatTemplate

PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Hi"}]


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Read the tokenizer of a folder (tokenizer.json or tokenizer.model) or of a .gguf file.

    Raises CheckpointError where there is none, it is damaged, or of a kind that is not known.
    """
    path = Path(path)
    if path.suffix != ".gguf" and not path.is_dir():
        found = "a file of another kind" if path.is_file() else "no such folder"
        raise CheckpointError(f"{path}: {found}; give a model's folder or a .gguf file")
    fast, settings, ends = read_gguf(path) if path.suffix == ".gguf" else read_folder(path)
    return Tokenizer(Encoder(fast, str(path)), settings, ends)


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _extra_special(settings: dict) -> list[str]:
    """Return the special tokens beyond the named ones."""
    groups = [settings.get(key) or [] for key in EXTRA]
    return [_content(token) for group in groups for token in (group.values() if isinstance(group, dict) else group)]


class Tokenizer:
    """Text to ids and back, for one model; made by `load_tokenizer`.

    Public values: `kind` ("BPE", ...), `vocab_size` (highest id + 1), `bos_id` or None, `eos_id`, `pad_id` (may equal
    `eos_id`; padding is masked by position), `end_ids` (every id that ends a turn), `add_bos`, `chat_template` or None,
    `control_ids` (literal -> id of every control token), `special` (transformers' names -> literals), `settings` (the
    content of tokenizer_config.json), `origin` (the folder or file it was read from).
    """

    def __init__(self, encoder: Encoder, settings: dict, end_ids: Iterable[int] = ()):
        """`end_ids` are those that other files than tokenizer_config.json name.

        Raises CheckpointError where no end-of-text token is known.
        """
        self._encoder = encoder
        self.origin = encoder.origin
        self.settings = settings
        self.kind, self.vocab_size = encoder.kind, encoder.vocab_size
        self.special = {name: _content(settings[name]) for name in NAMED if settings.get(name)}
        ids = {name: encoder.find(token) for name, token in self.special.items()}
        self._named_ends = [id for id in (ids.get("eos_token"), *end_ids) if id is not None]
        if not self._named_ends:
            raise CheckpointError(f"{self.origin}: the tokenizer names no eos_token; add it to tokenizer_config.json")
        self.add_bos: bool = encoder.bos_id is not None
        self.bos_id: int | None = encoder.bos_id if self.add_bos else ids.get("bos_token")
        self.eos_id: int = self._named_ends[0]
        pad_id = ids.get("pad_token")
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        source = settings.get("chat_template")
        self.chat_template = ChatTemplate(source, self.origin) if source else None

    def with_tokens(self, tokens: Iterable[str]) -> "Tokenizer":
        """Return a copy with more tokens, after those it has. They are text, not control: what writes them means them.

        Raises ConfigError for one that is empty, white space, given twice, or there already.
        """
        tokens = list(tokens)
        for number, token in enumerate(tokens):
            known = self._encoder.find(token) is not None or token in tokens[:number]
            if known or not token.strip():
                why = "is there already" if known else "is empty"
                raise ConfigError(f"the new token {token!r} {why}; leave it out")
        return Tokenizer(self._encoder.with_tokens(tokens), self.settings, self._named_ends)

    def check_fits(self, embeddings: int) -> None:
        """Raise CheckpointError where an id has no row in a model's embedding of so many; spare rows are usual."""
        if self.vocab_size > embeddings:
            last = self.decode([self.vocab_size - 1], skip_special=False)
            raise CheckpointError(
                f"{self.origin}: the tokenizer's ids go up to {self.vocab_size - 1} ({last!r}), but the model's "
                f"embedding has {embeddings} rows; use the tokenizer that the model was trained with"
            )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: EOS, those of the generation config, the chat template's end of turn."""
        after = self.split_control(self._probe(2).rpartition("Yo")[2].lstrip())
        return tuple(dict.fromkeys([*self._named_ends, *(id for _, id in after[:1] if id is not None)]))

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """Literal -> id of every control token."""
        added = self._encoder.added
        control = dict.fromkeys([*(token for token, (_, flags) in added.items() if flags.special)])
        control |= dict.fromkeys([*self.special.values(), *_extra_special(self.settings)])
        others = [token for token in added if token not in control and not token.isspace()]
        turns = self._probe(3) if others else ""
        control |= dict.fromkeys(token for token in others if token in turns)
        return {token: id for token in control if (id := self._encoder.find(token)) is not None}

    @property
    def added_ids(self) -> dict[str, int]:
        """Literal -> id of every token that is found in text before it is cut into pieces, control or not."""
        return {token: id for token, (id, _) in self._encoder.added.items()}

    @cached_property
    def _guarded(self) -> frozenset[int]:
        """Ids that text must not give; the unknown token is what text gives by its nature."""
        return frozenset(self.control_ids.values()) - {self._encoder.unknown_id}

    @cached_property
    def _control(self) -> tuple[re.Pattern, list[int]]:
        """Matches a control token, with the white space that it swallows; the id of the token of each of its groups."""
        literals = sorted(self.control_ids, key=len, reverse=True)
        blank, groups = r"[^\S\x1c-\x1f]*", []  # what Unicode calls white space
        for token in literals:
            _, flags = self._encoder.added.get(token, (None, None))
            before, after = (blank if getattr(flags, side, False) else "" for side in ("lstrip", "rstrip"))
            groups.append(f"{before}({re.escape(token)}){after}")
        return re.compile("|".join(groups) or "(?!)"), [self.control_ids[token] for token in literals]

    def _probe(self, count: int) -> str:
        """Render a harmless conversation, to see what the template writes around turns; "" where it cannot."""
        if self.chat_template is None:
            return ""
        try:
            (text,) = self.chat_template.render(PROBE, [(count, False)], self.special)
        except MinituneError:
            return ""  # a template at fault is reported by the first real rendering
        return text if isinstance(text, str) else ""

    def split_control(self, text: str) -> list[tuple[str, int | None]]:
        """Cut text at control tokens: (characters, id) for each of them, (characters, None) for what is between."""
        (pattern, ids), parts, at = self._control, [], 0
        for match in pattern.finditer(text):
            parts += [(text[at : match.start()], None), (match[0], ids[match.lastindex - 1])]
            at = match.end()
        return [part for part in [*parts, (text[at:], None)] if part[0]]

    def encode(self, text: str, *, bos: bool | None = None, control: bool = False) -> list[int]:
        """Return the ids of `text`.

        `bos`: put one BOS before them; None does what the tokenizer's own files say. `control`: read the literals
        of control tokens in `text` as these tokens; else they stay text. Raises ConfigError for `bos=True` where
        the tokenizer has no BOS, DataError for text that cannot be written without a control token.
        """
        ids: list[int] = []
        for part, id in self.split_control(text) if control else [(text, None)]:
            ids += self.encode_run(part, "control" if ids else "start") if id is None else [id]
        return self.with_bos(ids, bos)

    def with_bos(self, ids: list[int], bos: bool | None = None) -> list[int]:
        """Return `ids` with exactly one BOS before them where `bos` (None: the tokenizer's own choice) asks for it."""
        if bos and self.bos_id is None:
            raise ConfigError("this tokenizer has no BOS token; leave bos out")
        wanted = self.add_bos if bos is None else bos
        return [self.bos_id, *ids] if wanted and ids[:1] != [self.bos_id] else ids

    def encode_run(self, text: str, place: Place) -> list[int]:
        """Return the ids of a run of plain text; `place`: at the "start", after a "control" token, or "inside"."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"half of a surrogate pair at character {error.start} of a text; repair the file's encoding"
            raise DataError(problem) from error
        ids = self._encoder.encode(text, place)
        if self._guarded.isdisjoint(ids):
            return ids
        spans = self._encoder.offsets(text, place)
        hits = [span for id, span in zip(ids, spans, strict=True) if id in self._guarded]
        if any(end - start < 2 for start, end in hits):
            raise DataError(f"{text[slice(*hits[0])]!r} is a control token of this model and cannot be written as text")
        cuts = [0, *(start + 1 for start, _ in hits), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [id for n, part in enumerate(parts) for id in self.encode_run(part, "inside" if n else place)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; control tokens are left out, or written as their literals."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        skipped = frozenset(self.control_ids.values()) if skip_special else frozenset()
        return StreamDecoder(self._encoder.piece, skipped, self._encoder.strips_space)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, such that transformers' AutoTokenizer reads the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._encoder.save(str(folder / "tokenizer.json"))
        code = ("auto_map", "tokenizer_class")  # tokenizer.json is complete: no class may rebuild parts of it
        settings = {name: value for name, value in self.settings.items() if value is not None and name not in code}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / "tokenizer_config.json", settings)
