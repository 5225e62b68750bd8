"""What answers say, against what is asked and against each other.

    H = -sum_k p_k log2 p_k          the entropy of labels with shares p_k; log2 K where all K are equally frequent

A source whose answers are few-valued is taken as one of labels: its labels are counted, and what is nearly one of
them is named. An answer that stands in the prompt may be the task itself (extraction, correction, choices), so it is
reported where it follows a mark like "Answer:", where it is long and stands there whole, and as a note where most
rows of one instruction are so.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from minitune.curation.findings import QUOTED, Finding, finding, quoted
from minitune.curation.near_duplicates import near_duplicates, words
from minitune.curation.shapes import shape
from minitune.curation.views import View, by_source
from minitune.data.splits import normalise
from minitune.errors import closest

LABELLED = 20  # rows from which a source may be one of labels
LABEL_WORDS = 5
KNOWN = 0.9  # share of rows that a source's labels must cover
BALANCED = 0.75  # of the greatest entropy; two labels at 79% and 21%
NEARLY = 0.9  # Jaccard similarity of pairs of words of two questions that ask the same
ECHO, QUOTE = 6, 10  # words: of an opening that is repeated, of an answer or question that is found whole
LEAKED, CHANCE = 0.3, 0.05  # share of prompts that name their label alone; of those, as many may name another
MOST = 0.5  # share of an instruction's rows from which copying is the task
_MARK = re.compile(
    r"\b(?:answer|output|label|response|solution|sentiment|class|category|target|expected|result|verdict|rating)"
    r"\s*(?:is|was|:|=|->)(?P<value>[^;\n]*)"
)


def lint_answers(rows: Sequence[Any], found: Sequence[View], groups: Sequence[list[View]]) -> list[Finding]:
    """Return findings on what the answers say; `groups` carry out one instruction each.

    Preference rows give several answers to one prompt by design: contradictions among them are not looked for here.
    """
    findings = _judged(rows)
    labelled = [(source, labels) for source in by_source(found) if (labels := labels_of(source))]
    for source, labels in labelled:
        findings += _spellings(source, labels) + _balance(
            Counter(view.label for view in source if view.label in labels)
        )
    if all(len(view.row.sides) == 1 and not hasattr(view.row, "desirable") for view in found):
        findings += _contradictions(found) + _nearly_contradicting(labelled)
    task = {view for group in groups if _copies(group) for view in group}
    return findings + _echoes(found, task) + _leaks(found, task, labelled)


def labels_of(source: Sequence[View]) -> set[str]:
    """Return the labels that a source's answers are, or an empty set where they are not few and short."""
    counts = Counter(view.label for view in source)
    labels = {label for label, count in counts.items() if count > max(1, len(source) / 100)}
    few = len(source) >= LABELLED and len(labels) <= len(source) / 5
    short = all(len(words(label)) <= LABEL_WORDS for label in labels)
    return labels if few and short and sum(counts[label] for label in labels) >= KNOWN * len(source) else set()


def _judged(rows: Sequence[Any]) -> list[Finding]:
    """Report judged answers that are nearly all good or nearly all bad."""
    counts = Counter("good" if row.desirable else "bad" for row in rows if getattr(row, "desirable", None) is not None)
    return _balance(counts) if counts.total() >= LABELLED else []


def _balance(counts: Counter) -> list[Finding]:
    """Report labels that are far from equally frequent, with what a constant answer would score."""
    total = counts.total()
    label, most = counts.most_common(1)[0]
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    greatest = math.log2(max(len(counts), 2))
    rare = [label for label, n in counts.items() if n < 10 and n < total / len(counts) / 5]
    if entropy >= BALANCED * greatest and not rare:
        return []
    what = f"labels are unequal: {quoted(label)} in {most / total:.0%} of {total:,}, "
    what += f"entropy {entropy:.2f} of {greatest:.2f} bits"
    if rare:
        what += f"; only {counts[rare[0]]} of {quoted(rare[0])}"
    remedy = f"add rows of the others, or compare with always {quoted(label)}: {most / total:.0%} right"
    numbers = {"majority_share": most / total, "entropy": entropy, "greatest_entropy": greatest}
    return [Finding("label_imbalance", "warning", total, (), what, remedy, tuple(numbers.items()))]


def _spellings(source: Sequence[View], labels: set[str]) -> list[Finding]:
    """Report labels that are written in several ways, and answers that are no label."""
    findings = []
    written = {label: Counter(view.answer.strip() for view in source if view.label == label) for label in labels}
    usual = {label: counts.most_common(1)[0][0] for label, counts in written.items()}
    if odd := [view for view in source if view.label in labels and view.answer.strip() != usual[view.label]]:
        what = f"labels written in several ways: {quoted(usual[odd[0].label])} and {quoted(odd[0].answer.strip())}"
        findings.append(finding("label_spelling", "warning", odd, what, "write each label in one way"))
    odd = [view for view in source if view.label not in labels and shape(view.answer) == "a word or number"]
    if odd:
        near = closest(odd[0].label, labels)
        what = f"answers that are no label: {quoted(odd[0].answer)}" + (f", like {quoted(usual[near])}" if near else "")
        findings.append(finding("unknown_label", "warning", odd, what, "correct them, or add rows of that label"))
    return findings


