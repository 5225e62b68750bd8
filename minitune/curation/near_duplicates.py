"""Texts that are nearly the same: MinHash over word shingles, banded, and each candidate checked exactly.

    J(A, B) = |A n B| / |A u B|              A, B: the sets of a text's runs of `shingle` words
    P(min h(A) = min h(B)) = J               for a random order h of all shingles (Broder 1997)
    P(candidate) = 1 - (1 - J^r)^b           b bands of r values, candidates agree on a whole one (Indyk & Motwani 1998)

Only J itself, computed from the sets, decides, so no pair is reported wrongly; r is the largest that finds a pair at
the threshold with a probability above 0.999. Words are \\w runs without case. In scripts that put no spaces between
words (Chinese, Japanese, Thai, ...) each character counts as a word.

One changed word of n costs 2 x shingle of the n + 1 shingles both texts have together: at 0.8, shingles of 3 words
see one changed word in texts from 29 words on, shingles of 5 from 49 on.

Rows made from one template have its words in common and are no duplicates. Shingles that more than a tenth of all texts
have (and at least 20 texts) are therefore not counted. Two packages were tried on 5,000 rows of 100 words: datasketch
takes 2.6 times as long as this, rensa a quarter (CPU, one core). Neither was taken: what they propose would have to be
checked by sets all the same, they know nothing of templates, and 100,000 such rows take this 14 seconds.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from minitune.errors import ConfigError, check_counts

HASHES = 128  # 32-bit values of a signature
MISSED = 0.001  # chance of missing a pair exactly at the threshold
COMMON, COMMON_TEXTS = 0.1, 20  # a shingle that more texts have is a template's
WINDOW = 64  # texts of a bucket that each of its texts is compared with; a larger bucket's first besides
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_BLOCK = 1 << 16  # shingles hashed at a time: they stay in the cache
_ODD = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Return the words of a text without case, single characters of scripts without spaces; if none, all characters."""
    return _WORD.findall(text.casefold()) or list("".join(text.split()))


