"""Rows that a model would be tested on after it was trained on them: the same, nearly the same, or sharing a passage.

Three questions, each asked of every row of a split against every split that is kept further from training (train <
validation < test < golden set < evaluation sets; of the last only what is trained on or chosen by, train and
validation, is asked). The first that is answered yes is the leak:

- exact: does it ask the same (`data.splits.question_key`), or is its whole text the same without case and spacing?
- near: is the Jaccard similarity of the word shingles of both texts at least the threshold (`near_duplicates`)?
- n-gram: do they share 13 words in a row (Brown et al. 2020, appendix C)? Of a held-out text of 8 to 12 words, all of
  them; one that is shorter is asked the first two questions only, for its words are anybody's. Of a long text a single
  passage is a phrase ("I hope this helps, let me know if you have any further questions"): at least a twentieth of its
  n-grams must be shared, or more than 13 of them, which are 26 words in a row.

Passages that stand in more than ten rows of a split are the prompt's template or a set phrase and are not counted; a
row that is copied as often is found by the first two questions. A text is all that a row says but its system prompt.
Comparing embeddings was rejected: it needs a model, and a threshold that means another thing for each.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minitune.curation.cleaning import compared
from minitune.curation.near_duplicates import near_duplicates, words
from minitune.data.reading import SUFFIXES, RowError, data_path, read_rows
from minitune.data.splits import normalise, question_key
from minitune.errors import DataError

GRAM, SHORTEST = 13, 8  # words
COMMON = 10  # rows of a split
SHARE = 0.05  # of the held-out text's n-grams
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Probe:
    """What is compared of a row: where it stands, its text, and the normalised texts by which it is the same."""

    origin: str
    text: str
    keys: frozenset[str]


@dataclass(frozen=True)
class Leak:
    """A row of one split that stands in another, which is kept further from training.

    `share` is 1 for an exact leak, the Jaccard similarity of a near one, and the share of the held-out row's n-grams
    that both have; `passage` is the first of those, as words without case.
    """

    kind: Literal["exact", "near", "n-gram"]
    split: str
    row: str
    held_split: str
    held_row: str
    share: float
    passage: str = ""


def probe(record: Any) -> Probe:
    """Return what is compared of a record or preference record, as cleaning does; of a pair, both sides."""
    text = "\n".join(compared(record))
    return Probe(record.origin, text, frozenset((question_key(record), normalise(text))))


def set_files(name: str) -> list[Path]:
    """Return the data files of an evaluation set: the one that it names, or all in a folder."""
    path = data_path(name)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{name}: no data file in this folder; name one ({', '.join(SUFFIXES)})")
    return files


def probes_of_set(files: Sequence[Path]) -> tuple[list[Probe], int]:
    """Return what is compared of an evaluation set, and how many of its rows cannot be read.

    Every text of a row counts, whatever its field is called. A text of one or two words (a label, a choice) is not
    taken for the row's question. A text file is one row for each line. Raises DataError for a file that cannot be read,
    or none of whose rows can.
    """
    probes, broken = [], 0
    for path in files:
        found = list(read_rows(path))
        rows = [(origin, fields) for origin, fields in found if not isinstance(fields, RowError)]
        broken += len(found) - len(rows)
        if not rows:
            raise DataError(f"{path}: no row that can be read; correct it, or name another evaluation set")
        if path.suffix.lower() == ".txt":
            lines = enumerate(rows[0][1]["text"].split("\n"), 1)
            rows = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        probes += [_of_texts(origin, list(_texts(fields))) for origin, fields in rows]
    return probes, broken


def _of_texts(origin: str, texts: list[str]) -> Probe:
    whole = "\n".join(texts)
    return Probe(origin, whole, frozenset(normalise(t) for t in (*texts, whole) if len(t.split()) > 2))


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts anywhere in a JSON value, but for those of the system and the names of roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if value.get("role", value.get("from")) != "system":
            yield from _texts([inner for name, inner in value.items() if name not in ("role", "from", "source")])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def find_leaks(
    splits: Sequence[tuple[str, Sequence[Probe]]], *, threshold: float = 0.8, shingle: int = 3, outer: int = 0
) -> list[Leak]:
    """Return the leaks of each split into those after it; the last `outer` are not compared with each other.

    A row has at most one leak into each other split, the strongest kind; the order is that of the splits and rows.
    """
    found: dict[tuple[int, int, int], Leak] = {}  # (split, row, held split)
    for kind, leaks in _each_kind(splits, threshold, shingle):
        for (a, i), (b, j), share, passage in leaks:
            if a >= len(splits) - outer or (a, i, b) in found:
                continue
            (name, rows), (held_name, held) = splits[a], splits[b]
            found[a, i, b] = Leak(kind, name, rows[i].origin, held_name, held[j].origin, round(share, 4), passage)
    return [found[place] for place in sorted(found)]


Place = tuple[int, int]  # (split, row)
Match = tuple[Place, Place, float, str]


def _each_kind(
    splits: Sequence[tuple[str, Sequence[Probe]]], threshold: float, shingle: int
) -> Iterator[tuple[str, Iterable[Match]]]:
    """Yield each kind of leak with its matches (row, held-out row, share, passage), the strongest kind first."""
    yield "exact", _exact(splits)
    places = [(a, i) for a, (_, rows) in enumerate(splits) for i in range(len(rows))]
    texts = [splits[a][1][i].text for a, i in places]
    groups = [a for a, _ in places]
    pairs = near_duplicates(texts, threshold=threshold, shingle=shingle, groups=groups)
    pairs.sort(key=lambda pair: -pair[2])  # of several, the most alike
    yield "near", ((places[j], places[i], share, "") for i, j, share in pairs)
    yield "n-gram", ((places[j], places[i], share, passage) for i, j, share, passage in shared_grams(texts, groups))


def _exact(splits: Sequence[tuple[str, Sequence[Probe]]]) -> Iterator[Match]:
    first = [{key: i for i, row in reversed(list(enumerate(rows))) for key in row.keys} for _, rows in splits]
    for a, (_, rows) in enumerate(splits):
        for b in range(a + 1, len(splits)):
            for i, row in enumerate(rows):
                same = [first[b][key] for key in row.keys if key in first[b]]
                if same:
                    yield (a, i), (b, min(same)), 1.0, ""


def shared_grams(texts: Sequence[str], groups: Sequence[int]) -> list[tuple[int, int, float, str]]:
    """Return (i, j, share, passage): text i of a later group shares n-grams with text j of an earlier one.

    For each j and each later group, the i with the most of its n-grams shared, where these are enough. All n-grams of a
    length are hashed at once, h(w1..wn) = h(w1..wn-1) b + v(wn) mod 2^64 with random v; the passage is then compared by
    its words.
    """
    said = [words(text) for text in texts]
    lengths = np.array([len(text) for text in said], dtype=np.int64)
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(word, len(known)) for text in said for word in text], dtype=np.int64)
    values = np.random.default_rng(0).integers(0, 2**64, len(known) + 1, dtype=np.uint64)[ids]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    owner, group = np.repeat(np.arange(len(said)), lengths), np.asarray(groups, dtype=np.int64)
    inside = np.arange(len(ids)) - np.repeat(starts, lengths)  # of each word in its text
    hashes = np.zeros(len(ids), dtype=np.uint64)
    best: dict[tuple[int, int], tuple[float, int, int, int]] = {}  # (j, group of i) -> (share, -i, place, length)
    for length in range(1, GRAM + 1):
        hashes = hashes[: len(ids) - length + 1] * _BASE + values[length - 1 :] if length <= len(ids) else hashes[:0]
        if length < SHORTEST:
            continue
        place = np.flatnonzero(inside[: len(hashes)] + length <= lengths[owner[: len(hashes)]])
        of = owner[place]
        held = (group[of] > group[0]) & (lengths[of] >= GRAM if length == GRAM else lengths[of] == length)
        for i, j, count, at in _matches(hashes[place], of, group, held, place):
            share = count / max(lengths[i] - length + 1, 1)
            if share < SHARE and count <= GRAM:
                continue
            best[j, group[i]] = max(best.get((j, group[i]), (0.0, 0, 0, 0)), (float(share), -i, at, length))
    found = [
        (-i, j, share, " ".join(said[-i][at - starts[-i] : at - starts[-i] + length]))
        for (j, _), (share, i, at, length) in best.items()
    ]
    return [match for match in found if match[3] in " ".join(said[match[1]])]


def _matches(
    hashes: np.ndarray, owner: np.ndarray, group: np.ndarray, held: np.ndarray, place: np.ndarray
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (held-out text i, text j of an earlier group, n-grams that they share, the first one's place in i).

    `held` marks the n-grams that are asked for as those of a held-out text; any n-gram may be the earlier text's.
    """
    wanted = np.unique(hashes[held])
    mine = np.isin(hashes, wanted)
    hashes, owner, held, place = hashes[mine], owner[mine], held[mine], place[mine]
    order = np.lexsort((owner, hashes))  # by n-gram, then by text, then (stable) by place
    hashes, owner, held, place = hashes[order], owner[order], held[order], place[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])  # once for each text
    hashes, owner, held, place = hashes[first], owner[first], held[first], place[first]
    begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
    ends = np.append(begins, len(hashes))[1:]
    apart = group[owner[begins]] != group[owner[ends - 1]]  # texts stand in the order of their groups
    counts: dict[tuple[int, int], list[int]] = {}
    for start, end in zip(begins[apart].tolist(), ends[apart].tolist(), strict=True):
        rows, sides = owner[start:end].tolist(), group[owner[start:end]].tolist()
        if max(Counter(sides).values()) > COMMON:
            continue
        for k, at in zip(
            np.flatnonzero(held[start:end]).tolist(), place[start:end][held[start:end]].tolist(), strict=True
        ):
            for j in rows[: sides.index(sides[k])]:
                entry = counts.setdefault((rows[k], j), [0, at])
                entry[0], entry[1] = entry[0] + 1, min(entry[1], at)
    for (i, j), (count, at) in counts.items():
        yield i, j, count, at
