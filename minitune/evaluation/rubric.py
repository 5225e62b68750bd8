"""What a judge goes by: instructions, criteria and a scale, from a file; the shipped one is `rubric.yaml`.

As YAML the file has the keys instructions, criteria (name: text) and scale ([low, high]). As Markdown, everything
before a heading "Criteria" is instructions, below it each criterion is a list item "- name: text", and below a heading
"Scale" stands "1 to 10". A template with places to fill in was rejected: what the judge is shown and the form of its
verdict must fit the reader of verdicts, so they are not the file's to change.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitune.errors import ConfigError, nearest, type_name

DEFAULT = Path(__file__).with_name("rubric.yaml")
_KEYS = ("instructions", "criteria", "scale")
_HEADING = re.compile(r"^#+\s*(criteria|scale)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Rubric:
    """Instructions, criteria by name, and the scale of a score, its ends included."""

    instructions: str
    criteria: dict[str, str] = field(default_factory=dict)
    scale: tuple[int, int] = (1, 10)

    @property
    def text(self) -> str:
        """What stands before the texts to judge."""
        listed = "\n".join(f"- {name}: {text}" for name, text in self.criteria.items())
        return f"{self.instructions}\n\nCriteria:\n{listed}" if listed else self.instructions


def read_rubric(path: str | Path | None = None) -> Rubric:
    """Return the rubric of a .yaml, .yml or .md file; the shipped one without.

    Raises ConfigError for a file that cannot be read or is of another kind, unknown or repeated keys, no instructions,
    criteria without name or text, or a scale that is not two whole numbers, the lower first.
    """
    path = DEFAULT if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rubric {path} cannot be read ({error}); give a UTF-8 file .yaml or .md") from None
    if path.suffix not in (".yaml", ".yml", ".md"):
        raise ConfigError(f"rubric {path}: unknown kind of file '{path.suffix}'; write it as .yaml or .md")
    fields = _markdown(text, path) if path.suffix == ".md" else _yaml(text, path)
    for name in fields:
        if name not in _KEYS:
            raise ConfigError(f"rubric {path}: unknown key '{name}'{nearest(str(name), _KEYS)}; known: {_KEYS}")
    instructions, criteria = fields.get("instructions"), fields.get("criteria", {})
    if not isinstance(instructions, str) or not instructions.strip():
        raise ConfigError(f"rubric {path}: there are no instructions; write what makes an answer better")
    good = isinstance(criteria, dict) and all(isinstance(part, str) and part.strip() for one in criteria.items()
                                              for part in one)  # fmt: skip
    if not good or any(not re.fullmatch(r"[\w -]+", name) for name in criteria):
        raise ConfigError(f"rubric {path}: criteria must be names (letters, digits, spaces), each with a text")
    return Rubric(instructions.strip(), criteria, _scale(fields.get("scale", [1, 10]), path))


def _scale(found: Any, path: Path) -> tuple[int, int]:
    whole = isinstance(found, list) and len(found) == 2 and all(type(edge) is int for edge in found)
    if not whole or not 0 <= found[0] < found[1] <= 100:
        raise ConfigError(f"rubric {path}: the scale is {found}; write two whole numbers from 0 to 100, as [1, 10]")
    return found[0], found[1]


def _yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    from minitune.cli import refuse_twice

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            refuse_twice(root, str(path))
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; a node inside itself
        raise ConfigError(f"rubric {path}: broken YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"rubric {path} holds {type_name(found)}; write the keys {', '.join(_KEYS)}")
    return found


def _markdown(text: str, path: Path) -> dict[str, Any]:
    """Return the same fields of Markdown."""
    opening, *rest = _HEADING.split(text)
    found: dict[str, Any] = {"instructions": opening.strip()}
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        name, lines = name.lower(), [line.strip() for line in body.splitlines() if line.strip()]
        if name in found:
            raise ConfigError(f"rubric {path}: the heading '{name}' is given twice; keep one of them")
        if name == "scale":
            edges = re.fullmatch(r"(\d{1,3})\s*(?:to|-)\s*(\d{1,3})", " ".join(lines))
            found[name] = [int(edges[1]), int(edges[2])] if edges else " ".join(lines)
            continue
        items = [re.fullmatch(r"[-*]\s+\**([^:*]+?)\**\s*:\**\s*(.+)", line) for line in lines]
        if None in items or len({item[1] for item in items}) < len(items):
            raise ConfigError(f"rubric {path}: below 'criteria' each line is '- name: text', each name once")
        found[name] = {item[1]: item[2] for item in items}
    return found
