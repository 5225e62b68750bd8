"""Cleaning: what is wrong with rows one by one, and which say the same; repaired or removed on request, never silently.

Everything is looked for and reported; rows change or go only where `CleaningOptions` asks for it by the finding's
name, and each that does is returned with the reason. Repairs come first, so that what was broken in two ways and is
the same once repaired counts as a duplicate. Of duplicates the first stays. A near duplicate goes only where a row
that stays is near it, so of a chain (A like B, B like C, C not like A) both ends stay. Rows that answer or judge
otherwise are no duplicates, however alike the rest: to keep the first of a contradiction would be to decide it.
Cleaning by default was rejected: every rule here is wrong for some data set.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, Literal

from minitune.curation.faults import FAULTS
from minitune.curation.findings import Finding, answers_of, finding, quoted, texts_of, with_texts
from minitune.curation.near_duplicates import near_duplicates, words
from minitune.data.splits import duplicates, normalise, row_key
from minitune.errors import ConfigError

Removable = Literal[
    "mojibake", "replacement_character", "markup", "tracking", "control_character", "boilerplate", "code_fence",
    "personal_data", "trivial", "exact_duplicate", "near_duplicate",
]  # fmt: skip
Repairable = Literal["mojibake", "markup", "tracking", "control_character", "personal_data"]
_PLACEHOLDER = re.compile(
    r"\W*(?:n\.?/?a\.?|nan|nil|null|none|todo|tbd|undefined|no ?(?:answer|output|input|response)|"
    r"(?:your |insert )?(?:answer|text|response|output) here)\W*",
    re.IGNORECASE | re.DOTALL,
)
_SHORT, _ALIKE = 5, 0.5  # words of an answer that has to be the same; share of words that longer ones have in common
_LABEL_SHARE = 0.05  # where answers are few, one that so many rows have is a label, whatever it looks like


@dataclass(frozen=True)
class CleaningOptions:
    """What to do about what is found; the default reports all of it and changes nothing."""

    repair: tuple[Repairable, ...] = ()
    """Findings to repair: mojibake, markup, tracking, control_character, personal_data (writes [EMAIL] and so on)."""
    remove: tuple[Removable, ...] = ()
    """Findings whose rows are left out; of duplicates the first row stays."""
    unicode: Literal["keep", "NFC", "NFKC"] = "keep"
    """Write characters in one way: NFC joins letters and accents; NFKC also replaces ligatures, wide forms, ½, ²."""
    threshold: float = 0.8
    """Rows whose sets of shingles are at least so similar (Jaccard) are near duplicates."""
    shingle: int = 3
    """Words of a shingle."""

    def __post_init__(self):
        """Refuse what would have no effect."""
        if both := sorted(set(self.repair) & set(self.remove)):
            raise ConfigError(f"clean: {both[0]} is both repaired and removed; choose one")
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"clean: threshold is {self.threshold}; it must be above 0 and at most 1")
        if self.shingle < 1:
            raise ConfigError(f"clean: shingle is {self.shingle}; it must be at least 1")


@dataclass
class Cleaned:
    """What became of rows: those kept, in order and repaired, those removed and those changed with why.

    `near` holds (row, earlier row, Jaccard similarity) of the near duplicates.
    """

    kept: list[Any] = field(default_factory=list)
    removed: list[tuple[Any, str]] = field(default_factory=list)
    changed: list[tuple[Any, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    near: list[tuple[Any, Any, float]] = field(default_factory=list)


def clean(records: Sequence[Any], options: CleaningOptions | None = None) -> Cleaned:
    """Return the rows (records or preference records) as `options` want them, and what was found in all of them."""
    options = options or CleaningOptions()
    done = Cleaned(kept=list(records))
    for kind, fault in FAULTS.items():
        found = [(row, example) for row in done.kept if (example := fault.search(row))]
        if found:
            first = f"{fault.what}, such as {quoted(found[0][1])}"
            _settle(done, kind, [row for row, _ in found], first, fault.remedy, options, fault.repair, fault.level)
    _unicode(done, options)
    if trivial := _trivial(done.kept):
        example = quoted(min((text for text in texts_of(trivial[0])), key=len))
        _settle(done, "trivial", trivial, f"placeholders or punctuation in place of a text, such as {example}",
                "write the text or remove the rows", options)  # fmt: skip
    _duplicates(done, options)
    return done


def _settle(
    done: Cleaned,
    kind: str,
    rows: list[Any],
    what: str,
    remedy: str,
    options: CleaningOptions,
    repair: Callable[[str], str] | None = None,
    level: Any = "warning",
) -> None:
    """Report rows of a kind, and repair or remove them where that is asked for."""
    ids = {id(row) for row in rows}
    if kind in options.remove:
        done.removed += [(row, kind) for row in rows]
        done.kept = [row for row in done.kept if id(row) not in ids]
        what, remedy = f"{what}: removed", "nothing: the rows are left out"
    elif kind in options.repair:
        _change(done, ids, kind, repair)
        what, remedy = f"{what}: repaired", "look at some of them"
    done.findings.append(finding(kind, level, rows, what, remedy))


def _change(done: Cleaned, ids: set[int], what: str, change: Callable[[str], str]) -> None:
    """Change the rows with these ids; one whose question or answer is empty then is removed."""
    kept = []
    for row in done.kept:
        if id(row) in ids:
            changed = with_texts(row, change)
            before, after = texts_of(row), texts_of(changed)
            if any(old.strip() and not new.strip() for old, new in zip(before, after, strict=True)):
                done.removed.append((row, f"{what}: nothing else in one of its texts"))
                continue
            if after != before:
                done.changed.append((changed, what))
            row = changed
        kept.append(row)
    done.kept = kept


def _unicode(done: Cleaned, options: CleaningOptions) -> None:
    """Report rows that normalisation would change, and change them where it is asked for."""
    form = "NFC" if options.unicode == "keep" else options.unicode
    rows = [row for row in done.kept if not all(unicodedata.is_normalized(form, text) for text in texts_of(row))]
    if not rows:
        return
    text = next(text for text in texts_of(rows[0]) if not unicodedata.is_normalized(form, text))
    place = len(commonprefix([text, unicodedata.normalize(form, text)]))
    what = f"characters that {form} writes otherwise, such as {ascii(text[place : place + 2])}"
    remedy = f"choose unicode {form}, so that equal texts are equal tokens"
    if options.unicode != "keep":
        _change(done, {id(row) for row in rows}, form, lambda text: unicodedata.normalize(form, text))
        what, remedy = f"{what}: changed", "look at some of them"
    done.findings.append(finding("unicode", "note", rows, what, remedy))


def _trivial(rows: Sequence[Any]) -> list[Any]:
    """Return the rows with a text of punctuation alone, or with a placeholder for an answer."""
    counts = Counter(answer for row in rows for answer in answers_of(row))
    few = len(counts) <= len(rows) / 5
    labels = {answer for answer, count in counts.items() if few and count > _LABEL_SHARE * len(rows)}

    def is_trivial(row: Any) -> bool:
        answers = [answer for answer in answers_of(row) if answer not in labels]
        said = [text for text in texts_of(row) if text.strip() and text not in labels]
        return any(map(_PLACEHOLDER.fullmatch, answers)) or not all(map(_has_content, said))

    return [row for row in rows if is_trivial(row)]


def _has_content(text: str) -> bool:
    """Tell whether a text has a letter, a digit, a sign such as + or an emoji."""
    return any(
        unicodedata.category(char)[0] in "LN" or unicodedata.category(char) in ("Sm", "Sc", "So") for char in text
    )


def _duplicates(done: Cleaned, options: CleaningOptions) -> None:
    """Report rows that repeat an earlier one, exactly (as `data.splits.row_key` has it) or nearly."""
    rows = done.kept
    exact = duplicates((row_key(row), getattr(row, "desirable", None)) for row in rows)
    if exact:
        i, j = exact[0]
        what = f"rows that repeat an earlier one up to case and white space, first {rows[i].origin} = {rows[j].origin}"
        _settle(done, "exact_duplicate", [rows[i] for i, _ in exact], what, "remove them", options)
    repeated = {i for i, _ in exact}
    rows = [row for i, row in enumerate(rows) if i not in repeated]
    pairs = near_duplicates(
        ["\n".join(compared(row)) for row in rows], threshold=options.threshold, shingle=options.shingle
    )
    gone: set[int] = set()
    for i, j, similarity in pairs:  # in order of i: whether j stays is settled when i comes
        if i not in gone and j not in gone and _answer_alike(rows[i], rows[j]):
            gone.add(i)
            done.near.append((rows[i], rows[j], similarity))
    if done.near:
        later, earlier, similarity = max(done.near, key=lambda pair: pair[2])
        what = f"rows nearly the same as an earlier one, first {later.origin} = {earlier.origin} ({similarity:.0%})"
        remedy = "remove them, if the difference does not matter"
        _settle(done, "near_duplicate", [later for later, *_ in done.near], what, remedy, options)


def _answer_alike(row: Any, other: Any) -> bool:
    """Tell whether the last answers say the same: short ones exactly, long ones by half their words; of pairs both."""
    if getattr(row, "desirable", None) != getattr(other, "desirable", None):
        return False
    for side, beside in zip(row.sides, other.sides, strict=False):
        answer, against = (normalise(answers_of(one)[-1]).strip(" .,;:!?'\"") for one in (side, beside))
        said, heard = set(words(answer)), set(words(against))
        short = min(len(said), len(heard)) <= _SHORT
        if answer != against and (short or len(said & heard) < _ALIKE * len(said | heard)):
            return False
    return True


def compared(row: Any) -> list[str]:
    """Return the texts by which rows are compared: all but the system's, which rows have in common."""
    texts = []
    for side in row.sides:
        if side.messages is not None:
            texts += [turn["content"] for turn in side.messages if turn["role"] != "system"]
        else:
            texts += texts_of(side)
    return texts
