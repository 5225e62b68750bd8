"""A tokenizer as GGUF metadata, the opposite of `readers.read_gguf`.

GGUF stores tokens, their types and either merges with the name of a split into words (byte-level BPE) or scores
(SentencePiece's BPE: the best joined piece merges first). A `tokenizer.json` has merges only, in the order of their
scores, so a piece's score is minus the place of its first merge. The split's name is the one whose words are the
tokenizer's own on a text that tells them apart; llama.cpp's converter compares a hash of ids instead, which knows
only the vocabularies that somebody entered. What is written is not believed: the writer reads it back and compares.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from minitune.errors import CheckpointError
from minitune.text.readers import BYTE, CONTROL, SPECIAL, UNKNOWN, USER_DEFINED
from minitune.text.splits import SPLITS
from minitune.text.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5
ENDS = ("eos", "eot", "eom")  # as many ids that end a turn as GGUF has keys for
WORDS = (
    "Hello's I'LL don't they'Re 7 1234567 3.14 x=1;y  a/b/c\n\n  \t camelCase HTTPServer iPhone5s ---\r\n/path\n!!\n "
    "世界 ｶﾞ ñandú é Ünï हिन्दी ไทย سلام 🎉👩‍👩‍👧 \u00a0\u3000 cafe\u0301 Ⅷ½ _snake_case_ «Ωmega» end  "
)


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return the keys `tokenizer.*` that say what `tokenizer` is, for a model with so many rows of embeddings.

    Raises CheckpointError for a tokenizer that GGUF has no words for.
    """
    tokenizer.check_fits(rows)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        file = Path(folder, "tokenizer.json")
        state, words = json.loads(file.read_text(encoding="utf-8")), _words(FastTokenizer.from_file(str(file)))
    model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
    if model["type"] != "BPE":
        raise CheckpointError(f"{tokenizer.origin}: a tokenizer of kind {model['type']} cannot be written to GGUF")
    names = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    pieces = "ByteLevel" not in json.dumps(state["decoder"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    control = set(tokenizer.control_ids.values())

    def kind(id: int) -> int:
        token = names.get(id)
        if token is None:
            return UNUSED
        if id in added:
            return CONTROL if id in control or added[id]["special"] else USER_DEFINED
        if pieces and token == model.get("unk_token"):
            return UNKNOWN
        return BYTE if pieces and model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") else NORMAL

    values: dict[str, Any] = {
        "ggml.model": "llama" if pieces else "gpt2",
        "ggml.pre": "default" if pieces else _split_name(state, words, tokenizer.origin),
        "ggml.tokens": [names.get(id, f"[PAD{id}]") for id in range(rows)],
        "ggml.token_type": [kind(id) for id in range(rows)],
    }
    if pieces:
        values["ggml.scores"] = _scores(values["ggml.tokens"], values["ggml.token_type"], merges, tokenizer.origin)
        values["ggml.add_space_prefix"] = _adds_space(state)
    elif merges:
        values["ggml.merges"] = merges
    values |= _special(tokenizer, {token: id for id, token in names.items()})
    return {f"tokenizer.{key}": value for key, value in values.items() if value is not None}


def _special(tokenizer: Tokenizer, ids: dict[str, int]) -> dict[str, Any]:
    """Return the keys about special tokens and the chat template."""
    ends = tokenizer.end_ids
    if len(ends) > len(ENDS):
        raise CheckpointError(f"{tokenizer.origin}: {len(ends)} tokens end a turn; GGUF has keys for {len(ENDS)}")
    named = {key: ids.get(tokenizer.special.get(name)) for key, name in SPECIAL.items()}
    named |= dict(zip(ENDS, ends, strict=False))
    template = tokenizer.settings.get("chat_template")
    return {
        **{f"ggml.{key}_token_id": id for key, id in named.items()},
        "ggml.add_bos_token": tokenizer.add_bos,
        "ggml.add_eos_token": False,
        "chat_template": template or None,
    }


def _words(tokenizer: FastTokenizer) -> list[str]:
    """Return how a tokenizer cuts the text that tells splits apart."""
    step = tokenizer.pre_tokenizer
    return [word for word, _ in step.pre_tokenize_str(WORDS)] if step else [WORDS]


def _split_name(state: dict[str, Any], words: list[str], origin: str) -> str:
    """Return the name of the split into words that a byte-level tokenizer uses."""
    normalizer = state["normalizer"] or {"type": None}
    for name, split in SPLITS.items():
        same = [word for word, _ in split.pre_tokenizer().pre_tokenize_str(WORDS)] == words
        if (
            same
            and split.whole_words == state["model"].get("ignore_merges", False)
            and normalizer["type"] == ("NFC" if split.nfc else None)
        ):
            return name
    raise CheckpointError(f"{origin}: GGUF has no name for how this tokenizer cuts text into words")


def _scores(tokens: list[str], types: list[int], merges: list[str], origin: str) -> list[float]:
    """Return a score for each piece: minus the place of its first merge, the lowest of all without one.

    CheckpointError for a piece that no merge makes although two others would: a score would let them.
    """
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault(merge.replace(" ", ""), place)
    known = set(tokens)
    for token, kind in zip(tokens, types, strict=True):
        cuts = range(1, len(token)) if kind == NORMAL and token not in places else ()
        if any(token[:cut] in known and token[cut:] in known for cut in cuts):
            raise CheckpointError(f"{origin}: no merge makes the piece {token!r}, but in GGUF its parts would merge")
    return [-float(places.get(token, len(merges))) for token in tokens]


def _adds_space(state: dict[str, Any]) -> bool:
    """Tell whether a space goes before a text's first word: a step prepends it, or Metaspace does."""
    steps = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
