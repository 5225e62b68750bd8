"""Ids back to text, one at a time: every token is a run of bytes, and UTF-8 is decoded incrementally.

    text(ids) = utf8(piece(ids[0]) + piece(ids[1]) + ...),   less one leading space where the encoder added one

Both tokenizer families of language models fit this: byte-level BPE writes each byte as a printable character (the
GPT-2 table), SentencePiece writes a space as U+2581 and an unknown character as `<0xHH>` byte pieces. So a stream
is exact and costs O(1) per token. The usual alternative, decoding a growing window and holding text back while it
ends in U+FFFD, was rejected: it is quadratic, and it disagrees with the whole text where bytes are invalid.
"""

import codecs
from collections.abc import Callable, Iterable


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's table, printable character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


class StreamDecoder:
    """Text of a growing list of ids; what was returned so far never ends inside a UTF-8 character.

    The concatenation of every `push` and one `flush` equals `Tokenizer.decode` of the same ids.
    """

    def __init__(self, piece: Callable[[int], bytes], strip_space: bool):
        """`piece` gives the bytes of an id; `strip_space` drops one space at the very start of the text."""
        self._piece = piece
        self._strip = self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Take the next id and return the characters that it completes (often one word, sometimes "")."""
        return self._emit(self._utf8.decode(self._piece(id)))

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that never was completed, else "". Ready for a new text."""
        rest = self._emit(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._strip = self._strip_space
        return rest

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def decode_all(pieces: Iterable[bytes], strip_space: bool) -> str:
    """Return the text of all pieces at once; invalid UTF-8 becomes U+FFFD."""
    text = b"".join(pieces).decode("utf-8", "replace")
    return text.removeprefix(" ") if strip_space else text