def bands(threshold: float) -> tuple[int, int]:
    """Return (bands, values of a band) for HASHES values: the most selective that misses fewer than MISSED."""
    fitting = (r for r in range(HASHES, 1, -1) if (1 - threshold**r) ** (HASHES // r) < MISSED)
    r = next(fitting, 1)
    return HASHES // r, r


def near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.8, shingle: int = 3, groups: Sequence[int] | None = None
) -> list[tuple[int, int, float]]:
    """Return (i, j, J) with j < i for the pairs of texts whose Jaccard similarity is at least `threshold`, in order.

    With `groups`, one number for each text, only pairs of different groups. Of more than WINDOW texts that are all
    alike not every pair is returned, but each has one with an earlier text, and with one of every other group. Texts
    without any character have none.
    Raises ConfigError for a threshold outside (0, 1] or a shingle below 1.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold is {threshold}; it must be above 0 and at most 1")
    check_counts(shingle=shingle)
    rows, starts = _shingles(texts, shingle)
    filled = np.flatnonzero(np.diff(starts))  # a text of no character has no shingle
    signatures = _signatures(rows, starts, filled)
    owner = None if groups is None else np.asarray(groups)
    candidates = _candidates(signatures, filled, threshold, owner)
    sets: dict[int, frozenset[int]] = {}

    def of(row: int) -> frozenset[int]:
        if row not in sets:
            sets[row] = frozenset(rows[starts[row] : starts[row + 1]].tolist())
        return sets[row]

    found = []
    for i, j in candidates:
        shared = len(of(i) & of(j))
        similarity = shared / (len(of(i)) + len(of(j)) - shared)
        if similarity >= threshold:
            found.append((i, j, similarity))
    return found


def _shingles(texts: Sequence[str], shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all texts' shingles, text after text, and where each text's begin (one more than texts).

    A text of fewer words is one shingle. Each word has a random 64-bit value by its place in order of appearance.
    """
    known: dict[str, int] = {}
    ids, lengths = [], []
    for text in texts:
        found = words(text)
        lengths.append(len(found))
        ids += [known.setdefault(word, len(known)) for word in found]
    values = np.random.default_rng(0).integers(0, 2**64, len(known) + 1, dtype=np.uint64)
    tokens = values[np.array(ids, dtype=np.int64)]
    sizes = np.array(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    counts = np.minimum(sizes, np.maximum(sizes - shingle + 1, 1))
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    owner = np.repeat(np.arange(len(texts)), counts)
    place = (ends - sizes)[owner] + np.arange(len(owner)) - starts[owner]  # of each shingle's first word
    hashes = np.zeros(len(owner), dtype=np.uint64)
    for step in range(shingle):
        at = place + step
        word = np.where(at < ends[owner], tokens[np.minimum(at, len(tokens) - 1)], _ODD)
        hashes = _mixed(hashes * _ODD + word)
    return _without_common(hashes, owner, starts, len(texts))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return 64-bit values scrambled one to one (the finaliser of Steele et al. 2014, SplitMix)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _without_common(
    hashes: np.ndarray, owner: np.ndarray, starts: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out repeated shingles of a text and those of a template; a text of nothing else keeps them."""
    order = np.argsort(hashes, kind="stable")  # by shingle, then by text
    value, text = hashes[order], owner[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (value[1:] != value[:-1]) | (text[1:] != text[:-1])  # of the shingle in this text
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = value[1:] != value[:-1]
    kind = np.cumsum(begins) - 1
    texts_with = np.bincount(kind[first], minlength=1)
    rare = texts_with[kind] <= max(COMMON_TEXTS, COMMON * count)
    keep = np.zeros(len(order), dtype=bool)
    keep[order] = first & rare
    kept = np.bincount(owner[keep], minlength=count)
    unique = np.zeros(len(order), dtype=bool)
    unique[order] = first
    keep |= unique & (kept == 0)[owner]
    return hashes[keep], np.concatenate([[0], np.cumsum(np.bincount(owner[keep], minlength=count))])


def _signatures(rows: np.ndarray, starts: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Return the signatures (HASHES, texts with shingles) as uint32: least values under HASHES orders.

    An order is x -> (x ^ b) a mod 2^32 with odd a, on the shingles' hashes, which are random already.
    """
    draw = np.random.default_rng(1)
    a = draw.integers(0, 2**31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    b = draw.integers(0, 2**32, HASHES, dtype=np.uint32)
    low, begins = rows.astype(np.uint32), starts[filled]
    signatures = np.empty((HASHES, len(filled)), dtype=np.uint32)
    first = 0
    while first < len(filled):
        last = max(int(np.searchsorted(begins, begins[first] + _BLOCK)), first + 1)
        end = begins[last] if last < len(filled) else len(low)
        block, offsets = low[begins[first] : end], begins[first:last] - begins[first]
        for number in range(HASHES):
            signatures[number, first:last] = np.minimum.reduceat((block ^ b[number]) * a[number], offsets)
        first = last
    return signatures


def _candidates(
    signatures: np.ndarray, filled: np.ndarray, threshold: float, owner: np.ndarray | None
) -> Iterator[tuple[int, int]]:
    """Yield the pairs (i, j), j < i, in order, that share a band and whose signatures agree nearly often enough."""
    count, r = bands(threshold)
    slack = 4 * np.sqrt(threshold * (1 - threshold) / HASHES)  # four standard deviations of the estimate
    pairs = np.empty(0, dtype=np.int64)
    for band in range(count):
        key = np.zeros(len(filled), dtype=np.uint64)
        for values in signatures[band * r : (band + 1) * r]:
            key = _mixed(key * _ODD + values)
        later, earlier = _bucket_pairs(key, None if owner is None else owner[filled])
        if owner is not None:
            apart = owner[filled[later]] != owner[filled[earlier]]
            later, earlier = later[apart], earlier[apart]
        pairs = np.union1d(pairs, later * len(filled) + earlier)
    for start in range(0, len(pairs), _BLOCK):
        later, earlier = np.divmod(pairs[start : start + _BLOCK], len(filled))
        agreement = (signatures[:, later] == signatures[:, earlier]).mean(0)
        close = agreement >= threshold - slack
        yield from zip(filled[later[close]].tolist(), filled[earlier[close]].tolist(), strict=True)


def _bucket_pairs(key: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the places (later, earlier) with equal key, at most WINDOW apart in their bucket or one its first.

    With groups, of which places are in order, each place also comes with the first one of every group in its bucket.
    """
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)])
    sizes = np.diff(np.append(begins, len(order)))
    first = np.repeat(begins, sizes)  # of each place's bucket
    later, earlier = [], []
    for step in range(1, min(WINDOW, int(sizes.max(initial=1)) - 1) + 1):
        places = np.flatnonzero(np.arange(len(order)) - step >= first)
        later.append(places)
        earlier.append(places - step)
    far = np.flatnonzero(np.arange(len(order)) - WINDOW > first)
    later.append(far)
    earlier.append(first[far])
    for number in () if group is None else np.unique(group):
        head = np.full(len(order), len(order))  # of this group, by its bucket's first place; len(order): none
        own = np.flatnonzero(group[order] == number)
        np.minimum.at(head, first[own], own)
        places, heads = np.arange(len(order)), head[first]
        apart = (heads < len(order)) & (np.abs(places - heads) > WINDOW)
        later.append(np.maximum(places, heads)[apart])
        earlier.append(np.minimum(places, heads)[apart])
    later, earlier = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (later, earlier))
    return order[later], order[earlier]
