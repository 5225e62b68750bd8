"""Ids back to text, one at a time: every token is a run of bytes, and UTF-8 is decoded incrementally.

    text(ids) = utf8(piece(ids[0]) + piece(ids[1]) + ...),   less one leading space where the encoder added one

Both tokenizer families of language models fit this: byte-level BPE writes each byte as a printable character (the
GPT-2 table), SentencePiece writes a space as U+2581 and an unknown character as `<0xHH>` byte pieces. So a stream
is exact and costs O(1) per token. The usual alternative, decoding a growing window and holding text back while it
ends in U+FFFD, was rejected: it is quadratic, and it disagrees with the whole text where bytes are invalid.
"""

import codecs
from collections.abc import Callable


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's table, printable character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


class StreamDecoder:
    """Text of a growing list of ids; what was returned so far never ends inside a UTF-8 character.

    The concatenation of every `push` and one `flush` is the text of the ids; invalid UTF-8 becomes U+FFFD.
    """

    def __init__(self, piece: Callable[[int], bytes], skipped: frozenset[int], strip_space: bool):
        """`piece` gives the bytes of an id; `skipped` ids write nothing; `strip_space` drops one leading space."""
        self._piece, self._skipped, self._strip_space = piece, skipped, strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Take the next id and return the characters that it completes (often one word, sometimes "")."""
        return self._emit(b"" if id in self._skipped else self._piece(id))

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that never was completed, else ""."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text
