"""Personal data and secrets in a text, by their shape: found, and replaced by `[KIND]` on request.

| kind        | what counts                                                                                  |
|-------------|----------------------------------------------------------------------------------------------|
| email       | a local part, @, a domain with a top-level domain of letters                                 |
| phone       | +country and 8 to 15 digits; (ddd) ddd-dddd and its like; grouped digits with a leading 0, or |
|             | after "call", "phone", "tel", ...                                                            |
| card        | 14 to 19 digits in a network's range whose Luhn sum is a multiple of 10                      |
| iban        | a country's code and length, with remainder 1 of mod 97 (ISO 13616)                          |
| ip_address  | a public IPv4 address that is not called a version                                           |
| key         | AWS, GitHub, GitLab, Slack, OpenAI, Google, Stripe and Hugging Face keys, tokens of three     |
|             | base64 parts (JWT), whole private key blocks                                                 |

Shapes alone would call every order number a card and every version an address, so what has a checksum or a range
must satisfy it. Names and street addresses have no shape and are not found: this is a net with known holes, never a
proof that a text is anonymous. A named-entity model was rejected: it is another model to trust, and misses too.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Match(NamedTuple):
    """A place in a text, characters `start` to `end`, that looks like data of a kind."""

    kind: str
    start: int
    end: int


_NETWORKS = re.compile(  # issuer ranges: Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay
    r"(?:4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|62\d{14,17})"
)
_IBAN_LENGTHS = {  # of the SWIFT registry
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
_FAKE = "example"  # RFC 2606 keeps example.com and its like for texts


def luhn(digits: str) -> bool:
    """Tell whether the Luhn sum of digits is a multiple of 10 (ISO/IEC 7812-1, annex B)."""
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def mod97(iban: str) -> bool:
    """Tell whether an IBAN without spaces has the remainder 1 (ISO 13616)."""
    return int("".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return bool(_NETWORKS.fullmatch(digits)) and len(set(digits)) > 1 and luhn(digits)


def _is_iban(text: str) -> bool:
    plain = re.sub(r"\s", "", text).upper()
    return _IBAN_LENGTHS.get(plain[:2]) == len(plain) and mod97(plain)


def _is_public(text: str) -> bool:
    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:  # 300.1.1.1, or 01.2.3.4
        return False


def _is_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 7 <= len(digits) <= 15 and len(set(digits)) > 2


def _is_international(text: str) -> bool:
    """Tell whether digits after + or 00 are grouped as people write them; a bare run is rather a sum or an account."""
    digits = re.sub(r"\D", "", text)
    bare = "+" + digits == text and len(digits) <= 13
    decimal = re.fullmatch(r"\+\d+\.\d+", text)  # a coordinate
    return _is_phone(text) and len(digits) >= 8 and not decimal and (bare or bool(re.search(r"\d\D", text)))


def _is_mixed(text: str) -> bool:
    """Tell whether a key has letters of both cases and digits, as random ones do and hyphenated words don't."""
    return all(re.search(part, text[3:]) for part in ("[a-z]", "[A-Z]", r"\d"))


def _is_called(text: str) -> bool:
    """Tell whether digits after a word such as "call" are no date and no years: "call me on 12/10/2023"."""
    return _is_phone(text) and not _DATE.fullmatch(text)


def _any(_: str) -> bool:
    return True


_YEAR = r"(?:1[89]|20)\d\d"
_DATE = re.compile(rf"\d\d?([./-])\d\d?\1(?:\d\d|{_YEAR})|{_YEAR}([./-])\d\d?\2\d\d?|{_YEAR}(?:[ /-]{_YEAR})+")
_GROUPS = r"\d{2,5}(?:[ .\-/]\d{2,5}){1,4}"
_CHECKS: list[tuple[str, str, Callable[[str], bool]]] = [  # in order: what an earlier one takes is not looked at again
    ("key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", _any),
    ("key", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}", _any),
    ("key", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b", _any),
    ("key", r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{60,}|glpat-[\w-]{20,}|hf_[A-Za-z]{30,})", _any),
    ("key", r"\bxox[abeoprs]-\d[\w-]{16,}", _any),
    ("key", r"\b[srp]k_(?:live|test)_[A-Za-z0-9]{16,}", _any),
    ("key", r"\bAIza[\w-]{35}\b", _any),
    ("key", r"\bsk-[\w-]{20,}", _is_mixed),
    ("email", r"(?<![\w.+%'-])[\w.+%'-]*[\w+-]@(?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,24}\b(?!@)", _any),
    ("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban),
    ("card", r"(?<![\w.,+\-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)", _is_card),
    ("ip_address", r"(?<![\w./-])(?<!ersion )(?<!elease )\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", _is_public),
    ("phone", r"(?<![\w+.\-/])(?:\+|00)[1-9]\d{0,2}[ .\-]?(?:\(0?\d{1,4}\)[ .\-]?)?\d{1,5}(?:[ .\-]?\d{2,5}){1,5}"
     r"(?![\w-]|[.,]\d)", _is_international),
    ("phone", r"(?<![\w+.\-/])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[.-]\d{4}(?![\w-]|[.,]\d)",
     _is_phone),
    ("phone", r"(?<![\w+.\-/])(?:0\d(?: \d\d){4}|\(0\d{2,4}\) ?\d{3,4} ?\d{3,4}|0\d{2,4} \d{3,4} \d{3,4}"
     r"|0\d{2,4}[-/] ?\d{5,8})(?![\w-]|[.,]\d| \d)", _is_phone),
    ("phone", r"(?i:\b(?:phone|telephone|tel|mobile|cell|fax|call|whatsapp|reach me)\b[^\w\n]{0,3}"
     rf"(?:(?:us|me|him|her|them|at|on|is|no|number)\b[^\w\n]{{0,3}}){{0,3}})"
     rf"(?P<value>\(?{_GROUPS}|\d{{7,12}})(?![\w-]|[.,]\d)", _is_called),
]  # fmt: skip
_PATTERNS = [(kind, re.compile(pattern), check) for kind, pattern, check in _CHECKS]
_WORTH = re.compile(r"@|\d[\d .()/\-]{6}|\w{16}|-----BEGIN|eyJ|sk-|xox")  # every match has one of these


def find(text: str) -> list[Match]:
    """Return what looks personal or secret in a text, from left to right, without overlaps."""
    if not _WORTH.search(text):
        return []
    taken: list[Match] = []
    for kind, pattern, is_one in _PATTERNS:
        for found in pattern.finditer(text):
            name = "value" if "value" in pattern.groupindex else 0
            start, end = found.span(name)
            if is_one(text[start:end]) and all(end <= other.start or start >= other.end for other in taken):
                taken.append(Match(kind, start, end))
    return sorted((match for match in taken if not _invented(text, match)), key=lambda match: match.start)


def _invented(text: str, match: Match) -> bool:
    """Tell whether an address belongs to a domain that nobody can have (RFC 2606)."""
    if match.kind != "email":
        return False
    domain = text[match.start : match.end].rsplit("@", 1)[1].lower().split(".")
    return domain[-1] in ("invalid", "test", "localhost", _FAKE) or domain[-2:-1] == [_FAKE]


def redact(text: str) -> str:
    """Return the text with every match replaced by its kind in capitals: [EMAIL], [PHONE], [CARD], [KEY], ..."""
    return "".join(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    end = 0
    for match in find(text):
        yield from (text[end : match.start], f"[{match.kind.upper()}]")
        end = match.end
    yield text[end:]
