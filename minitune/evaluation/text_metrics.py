"""Metrics of answers that need no words in common: exact match, variety, repetition, and pass@k.

None of these says that an answer is good. They show what averages hide: answers that never vary, that loop, or that
are right once in many tries.
"""

import math
from collections.abc import Sequence

from minitune.errors import ConfigError, DataError


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Say whether an answer is one of the references but for white space around it. An empty answer never is."""
    return bool(answer.strip()) and answer.strip() in [text.strip() for text in references]


def distinct_n(answers: Sequence[str], n: int) -> float:
    """Return the share of different n-grams among all of a model's answers (Li et al. 2016); words end at white space.

    It falls as answers grow in number and length, so only sets alike in both compare. There is no bootstrap interval:
    a resample repeats answers, and so has less variety than any sample of new ones. 0 where no answer has n words.
    """
    found = [gram for answer in answers for gram in _grams(answer, n)]
    return len(set(found)) / max(len(found), 1)


def repetition(answer: str, n: int = 4) -> float:
    """Return the share of an answer's n-grams that repeat an earlier one: 1 - different / all (Welleck et al. 2020).

    0 for an answer of fewer than n words.
    """
    found = _grams(answer, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that one of k answers is right, from `right` of `samples` (Chen et al. 2021, equation 1).

        pass@k = 1 - C(n - c, k) / C(n, k)

    It is unbiased: the mean over all ways to choose k of the n. Rejected: 1 - (1 - c/n)^k, which is too low.
    Averaged over problems by `bootstrap.mean_of`. Raises ConfigError for k outside 1 to n, DataError for c outside 0 to
    n.
    """
    if not 1 <= k <= samples:
        raise ConfigError(f"k is {k}; it must be 1 to the {samples} samples of a problem")
    if not 0 <= right <= samples:
        raise DataError(f"{right} of {samples} samples are right; count each sample once")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ConfigError(f"n is {n}; an n-gram has at least 1 word")
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))
