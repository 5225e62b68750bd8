"""Mojibake: UTF-8 that was read as Windows-1252 or Latin-1, found by undoing it, and undone.

    "é" -> UTF-8 C3 A9 -> read as Windows-1252 -> "Ã©"          so      "Ã©" -> C3 A9 -> read as UTF-8 -> "é"

A run of characters is looked at where its bytes are whole UTF-8 sequences: a lead byte's letter (Â to ô) and then the
right number of symbols. Few real texts have such runs, but "café…”" is one (it would be a Chinese character) and so is
"IRMÃ—". A run therefore counts only when what comes out is more plausible: the sequence of a Latin letter or sign, of a
letter within a word, of punctuation, an emoji, or of two and more characters of another script. Text that went wrong
twice is undone twice. The control characters U+0080 to U+009F are Windows-1252's typography that was read as Latin-1.
What was lost cannot come back: a replacement character, or a non-breaking space made plain.

The package ftfy knows more encodings and lost bytes, too; its guesses go beyond what round trips prove.
"""

import re
import unicodedata

_BYTES = {chr(byte): byte for byte in range(0x80, 0x100)}  # Latin-1, with its control characters
_BYTES |= {bytes([byte]).decode("cp1252", "ignore"): byte for byte in range(0x80, 0xA0)}  # and Windows-1252
_BYTES.pop("", None)  # five bytes that it leaves out
_AFTER = "[" + "".join(re.escape(char) for char, byte in _BYTES.items() if byte < 0xC0) + "]"
_RUN = re.compile(rf"(?:[Â-ß]{_AFTER}|[à-ï]{_AFTER}{{2}}|[ð-ô]{_AFTER}{{3}})+|[\x80-\x9f]+")
_TYPOGRAPHY = set("‘’“”–—…‚„‹›«»\u00a0™")  # stands after words that end in a capital Ã, Å, ...


def find_mojibake(text: str) -> tuple[str, str] | None:
    """Return (as it is, as it was meant) of the first such run of a text, or None."""
    for run in () if text.isascii() else _RUN.finditer(text):
        meant = _undone(run)
        if meant != run[0]:
            return run[0], meant
    return None


def repair_mojibake(text: str) -> str:
    """Return the text with every such run undone."""
    while (repaired := _RUN.sub(_undone, text)) != text:  # each round makes it shorter
        text = repaired
    return text


def _undone(run: re.Match) -> str:
    """Return the characters that were meant, or the run itself where they are not more plausible."""
    if max(run[0]) < "\xa0":  # control characters that no text has: Windows-1252 was read as Latin-1
        return "".join(bytes([ord(char)]).decode("cp1252", "ignore") or char for char in run[0])
    try:
        meant = repair_mojibake(bytes(_BYTES[char] for char in run[0]).decode("utf-8"))  # it may have happened twice
    except UnicodeDecodeError:
        return run[0]
    before, after = run.string[: run.start()][-1:], run.string[run.end() :][:1]
    return meant if _plausible(meant, run[0], before, after) else run[0]


def _plausible(meant: str, found: str, before: str, after: str) -> bool:
    """Tell whether what comes out is more likely than what is there, in its place between two characters."""
    if any(unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs") for char in meant):
        return False
    if len(meant) > 1 or any(0x80 <= ord(char) < 0xA0 for char in found):
        return True
    code, in_word = ord(meant), (before + after).isalpha() or after.isalpha() or (before.isalpha() and before.islower())
    if before.isupper() and not after.isalpha() and found[-1] in _TYPOGRAPHY:
        return False
    if found[-1] in "–—" and not before.isalpha() and after.isupper():
        return False  # from one letter to another, as in Ä–Ö
    latin_word = 0x100 <= code < 0x180 or 0x218 <= code <= 0x21B or 0x1E00 <= code < 0x1F00
    return (
        0xA0 <= code < 0x100
        or (latin_word and (in_word or before.isalpha()))
        or 0x2000 <= code < 0x2C00
        or meant in "\ufeff\ufffd"
        or code >= 0x1F000
    )