def _contradictions(found: Sequence[View]) -> list[Finding]:
    """Report rows that ask the same and answer otherwise: an error where answers are short, else a note."""
    asked = defaultdict(list)
    for view in found:
        asked[view.asked].append(view)
    several = [rows for rows in asked.values() if len({view.label for view in rows}) > 1]
    short = [rows for rows in several if all(len(words(view.label)) <= LABEL_WORDS for view in rows)]
    findings = []
    for level, kind, parts, remedy in (
        ("error", "contradictory_answers", short, "find out which is right, and remove or correct the other"),
        ("note", "several_answers", [rows for rows in several if rows not in short], "keep them only if all are meant"),
    ):
        if parts:
            one, other = parts[0][0], next(view for view in parts[0] if view.label != parts[0][0].label)
            what = f"the same is asked and answered otherwise: {quoted(one.answer)} in {one.origin}, "
            what += f"{quoted(other.answer)} in {other.origin}"
            findings.append(finding(kind, level, [view for rows in parts for view in rows], what, remedy))
    return findings


def _nearly_contradicting(labelled: Sequence[tuple[list[View], set[str]]]) -> list[Finding]:
    """Report rows that ask nearly the same as another and have another label."""
    pairs = [
        (source[i], source[j])
        for source, _ in labelled
        for i, j, _ in near_duplicates([view.question for view in source], threshold=NEARLY, shingle=2)
        if source[i].label != source[j].label and source[i].asked != source[j].asked
    ]
    if not pairs:
        return []
    later, earlier = pairs[0]
    what = f"nearly the same is asked and labelled otherwise: {quoted(later.answer)} in {later.origin}, "
    what += f"{quoted(earlier.answer)} in {earlier.origin}"
    rows = dict.fromkeys(view for pair in pairs for view in pair)
    return [finding("nearly_contradictory", "warning", rows, what, "read both; correct or remove the wrong one")]


def _copies(group: Sequence[View]) -> bool:
    """Tell whether copying is what an instruction asks for: most of its rows do."""
    return sum(_echo(view) or _quoted(view.answer, view.question) for view in group) > MOST * len(group)


def _echo(view: View) -> bool:
    """Tell whether an answer begins with the question's first words, or holds the whole question."""
    asked, said = words(view.question), words(view.answer)
    opening = len(asked) >= ECHO and asked[:ECHO] == said[:ECHO]
    return opening or asked == said or _quoted(view.question, view.answer)


def _quoted(part: str, whole: str) -> bool:
    """Tell whether a text of at least QUOTE words stands in another."""
    return len(part.split()) >= QUOTE and normalise(part) in normalise(whole)


def _echoes(found: Sequence[View], task: set[View]) -> list[Finding]:
    """Report answers that repeat the prompt."""
    odd = [view for view in found if view not in task and _echo(view)]
    if not odd:
        return []
    what = f"answers that repeat the prompt: {quoted(odd[0].answer)}"
    return [finding("repeats_prompt", "warning", odd, what, "remove what repeats it, unless that is asked for")]


def _leaks(found: Sequence[View], task: set[View], labelled: Sequence[tuple[list[View], set[str]]]) -> list[Finding]:
    """Report prompts that hold their answer: after a mark, whole, or (labels) as the only label that they name."""
    findings = []
    remedy = "take the answer out of the prompt: what is to be found out is read off there"
    if odd := [view for view in found if _marked(view)]:
        what = f"prompts that give their answer: {quoted(odd[0].answer)} in {quoted(odd[0].question[-QUOTED:])}"
        findings.append(finding("leaked_answer", "error", odd, what, remedy))
    if odd := [view for view in found if view not in task and _quoted(view.answer, view.question)]:
        what = f"answers that stand whole in their prompt: {quoted(odd[0].answer)}"
        findings.append(finding("answer_in_prompt", "note", odd, what, "look whether copying is what is asked for"))
    for source, labels in labelled:
        named = {view: {label for label in labels if _names(view.question, label)} for view in source}
        own = [view for view, names in named.items() if names == {view.label}]
        other = sum(len(names) == 1 and names != {view.label} for view, names in named.items())
        if len(labels) > 1 and len(own) >= LEAKED * len(source) and other <= CHANCE * len(own):
            what = (
                f"in {len(own):,} of {len(source):,} prompts the only label named is the answer, as in {own[0].origin}"
            )
            findings.append(finding("leaked_answer", "error", own, what, remedy, share=len(own) / len(source)))
    return findings


def _names(question: str, label: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", normalise(question)) is not None


def _marked(view: View) -> bool:
    """Tell whether the prompt gives the answer after its one mark such as "Answer:"; with several it gives examples."""
    given = [found["value"] for line in view.question.split("\n") for found in _MARK.finditer(normalise(line))]
    return len(given) == 1 and re.sub(r"^\W+|\W+$", "", given[0]) == view.label
