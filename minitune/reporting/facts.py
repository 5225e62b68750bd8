"""What `inspect` found, as lines to read: names to the left, tables where there are rows."""

from collections.abc import Mapping
from typing import Any


def as_text(facts: Mapping[str, Any]) -> str:
    """Return what `describe` found as lines to read."""
    lines = [f"{facts['path']}: {facts['kind']}"]
    for name, value in facts.items():
        if name in ("path", "kind"):
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [name, *_table(value)]
        elif isinstance(value, dict) and "kind" in value and "path" in value:
            lines += [name, *(f"  {line}" for line in as_text(value).split("\n"))]
        elif isinstance(value, dict):
            width = max(map(len, value), default=0) + 2
            lines += [name, *(f"  {key:{width}}{_shown(content)}" for key, content in value.items())]
        elif name in ("problems", "notes") and value:
            lines += [name, *(f"  {line}" for line in value)]
        else:
            lines.append(f"{name:18}{_shown(value)}")
    # Names come from files of strangers, and a terminal obeys control characters.
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


def _shown(value: Any) -> str:
    """Return a value as a word or a few."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(content)}" for key, content in value.items()) or "none"
    if isinstance(value, list | tuple):
        words = list(map(_shown, value))
        kinds = {word: words.count(word) for word in dict.fromkeys(words)} if len(words) > 8 else {}
        if 0 < len(kinds) < 5:
            words = [f"{count} x {word}" for word, count in kinds.items()]
        return ", ".join(words if len(words) <= 64 else [*words[:4], f"... ({len(words):,})"]) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows under their heading as lines: words to the left, numbers to the right."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    sides = [(">" if type(value) is int else "<") for value in rows[0].values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            ["", *(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))]
        ).rstrip()
        for line in cells
    ]
