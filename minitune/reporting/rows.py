"""Rows of data in a terminal, token by token: what is learned and what is given."""

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitune.data.examples import Example
    from minitune.data.preferences import Item

LEARNED, GIVEN, RESET = ("\x1b[32m", "\x1b[92m"), ("\x1b[90m", "\x1b[37m"), "\x1b[0m"


def shown(item: "Item", tokenizer: Any, coloured: bool, width: int) -> list[str]:
    """Return a row as lines: its origin and size, then its text; of a pair, the answers in two columns."""
    documents = item.documents
    tokens = " + ".join(str(len(document.ids)) for document in documents)
    targets = " + ".join(str(sum(document.targets)) for document in documents)
    label = f", {'desirable' if item.desirable else 'undesirable'}" if hasattr(item, "desirable") else ""
    margin = f", margin {item.margin:g}" if getattr(item, "margin", None) is not None else ""
    noun = "target" if targets == "1" else "targets"
    head = f"{item.origin}: {tokens} tokens, {targets} {noun}{label}{margin}"
    if len(documents) == 1:
        return [head, painted(documents[0], tokenizer, coloured)]
    start = len(documents[0].prompt)
    prompt = "".join(style + text for style, text in _pieces(documents[0], tokenizer, coloured, 0, start))
    room = max((width - 3) // 2, 1)  # characters of a column; " | " stands between them
    sides = [_column(_pieces(document, tokenizer, coloured, start), room) for document in documents]
    empty = " " * room
    height = max(map(len, sides))
    columns = ([*side, *[empty] * (height - len(side))] for side in sides)
    rows = [f"{left} | {right}".rstrip() for left, right in zip(*columns, strict=True)]
    return [head, prompt, f"{'chosen':{room}} | rejected", *rows]


def painted(example: "Example", tokenizer: Any, coloured: bool) -> str:
    """Return a row's text: targets green and the rest grey, shades alternating by token, or targets in [ ]."""
    return "".join(style + text for style, text in _pieces(example, tokenizer, coloured))


def _pieces(
    example: "Example", tokenizer: Any, coloured: bool, start: int = 0, end: int | None = None
) -> list[tuple[str, str]]:
    """Return (style, text) of the tokens from `start` to `end`; the style is "" without colours."""
    stream, pieces, learned = tokenizer.stream(skip_special=False), [], False
    marked = list(zip(example.ids, example.targets, strict=True))[start:end]
    for number, (id, target) in enumerate(marked, start):
        text = harmless(stream.push(id))
        if coloured:
            pieces.append(((LEARNED if target else GIVEN)[number % 2], text))
        else:
            pieces.append(("", ("[" if target and not learned else "]" if learned and not target else "") + text))
        learned = target
    return [
        *pieces,
        (RESET, harmless(stream.flush())) if coloured else ("", harmless(stream.flush()) + "]" * learned),
    ]


def _column(pieces: list[tuple[str, str]], width: int) -> list[str]:
    """Return the pieces as lines that fill `width` places of a terminal, wide characters taking two."""
    lines, line, used = [], "", 0

    def close() -> None:
        lines.append(line + (RESET if "\x1b" in line else "") + " " * (width - used))

    for style, text in pieces:
        line += style
        for character in text.expandtabs(4):
            places = 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
            if character == "\n" or used + places > width:
                close()
                line, used = style, 0
            if character != "\n":
                line, used = line + character, used + places
    close()
    return lines


def harmless(text: str) -> str:
    """Return the text with control characters escaped, so that data cannot drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
