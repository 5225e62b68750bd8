"""JSON as its standard has it: each key once, numbers that are numbers, nesting with an end.

Python's own reader keeps the last of two equal keys and takes `NaN`; of two programs that read one file, each then has
another model. A schema was rejected: what a field may hold is for whoever uses it to say.
"""

import json
from typing import Any


def loads(text: str) -> Any:
    """Return what `text` holds; ValueError where it is not JSON, or a key of an object is given twice."""
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        if "\\u" in text:  # half a pair is no character, and cannot be written again
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice; which one counts is anybody's guess")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number that JSON knows")
