"""Faults that a text shows by itself: broken characters, left-overs of web pages and chat windows, personal data.

Each has a way to find it and, where that is safe, a way to repair it. Finding looks at the whole row, as markup is a
fault in a film review and the subject itself where the question asks for a web page: rows that speak of HTML, or
hold it in a code fence, are let pass. Boilerplate counts in what is learned, not in what is asked: a prompt may well
hold the letter that is to be classified as spam.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minitune.curation.findings import Level, answers_of, texts_of
from minitune.curation.mojibake import find_mojibake, repair_mojibake
from minitune.curation.personal import find, redact

_TAGS = (
    "a|abbr|article|aside|b|blockquote|body|br|button|center|code|dd|div|dl|dt|em|figure|font|footer|form|h[1-6]|head|"
    "header|hr|html|i|iframe|img|input|li|link|main|meta|nav|ol|option|p|pre|script|section|select|small|span|strong|"
    "style|sub|sup|table|tbody|td|textarea|th|thead|title|tr|u|ul|video"
)
_TAG = re.compile(  # with attributes that have values, so that "a <b and b> c" is none
    rf"</?(?:{_TAGS})(?:\s[^<>=]{{0,400}}=[^<>]{{0,400}}|(?:\s+(?:async|checked|clear|defer|disabled|hidden|required))*)"
    r"\s*/?>|<!--.{0,400}?-->",
    re.IGNORECASE | re.DOTALL,
)
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_ENDS = r"<(?:br\s?/?|/(?:p|div|li|tr|h[1-6]|ul|ol|table))\s*>"
_BREAK = re.compile(rf"[ \t]*{_ENDS}[ \t]*", re.IGNORECASE)
_EDGES = re.compile(rf"\A(?:\s*{_ENDS})+\s*|(?:\s*{_ENDS})+\s*\Z", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:[a-zA-Z][a-zA-Z0-9]{1,30}|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")
_ABOUT_MARKUP = re.compile(
    r"\b(?:[dx]?html5?|xml|svg|css|jsx|markup|markdown|tags?|web ?(?:page|site)s?|webpage|javascript|react|vue|angular|"
    r"jinja|php|blade|template|entity|hyperlink|url[- ]encod\w*)\b|<!doctype|<\?xml",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_TRACKING = re.compile(
    r"(?<=[?&])(?:utm_\w+|fbclid|gclid|yclid|msclkid|dclid|igshid|mc_[ce]id|_hsenc|_hsmi|ref_src)=[^&#\s\"'<>)\]]*&?"
)
_QUERY = re.compile(r"[?&][^\s\"'<>)\]#]*")
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # terminal colours, control characters
    r"|[\u200b\u2060-\u2064\ufeff\u00ad\ufff9-\ufffb\ufffe\uffff]"  # no width, soft hyphen, no characters
    r"|(?<=[\u0000-\u024f])[\u200c\u200d]|[\u200c\u200d](?=[\u0000-\u024f])"  # joiners where nothing joins
    r"|[\u202d\u202e]|(?<!\U0001f3f4)(?<![\U000e0020-\U000e007f])[\U000e0001-\U000e007f]+"  # overrides, hidden letters
)
_WHITE = {ord(char): " " for char in "\t\n\r"}
_DIRECTIONS = re.compile(r"[\u200e\u200f\u061c\u202a-\u202c\u2066-\u2069]")  # belong in right-to-left text only
_BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language|language)(?: language)?[- ](?:model|assistant)\b"
    r"|\bas an ai,|\bmy (?:knowledge|training)(?: data)? (?:cut[- ]?off|only goes up to)|\bregenerate response\b"
    r"|\bI(?:['’]m| am) (?:ChatGPT|an AI (?:language )?model (?:developed|created|trained) by)"
    r"|\b(?:accept|we use|uses?|manage|this site uses) (?:all )?cookies\b"
    r"|\bcookie (?:policy|settings|preferences|notice)\b"
    r"|\bclick here\b|\bsubscribe to (?:our|my) (?:newsletter|channel)\b|\bsign up for our newsletter\b"
    r"|\ball rights reserved\b|\bskip to (?:main )?content\b|\benable javascript\b|\bback to top\b"
    r"|\bread more\s*(?:»|\.\.\.|…)|\bshare (?:this )?on (?:facebook|twitter|linkedin)\b"
    r"|\bterms of (?:use|service) and privacy|\blorem ipsum\b|^\s*(?:advertisement|sponsored content)\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_TELLING = (  # every phrase above has one of these
    "as an ai", "as an artificial", "as a l", "my knowledge", "my training", "regenerate", "chatgpt", "m an ai",
    "cookie", "click here", "subscribe", "newsletter", "rights reserved", "skip to", "enable javascript",
    "back to top", "read more", "share ", "terms of", "lorem", "advertisement", "sponsored",
)  # fmt: skip
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^`\n]*$", re.MULTILINE)
_DOUBLED = re.compile(r"^[ \t]*(?:```|~~~)\w+[ \t]*\n[ \t]*(?:```|~~~)\w+[ \t]*$", re.MULTILINE)


def _control_in(text: str) -> str | None:
    if text.isascii() and text.translate(_WHITE).isprintable():
        return None
    found = _CONTROL.search(text) or (None if _right_to_left(text) else _DIRECTIONS.search(text))
    if found and found[0] >= "\x80" and (mended := repair_mojibake(text)) != text:
        return _control_in(mended)  # what is left once bytes are read rightly
    return None if found is None else text[max(found.start() - 10, 0) : found.end() + 10]


def _right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(char) in ("R", "AL") for char in text if char > "\u0590")


def repair_control(text: str) -> str:
    """Return the text without invisible characters; where one parted two words a space is put."""
    if not _right_to_left(text):
        text = _DIRECTIONS.sub("", text)

    def instead(found: re.Match) -> str:
        if repair_mojibake(found[0]) != found[0]:
            return found[0]  # typography in the wrong encoding: to be repaired as such, not lost
        around = text[found.start() - 1 : found.start()] + text[found.end() : found.end() + 1]
        return " " if len(found[0]) == 1 and found[0] < "\xa0" and len(around) == 2 and around.isalnum() else ""

    return _CONTROL.sub(instead, text)


def _markup_in(row: Any) -> str | None:
    texts = texts_of(row)
    for text in texts:
        bare = _FENCED.sub("", text) if "`" in text else text
        found = _TAG.search(bare) or next((m for m in _ENTITY.finditer(bare) if html.unescape(m[0]) != m[0]), None)
        if found:
            return None if any(map(_ABOUT_MARKUP.search, texts)) else found[0]
    return None


def repair_markup(text: str) -> str:
    """Return the text without tags and with entities as characters; what is in code stays as it is."""
    pieces, end, text = [], 0, _EDGES.sub("", text)
    for code in [*_FENCED.finditer(text), None]:
        piece = text[end : code.start()] if code else text[end:]
        piece = _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub("", piece)))
        piece = _ENTITY.sub(lambda found: html.unescape(found[0]), piece)  # not "&copy=2" in a link
        pieces += [piece, code[0] if code else ""]
        end = code.end() if code else end
    return "".join(pieces)


def repair_tracking(text: str) -> str:
    """Return the text with links that do not say where they were clicked."""
    return _QUERY.sub(_untracked, text)


def _untracked(query: re.Match) -> str:
    kept = _TRACKING.sub("", query[0])
    return kept[:-1] if kept != query[0] and kept[-1] in "?&" and kept[-1] != query[0][-1] else kept


def _fences_in(text: str) -> str | None:
    """Return what is wrong with a text's code fences: opened twice, or left open."""
    if not _holding(text, "```", "~~~"):
        return None
    if doubled := _DOUBLED.search(text):
        return doubled[0]
    marks = _FENCE.findall(text)
    return "a fence that is never closed" if len(marks) % 2 and len(set(marks)) == 1 else None


