"""chrF (Popovic 2015) and chrF++ (Popovic 2017), as sacrebleu computes them: n-grams of characters, and of words.

    chrF = 100 (1 + b^2) P R / (b^2 P + R),  b = 2;   P, R = means over n of matches / n-grams of the answer, of
                                                      the reference; over the n of which both have n-grams

Characters are counted without white space, n = 1..6; chrF++ adds words of n = 1..2, with punctuation at a word's end
(or else its start) apart. As in BLEU, counts are summed over the corpus. Of several references a row takes the one
whose score for it is highest.
"""

import string
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from minitune.evaluation.bootstrap import Statistics

CHARACTERS, WORDS, BETA = 6, 2, 2


def chrf_statistics(answers: Sequence[str], references: Sequence[Sequence[str]], *, words: int = 0) -> Statistics:
    """Return corpus chrF, 0 to 100, of answers with one or more references each; `words` = 2 is chrF++.

    A row holds (n-grams of the answer, n-grams of the reference, matches) for each order.
    """
    rows = []
    for answer, texts in zip(answers, references, strict=True):
        ours = _ngrams(answer, words)
        found = torch.tensor([_counts(ours, _ngrams(text, words)) for text in texts], dtype=torch.float64)
        scores = chrf_score(found).tolist()
        rows.append(found[scores.index(max(scores))])  # the first of equals
    return Statistics(torch.stack(rows), chrf_score)


chrf_plus_plus_statistics = partial(chrf_statistics, words=WORDS)


def chrf_score(sums: torch.Tensor) -> torch.Tensor:
    """Map sums of counts (..., 3 orders) to chrF (...)."""
    ours, theirs, matches = sums.unflatten(-1, (-1, 3)).unbind(-1)
    both = (ours > 0) & (theirs > 0)
    orders = both.sum(-1).clamp(min=1)
    precision = (matches / ours.clamp(min=1) * both).sum(-1) / orders
    recall = (matches / theirs.clamp(min=1) * both).sum(-1) / orders
    below = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / below.where(below > 0, 1)


def _ngrams(text: str, words: int) -> list[Counter]:
    characters = "".join(text.split())
    found = [Counter(characters[i : i + n] for i in range(len(characters) - n + 1)) for n in range(1, CHARACTERS + 1)]
    parts = [part for word in text.split() for part in _split(word)] if words else []
    return found + [Counter(zip(*(parts[i:] for i in range(n)), strict=False)) for n in range(1, words + 1)]


def _split(word: str) -> list[str]:
    """Cut one punctuation mark off a word's end, or else its start."""
    if len(word) > 1 and word[-1] in string.punctuation:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in string.punctuation:
        return [word[0], word[1:]]
    return [word]


def _counts(ours: list[Counter], theirs: list[Counter]) -> list[int]:
    """Return the three counts of each order; n-grams of an order that the reference lacks are not counted."""
    counts = []
    for mine, other in zip(ours, theirs, strict=True):
        counts += [mine.total() if other else 0, other.total(), (mine & other).total()]
    return counts
