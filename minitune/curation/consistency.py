"""Consistency: what a model would learn as chance, because rows that should be alike in form are not.

A model that sees JSON here and prose there learns to toss a coin. So each check asks what the rows of one source, or
those that carry out one instruction, have in common, and names those that differ. Sources are looked at one by one:
that a file of general chats is unlike the task's is meant. What is said, against what is asked, is in `answers`.

The shares below were set on real data sets, such that what is reported there is worth a look; none is a law.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from minitune.curation.answers import lint_answers
from minitune.curation.findings import Finding, finding, quoted
from minitune.curation.lengths import lint_lengths
from minitune.curation.shapes import STRICT, shape
from minitune.curation.views import GROUP, View, by_instruction, by_source, most_common, views
from minitune.errors import counted

USUAL = 0.6  # share from which a value is what the rows have in common
USUAL_SHAPE = 0.8  # of a whole source, whose instructions may differ
OFTEN = 0.3  # share from which the end of a prompt is a separator, where its characters don't say so
TAIL = 40  # characters in which a stop sequence ends an answer
VARIETY = 5  # system prompts; more are hardly an oversight
SPEAKS = 0.2  # share of answers that say "I" from which a source speaks in the first person

_TEMPLATE = re.compile(
    r"<\|?(?:im_start|im_end|eot_id|end_of_turn|start_of_turn|start_header_id|user|assistant|system|endoftext)\|?>"
    r"|\[/?INST\]|<</?SYS>>|^### (?:Instruction|Response|Input|Human|Assistant)\b"
    r"|^(?:Human|Assistant|USER|ASSISTANT): ",
    re.MULTILINE,
)
_FIELD = re.compile(r"^(?:#+ *)?([A-Z][A-Za-z ]{0,24}):(?=\s|$)", re.MULTILINE)
_SEPARATOR = re.compile(r"[-=]>|##|>>|\||==|---|:")
_EXPLICIT = re.compile(r"[->=#|]{2}")
_STOP = re.compile(
    r"\s*(?:#{2,}|\[?\bEND\]?|\[?\bSTOP\]?|<\|?(?:im_end|endoftext|eot_id|end|eos|end_of_turn)\|?>|</s>|\n)\s*\Z"
)
_CONTROL = re.compile(r"(?:</s>|<\|?(?:im_end|endoftext|eot_id|eos|end_of_turn)\|?>)\s*\Z")
_FIRST = re.compile(r"\b(?:I|I'm|I’m|I'll|I’ll|I've|I’ve|I'd|I’d|my|My|me)\b")
_SELF = re.compile(
    r"\b[Tt]h(?:e|is) (?:(?:AI|virtual|digital|chat) ?)?(?:assistant|chatbot|bot|AI|language model|AI model) "
    r"(?:is|was|can|cannot|can't|will|does|has|would|could|should|recommends?|suggests?|helps?|answers?|apologi[sz]es)\b"
)
_NAME = re.compile(r"\b(?:I am|I'm|I’m|[Mm]y name is) (?!an?\b|the\b|not\b)([A-Z{][\w{}]+)")
_ADDRESSED = re.compile(r"\b(?:you|your|yourself)\b", re.IGNORECASE)
_START = r"(?:^|[.!?]\s+|\n\s*)"
_AS_I = re.compile(_START + r"(?:I|We|My|Our|I'm|I've|I'd|I’m|I’ve)\b")
_AS_THEY = re.compile(
    _START
    + r"(?:He|She|They|His|Her|Their|The (?:author|customer|user|patient|writer|speaker|candidate|applicant|client))\b"
)


def lint(rows: Sequence[Any], tokenizer: Any = None) -> list[Finding]:
    """Return what is inconsistent in rows (records or preference records), the gravest first.

    With a tokenizer lengths are in tokens, else in characters. Rows without question and answer have only lengths.
    """
    found = views(rows)
    groups = [group for source in by_source(found) for group in by_instruction(source)]
    checks = (_formats, _templates, _systems, _separators, _leading, _stops, _person)
    findings = [one for check in checks for one in check(by_source(found))]
    findings += _shapes(by_source(found), groups) + _narrators(groups)
    findings += lint_answers(rows, found, groups) + lint_lengths(rows, tokenizer)
    return sorted(findings, key=lambda one: ("error", "warning", "note").index(one.level))


def _unlike(sources: Sequence[list[View]], of: Callable[[View], Any]) -> tuple[list[View], Any]:
    """Return the rows that differ from what most of their source has in common, and that of the first such source."""
    odd, usual = [], None
    for source in sources:
        value, share = most_common(map(of, source))
        differing = [view for view in source if of(view) != value]
        if differing and len(source) >= GROUP and share >= USUAL:
            usual = value if not odd else usual
            odd += differing
    return odd, usual


def _formats(sources: Sequence[list[View]]) -> list[Finding]:
    """Report prompts that are laid out in other fields than most, and chats beside texts without a chat template."""
    findings = []
    odd, usual = _unlike(sources, lambda view: tuple(dict.fromkeys(_FIELD.findall(view.question))))
    if usual:
        what = f"most prompts are laid out as {', '.join(f'{name}:' for name in usual)}, these are not"
        findings.append(finding("mixed_formats", "warning", odd, what, "lay all prompts out alike"))
    everything = [view for source in sources for view in source]
    if len({view.chat for view in everything}) == 2:
        rare = not most_common(view.chat for view in everything)[0]
        odd = [view for view in everything if view.chat == rare]
        what = (
            "prompts without a chat template beside chats"
            if not rare
            else "chats beside prompts without a chat template"
        )
        findings.append(finding("mixed_formats", "warning", odd, what, "give all rows in one format"))
    return findings


def _templates(sources: Sequence[list[View]]) -> list[Finding]:
    """Report marks of a chat template inside the text of chats, to which a template is applied anyway."""
    marked = {
        view: found[0]
        for source in sources
        for view in source
        if view.chat and (found := _TEMPLATE.search(view.question) or _TEMPLATE.search(view.answer))
    }
    if not marked:
        return []
    what = f"marks of a chat template inside a turn, such as {quoted(next(iter(marked.values())))}"
    remedy = "remove them: the model's own template is applied to every turn"
    return [finding("template_in_text", "warning", marked, what, remedy)]


def _systems(sources: Sequence[list[View]]) -> list[Finding]:
    """Report system prompts that differ within a source; where each row has its own they are meant to."""
    findings = []
    for source in sources:
        counts = Counter(view.system.strip() for view in source)
        usual, most = counts.most_common(1)[0]
        if len(counts) < 2 or len(source) < GROUP or len(counts) > len(source) / 2:
            continue
        odd = [view for view in source if view.system.strip() != usual]
        main = quoted(usual) if usual else "none"
        other = odd[0].system.strip()
        what = (
            f"{len(counts)} system prompts: {main} in {most}, {quoted(other) if other else 'none'} in {counts[other]}"
        )
        level = "warning" if len(counts) <= VARIETY else "note"
        remedy = "use one system prompt, the one that will be used later, unless the difference is to be learned"
        findings.append(finding("mixed_system_prompts", level, odd, what, remedy, share=most / len(source)))
    return findings


def _separators(sources: Sequence[list[View]]) -> list[Finding]:
    """Report prompts that end otherwise than most, where ends are separators."""
    findings = []
    for source in sources:
        endings = [_ending(view) for view in source]
        counts = Counter(endings)
        telling = [end for end, n in counts.items() if end and (n >= OFTEN * len(source) or _EXPLICIT.search(end))]
        if not telling or len(counts) < 2 or len(source) < GROUP:
            continue
        usual, most = counts.most_common(1)[0]
        if not usual:  # ":" may end a question; arrows and the like don't
            odd = [view for view, end in zip(source, endings, strict=True) if end in telling and _EXPLICIT.search(end)]
        else:
            odd = [view for view, end in zip(source, endings, strict=True) if end != usual]
        if odd:
            end = quoted(usual) if usual else "no separator"
            what = f"most prompts end in {end} ({most}), these not: {quoted(_ending(odd[0]))}"
            remedy = "end every prompt alike, as it will be when the model is used"
            findings.append(finding("mixed_separators", "warning", odd, what, remedy, share=most / len(source)))
    return findings


def _ending(view: View) -> str:
    """Return what a prompt ends in; white space counts where no template follows it."""
    end = view.question[len(view.question.rstrip(" \t\r\n-=>#|:")) :]
    if end.strip() and not _SEPARATOR.search(end):
        end = ""
    return end.strip() if view.chat else end


def _leading(sources: Sequence[list[View]]) -> list[Finding]:
    """Report answers with other white space before them than most."""
    odd, usual = _unlike(sources, lambda view: view.answer[: len(view.answer) - len(view.answer.lstrip())])
    if not odd:
        return []
    begin = f"most answers begin with {usual!r}" if usual else "most answers begin without white space"
    remedy = "begin every answer alike: it is another token"
    return [finding("mixed_leading_space", "warning", odd, f"{begin}, these otherwise", remedy)]


def _stops(sources: Sequence[list[View]]) -> list[Finding]:
    """Report answers that end in another stop sequence than most, and end-of-turn tokens written as text."""
    findings = []
    odd, usual = _unlike(sources, lambda view: found[0] if (found := _STOP.search(view.answer[-TAIL:])) else "")
    if odd:
        end = f"most answers end in {usual!r}" if usual else "most answers end without a stop sequence"
        example = quoted(odd[0].answer[-12:])
        remedy = "end every answer alike; the end-of-turn token is added to each"
        findings.append(finding("mixed_stop_sequences", "warning", odd, f"{end}, these otherwise ({example})", remedy))
    written = [view for source in sources for view in source if _CONTROL.search(view.answer[-TAIL:])]
    if written:
        what = f"an end-of-text token written as text, such as {quoted(_CONTROL.search(written[0].answer)[0])}"
        remedy = "remove it: it would be learned as letters, and the real token is added anyway"
        findings.append(finding("stop_token_in_text", "warning", written, what, remedy))
    return findings


def _person(sources: Sequence[list[View]]) -> list[Finding]:
    """Report answers that speak of the assistant as of another where the source says "I"."""
    odd = []
    for source in sources:
        speaks = [view for view in source if _FIRST.search(view.answer)]
        if len(source) < GROUP or len(speaks) < SPEAKS * len(source):
            continue
        names = Counter(name for view in speaks for name in _NAME.findall(view.answer))
        own = [re.escape(name) for name, count in names.items() if count >= max(3, SPEAKS * len(speaks))]
        third = re.compile(
            rf"{_SELF.pattern}|(?:^|[.!?]\s+)(?:{'|'.join(own) or '(?!)'}) (?:is|was|can|will|has|does)\b"
        )
        speaks_of = [view for view in source if third.search(view.answer) and not _FIRST.search(view.answer)]
        odd += [view for view in speaks_of if _ADDRESSED.search(view.question)]
    if not odd:
        return []
    what = f'most speak as "I", these of the assistant as of another: {quoted(odd[0].answer)}'
    return [finding("mixed_person", "warning", odd, what, "let all answers speak in one person")]


def _narrators(groups: Sequence[list[View]]) -> list[Finding]:
    """Report answers to one instruction of which most are told in one person and these in the other."""
    odd, usual = [], ""
    for group in groups:
        persons = {view: _told_by(view.answer) for view in group}
        told = [person for person in persons.values() if person]
        if len(told) < max(GROUP, USUAL * len(group)):
            continue
        most, share = most_common(told)
        if USUAL <= share < 1:
            usual = usual or most
            odd += [view for view, person in persons.items() if person and person != most]
    if not odd:
        return []
    what = f"most answers to one instruction are in the {usual} person, these are not: {quoted(odd[0].answer)}"
    return [finding("mixed_person", "warning", odd, what, "let all answers to it speak in one person")]


def _told_by(answer: str) -> str | None:
    """Return "first" or "third" for a text whose sentences begin so, None where neither or both."""
    first, third = bool(_AS_I.search(answer)), bool(_AS_THEY.search(answer))
    return None if first == third else "first" if first else "third"


def _shapes(sources: Sequence[list[View]], groups: Sequence[list[View]]) -> list[Finding]:
    """Report answers of another shape than others to the same instruction, or than nearly all of their source."""
    odd: dict[View, str] = {}
    for group, least in [*((source, USUAL_SHAPE) for source in sources), *((group, 0.0) for group in groups)]:
        shapes = {view: shape(view.answer) for view in group}
        usual, share = most_common(shapes.values())
        strict = {name for name in shapes.values() if name in STRICT}
        if len(group) < GROUP or share < least or not strict or (least and usual not in STRICT):
            continue
        for view, name in shapes.items():
            if name != usual and (usual in STRICT or name in STRICT):
                odd.setdefault(view, f"{usual} ({share:.0%}), these are {name}")
    if not odd:
        return []
    kinds = Counter(odd.values())
    text, count = kinds.most_common(1)[0]
    what = f"answers to one instruction are {text}" + (
        f", and {counted(len(odd) - count, 'other')}" if len(kinds) > 1 else ""
    )
    return [finding("mixed_answer_shapes", "warning", odd, what, "write all answers to one instruction in one shape")]