def _holding(text: str, *parts: str) -> bool:
    """Tell whether a text has one of some parts: a quick look before a slow pattern."""
    return any(part in text for part in parts)


def _lost_in(text: str) -> str | None:
    place = text.find("\ufffd")
    return None if place < 0 else text[max(place - 10, 0) : place + 11]


def _tracking_in(text: str) -> str | None:
    found = _TRACKING.search(text) if _holding(text, "?", "&") else None
    return found and found[0]


def _boilerplate_in(text: str) -> str | None:
    found = _BOILERPLATE.search(text) if _holding(text.casefold(), *_TELLING) else None
    return found and found[0]


def _first(
    look: Callable[[str], str | None], texts: Callable[[Any], list[str]] = texts_of
) -> Callable[[Any], str | None]:
    """Return the search of a row for the first of its texts in which `look` finds something."""
    return lambda row: next(filter(None, map(look, texts(row))), None)


def _mojibake_in(text: str) -> str | None:
    found = find_mojibake(text)
    return found and f"{found[0]} for {found[1]}"


def _personal_in(text: str) -> str | None:
    """Name the kinds only: a report must not spread what it warns of."""
    kinds = sorted({match.kind for match in find(text)})
    return " and ".join(kinds) if kinds else None


@dataclass(frozen=True)
class Fault:
    """How a fault is told and repaired; `search(row)` returns what was found, or None."""

    level: Level
    what: str
    search: Callable[[Any], str | None]
    remedy: str
    repair: Callable[[str], str] | None = None


FAULTS = {  # repairs are done in this order
    "mojibake": Fault(
        "warning", "text decoded with the wrong encoding", _first(_mojibake_in),
        "read the source as UTF-8 again, or repair", repair_mojibake,
    ),
    "replacement_character": Fault(
        "warning", "U+FFFD in place of characters that were lost", _first(_lost_in),
        "read the source in its own encoding again, or remove the rows",
    ),
    "markup": Fault("warning", "HTML tags or entities", _markup_in, "repair, if it is not the subject", repair_markup),
    "tracking": Fault(
        "note", "links with tracking parameters", _first(_tracking_in), "repair, so that none are learned",
        repair_tracking,
    ),
    "control_character": Fault(
        "warning", "control, zero-width or direction characters", _first(_control_in), "repair", repair_control
    ),
    "boilerplate": Fault(
        "warning", "phrases of web pages or chatbots in what is learned", _first(_boilerplate_in, answers_of),
        "read them; rewrite or remove the rows",
    ),
    "code_fence": Fault(
        "warning", "code fences opened twice or never closed", _first(_fences_in, answers_of),
        "close them or remove the rows",
    ),
    "personal_data": Fault(
        "warning", "personal data or secrets", _first(_personal_in),
        "remove the rows, or repair, which writes [EMAIL] and so on", redact,
    ),
}  # fmt: skip
