"""ROUGE (Lin 2004): how much of a reference's words an answer has, and how much of the answer is in the reference.

    P = matches / words of the answer,  R = matches / words of the reference,  F = 2 P R / (P + R)

ROUGE-N counts n-grams, each at most as often as the other text has it. ROUGE-L counts the longest common subsequence.
ROUGE-Lsum (section 3.2) takes lines as sentences: of each reference sentence the words that are in a longest common
subsequence with any of the answer's sentences, each word at most as often as both texts have it (ROUGE-1.5.5).

Words are runs of a-z and 0-9 in lower case, as ROUGE-1.5.5 and the package rouge-score have them: of other scripts
nothing is left, and the score is 0 for want of words. There is no stemming, which is that package's default.
Where several subsequences are the longest, Lsum depends on which is taken; the order here is the package's.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(NamedTuple):
    """Precision, recall and their harmonic mean, each 0 to 1."""

    precision: float
    recall: float
    f: float


def words(text: str) -> list[str]:
    """Return the runs of a-z and 0-9 of a text in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge_n(answer: str, reference: str, n: int) -> Rouge:
    """Return ROUGE-N of an answer; 0 where either has no n-gram."""
    ours, theirs = (Counter(zip(*(found[i:] for i in range(n)), strict=False)) for found in _pair(answer, reference))
    return _score((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> Rouge:
    """Return ROUGE-L of an answer, taken as one sentence."""
    ours, theirs = _pair(answer, reference)
    return _score(_table(theirs, ours)[-1][-1], len(ours), len(theirs))


def rouge_lsum(answer: str, reference: str) -> Rouge:
    """Return ROUGE-Lsum of an answer whose sentences are its lines."""
    ours, theirs = ([words(line) for line in text.split("\n")] for text in (answer, reference))
    left = Counter(word for line in ours for word in line) & Counter(word for line in theirs for word in line)
    hits = 0
    for line in theirs:
        for place in sorted(set().union(*(_subsequence(line, other) for other in ours))):
            hits += left[line[place]] > 0
            left[line[place]] -= 1
    return _score(hits, sum(map(len, ours)), sum(map(len, theirs)))


def rouge(answer: str, references: Sequence[str]) -> dict[str, Rouge]:
    """Return every kind of ROUGE by name; of several references, each kind takes the one with the highest F."""
    scorers = {
        "rouge1": lambda reference: rouge_n(answer, reference, 1),
        "rouge2": lambda reference: rouge_n(answer, reference, 2),
        "rougeL": lambda reference: rouge_l(answer, reference),
        "rougeLsum": lambda reference: rouge_lsum(answer, reference),
    }
    return {name: max(map(score, references), key=lambda found: found.f) for name, score in scorers.items()}


def _pair(answer: str, reference: str) -> tuple[list[str], list[str]]:
    return words(answer), words(reference)


def _score(matches: int, ours: int, theirs: int) -> Rouge:
    precision, recall = matches / max(ours, 1), matches / max(theirs, 1)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall) if matches else 0.0)


def _table(first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
    """Return t, t[i][j] being the length of the longest common subsequence of first[:i] and second[:j]."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _subsequence(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Return the places in `first` of one longest common subsequence, read from the end, leaving `first` on a tie."""
    table, i, j, places = _table(first, second), len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
