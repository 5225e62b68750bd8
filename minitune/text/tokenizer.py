"""A model's tokenizer: text <-> ids, with one owner for every special token.

    encode(text) = [BOS if the tokenizer's own files say so] + ids(text)        decode(encode(text)) = text

Text never becomes a control token: a run of text whose ids hold one is cut inside that token's characters and
encoded in two parts, until none is left. The rejected alternative, escaping or deleting the characters, would
change what the user wrote. A control token is one that its maker flags special, and one that the chat template
writes around turns (DeepSeek's `<|User|>` is not flagged). All others, `<think>` or runs of spaces, are text.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from minitune.errors import CheckpointError, ConfigError, DataError, MinituneError
from minitune.text.backends import Added, FastBackend, Place, SentencePieceBackend
from minitune.text.gguf_tokenizer import read_gguf_tokenizer
from minitune.text.stream import StreamDecoder, decode_all
from minitune.text.templates import ChatTemplate

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Hi"}]


class Tokenizer:
    """Text to ids and back, for one model; made by `load_tokenizer`.

    Public values: `vocab_size` (highest id + 1), `bos_id` or None, `eos_id`, `pad_id` (may equal `eos_id`; padding
    is masked by position), `end_ids` (every id that ends a turn), `add_bos`, `chat_template` or None,
    `control_ids` (literal -> id of every control token).
    """

    def __init__(self, backend: FastBackend | SentencePieceBackend, settings: dict, end_ids: Iterable[int] = ()):
        """`settings` is the content of tokenizer_config.json; `end_ids` are those that other files name.

        Raises CheckpointError where no end-of-text token is known.
        """
        self._backend = backend
        self.settings = settings
        self.vocab_size = backend.vocab_size
        self._piece_bytes: dict[int, bytes] = {}
        self.special = {name: _content(settings[name]) for name in NAMED if settings.get(name)}
        ids = {name: backend.find(token) for name, token in self.special.items()}
        self._named_ends = [id for id in (ids.get("eos_token"), *end_ids) if id is not None]
        if not self._named_ends:
            raise CheckpointError("the tokenizer names no eos_token; add it to tokenizer_config.json")
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int = self._named_ends[0]
        pad_id = ids.get("pad_token")
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.add_bos: bool = bool(settings.get("add_bos_token")) and self.bos_id is not None
        template = settings.get("chat_template")
        self.chat_template = ChatTemplate(template) if template else None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: EOS, those of the generation config, the chat template's end of turn."""
        tail = self._probe(2).rpartition("Yo")[2].lstrip()
        first = self.split_control(tail)[:1]
        return tuple(dict.fromkeys([*self._named_ends, *(id for _, id in first if id is not None)]))

    @cached_property
    def _control(self) -> dict[str, Added]:
        """Literal -> token, of every control token."""
        added = self._backend.added
        control = {token: flags for token, flags in added.items() if flags.special}
        for token in [*self.special.values(), *_extra(self.settings)]:
            id = self._backend.find(token)
            if id is not None and token not in control:
                control[token] = added.get(token) or Added(id, special=True)
        others = [token for token in added if token not in control and not token.isspace()]
        structure = self._probe(3) if others else ""
        return control | {token: added[token] for token in others if token in structure}

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """Literal -> id of every control token."""
        return {token: flags.id for token, flags in self._control.items()}

    @cached_property
    def _guarded(self) -> frozenset[int]:
        """Ids that text must not give; the unknown token is what text may give by its nature."""
        return frozenset(self.control_ids.values()) - {self._backend.unknown_id}

    @cached_property
    def _control_pattern(self) -> re.Pattern:
        """Matches a control token with the white space that it swallows."""
        longest = sorted(self._control.items(), key=lambda item: -len(item[0]))
        spaces = {False: "", True: r"[^\S\x1c-\x1f]*"}  # what Unicode calls white space
        literals = [spaces[flags.lstrip] + re.escape(token) + spaces[flags.rstrip] for token, flags in longest]
        return re.compile("|".join(literals) or "(?!)")

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
        parts, at = [], 0
        for match in self._control_pattern.finditer(text):
            parts += [(text[at : match.start()], None), (match[0], self._control_id(match[0]))]
            at = match.end()
        return [part for part in [*parts, (text[at:], None)] if part[0]]

    def _control_id(self, literal: str) -> int:
        found = self.control_ids.get(literal)
        return self.control_ids[literal.strip()] if found is None else found

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
        ids = self._backend.encode(text, place)
        if self._guarded.isdisjoint(ids):
            return ids
        spans = self._backend.offsets(text, place)
        hits = [span for id, span in zip(ids, spans, strict=True) if id in self._guarded]
        if any(end - start < 2 for start, end in hits):
            raise DataError(f"{text[slice(*hits[0])]!r} is a control token of this model and cannot be written as text")
        cuts = [0, *(start + 1 for start, _ in hits), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [id for n, part in enumerate(parts) for id in self.encode_run(part, "inside" if n else place)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; control tokens are left out, or written as their literals."""
        return decode_all((self._piece(id, skip_special) for id in ids), self._backend.strips_space)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return StreamDecoder(lambda id: self._piece(id, skip_special), self._backend.strips_space)

    def _piece(self, id: int, skip_special: bool) -> bytes:
        if skip_special and id in self._skipped:
            return b""
        if id not in self._piece_bytes:
            self._piece_bytes[id] = self._backend.piece(id)
        return self._piece_bytes[id]

    @cached_property
    def _skipped(self) -> frozenset[int]:
        return frozenset(self.control_ids.values())

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`, such that transformers' AutoTokenizer reads the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(folder)
        content = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a folder (tokenizer.json or tokenizer.model) or of a .gguf file.

    Raises CheckpointError where there is none or it is damaged.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        fast, settings, end_ids = read_gguf_tokenizer(path)
        return Tokenizer(FastBackend(fast, str(path)), settings, end_ids)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a model's folder or a .gguf file")
    settings = _settings(path)
    if (path / "tokenizer.json").is_file():
        backend = _fast_backend(path / "tokenizer.json")
        settings["add_bos_token"] = backend.adds_bos is not None  # its post-processor decides
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    elif (path / "tokenizer.model").is_file():
        settings.setdefault("legacy", True)  # what its absence means
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        backend = SentencePieceBackend(path / "tokenizer.model", repeat_prefix=settings["legacy"])
        settings.setdefault("add_bos_token", backend.adds_bos is not None)
    else:
        raise CheckpointError(f"{path}: no tokenizer.json or tokenizer.model; copy the model's files there")
    _add_declared(backend, settings, path)
    return Tokenizer(backend, settings, _declared_ends(path))


def _fast_backend(file: Path) -> FastBackend:
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise CheckpointError(f"{file}: not a tokenizer ({error}); fetch the file again") from error
    return FastBackend(fast, str(file))


def _read_json(file: Path) -> dict:
    """Return a JSON object, {} where the file does not exist."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not an object; fetch the file again")
    return content


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _extra(settings: dict) -> list[str]:
    """Return the special tokens beyond the named ones, under transformers' present and earlier key."""
    extra = [settings.get(key) or [] for key in ("extra_special_tokens", "additional_special_tokens")]
    return [_content(token) for group in extra for token in (group.values() if isinstance(group, dict) else group)]


def _settings(folder: Path) -> dict:
    """Gather tokenizer_config.json, special_tokens_map.json and the chat template's own file into one dict."""
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    template = _read_json(folder / "chat_template.json").get("chat_template", template)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings | ({"chat_template": template} if template else {})


def _add_declared(backend: FastBackend | SentencePieceBackend, settings: dict, folder: Path) -> None:
    """Add the tokens that other files declare and the tokenizer's own file lacks."""
    declared = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
    for content, id in _read_json(folder / "added_tokens.json").items():
        declared.setdefault(id, {"content": content, "special": content.startswith("<")})
    for id, token in sorted(declared.items()):
        known = backend.find(token["content"])
        if known is not None and known != id:
            raise CheckpointError(
                f"{folder}: token '{token['content']}' has id {known}, but {id} in tokenizer_config.json"
            )
        if known is None or isinstance(backend, SentencePieceBackend):
            flags = {name: bool(token.get(name)) for name in ("special", "lstrip", "rstrip")}
            backend.add(token["content"], id, **flags)


def _declared_ends(folder: Path) -> list[int]:
    """Return the end-of-text ids of generation_config.json and config.json."""
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [] if found is None else [found]
    return ends
