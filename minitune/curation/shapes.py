"""The shape of an answer, as a program that reads it would see it."""

import json
import re

STRICT = {"JSON", "JSON in a code fence", "XML", "a table", "a word or number"}  # what a reader relies on
_FENCED = re.compile(r"```(\w*)[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_ITEM = re.compile(r"\s*(?:[-*•+]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])\s+\S")
_XML = re.compile(r"<(\w[\w-]*)\b[^<>]*>.*</\1\s*>", re.DOTALL)
_CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import |#include|SELECT |function |public |const |let |var )", re.M
)
_WORDS = 3


def shape(answer: str) -> str:
    """Return one of: JSON, JSON in a code fence, code, XML, a table, a list, a word or number, sentences."""
    text = answer.strip()
    fenced = _FENCED.fullmatch(text)
    if _is_json(fenced[2] if fenced else text):
        return "JSON in a code fence" if fenced else "JSON"
    if fenced or (_CODE.match(text) and re.search(r"[(){};=]", text)):
        return "code"
    if _XML.fullmatch(text):
        return "XML"
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) >= 2 and all(line.count("|") >= 2 for line in lines):
        return "a table"
    if sum(bool(_ITEM.match(line)) for line in lines) >= max(2, len(lines) / 2):
        return "a list"
    short = len(text.split()) <= _WORDS and len(lines) <= 1
    return "a word or number" if short else "sentences"


def _is_json(text: str) -> bool:
    """Tell whether a text is a JSON object or array."""
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
