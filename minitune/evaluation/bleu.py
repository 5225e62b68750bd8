"""BLEU (Papineni et al. 2002), as sacrebleu computes it (Post 2018): tokenizer 13a, case kept, smoothing exp.

    BLEU = 100 BP exp(1/4 sum_n log p_n),  p_n = matching n-grams / n-grams of the answers, n = 1..4
    BP   = 1 where the answers are longer than the references, else exp(1 - r / c)

A match counts at most as often as the reference that has it most often has it. c and r are the words of the answers
and of the references, of several the one nearest in length. Counts are summed over the corpus before they are
divided; the mean of sentences' scores is another number, and a noisier one. Smoothing "exp" (Lin & Och 2004, NIST)
takes for the k-th order without a match p_n = 1 / (2^k n-grams). A sentence's score uses only orders it has n-grams of.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch

from minitune.evaluation.bootstrap import Statistics

ORDER = 4
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# mteval-v13a: symbols stand alone; period and comma do unless between digits; a dash does after a digit.
_SPLITS = (
    (re.compile(r"([\x20-\x26\x28-\x2b\x3a-\x40\x5b-\x60\x7b-\x7e/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenize_13a(text: str) -> list[str]:
    """Return the words of a text as NIST's mteval-v13a splits them."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, character in _ENTITIES:
        text = text.replace(name, character)
    text = f" {text} "
    for pattern, spaced in _SPLITS:
        text = pattern.sub(spaced, text)
    return text.split()


def bleu_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Return corpus BLEU, 0 to 100, of answers with one or more references each.

    A row holds (c, r, matches of 1 to 4 words, n-grams of 1 to 4 words).
    """
    rows = [_counts(answer, texts) for answer, texts in zip(answers, references, strict=True)]
    return Statistics(torch.tensor(rows, dtype=torch.float64), bleu_score)


def sentence_bleu(answer: str, references: Sequence[str]) -> float:
    """Return the BLEU of one answer, 0 to 100, over the orders that it is long enough for."""
    return bleu_score(torch.tensor(_counts(answer, references), dtype=torch.float64), effective=True).item()


def bleu_score(sums: torch.Tensor, *, effective: bool = False) -> torch.Tensor:
    """Map sums of counts (..., 10) to BLEU (...); 0 where nothing matches.

    `effective` leaves out the orders without n-grams; else BLEU is 0 where there is one.
    """
    ours, theirs, matches, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    missed = (matches == 0) & (total > 0)
    smooth = 2.0 ** -missed.cumsum(-1)
    precision = torch.where(missed, smooth, matches) / total.clamp(min=1)
    there = total > 0
    logs = torch.where(there, precision.clamp(min=1e-300).log(), 0.0).sum(-1)
    orders = there.sum(-1)
    score = 100 * (1 - theirs / ours.clamp(min=1)).clamp(max=0).exp() * (logs / orders.clamp(min=1)).exp()
    whole = (orders > 0) if effective else (orders == ORDER)
    return torch.where(whole & (matches.sum(-1) > 0), score, 0.0)


def _counts(answer: str, references: Sequence[str]) -> list[int]:
    words, others = tokenize_13a(answer), [tokenize_13a(text) for text in references]
    length = min((len(other) for other in others), key=lambda size: (abs(size - len(words)), size))
    matches, total = [], []
    for n in range(1, ORDER + 1):
        ours, most = _ngrams(words, n), Counter()
        for other in others:
            most |= _ngrams(other, n)
        matches.append((ours & most).total())
        total.append(ours.total())
    return [len(words), length, *matches, *total]


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
