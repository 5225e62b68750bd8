"""Train, validation and test without leaks: a row's split is a hash of what it asks.

    split(row) = the part of [0, 1) that blake2b(seed, key(row)) / 2^64 falls into

The key is the normalised question, not the whole row, so rows that ask the same thing share a split whatever
they answer. A row's split depends on no other row: adding or removing rows moves none. The sizes are therefore
only near their fractions. Shuffling and cutting was rejected: it moves rows whenever the file grows, and it
puts duplicates on both sides.
"""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from minitune.data.formats import Record
from minitune.errors import ConfigError

Item = TypeVar("Item")


def normalise(text: str) -> str:
    """Return the text without what readers don't see: Unicode NFKC, case folded, white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def row_parts(record: Record) -> tuple[str, ...]:
    """Return the texts of a row that is trained on; equal rows and no others have equal parts."""
    if len(record.sides) > 1:
        return tuple(part for side in record.sides for part in row_parts(side))
    record = record.sides[0]
    if record.messages is not None:
        return tuple(text for message in record.messages for text in (message["role"], message["content"]))
    return (record.text,) if record.text is not None else (record.prompt, record.completion)


def row_key(record: Record) -> tuple[str, ...]:
    """Return the normalised texts of a row, by which duplicates are told."""
    return tuple(map(normalise, row_parts(record)))


def question_key(record: Record) -> str:
    """Return the normalised question, by which rows are split: first user turn, prompt, or text."""
    record = record.sides[0]
    if record.messages is not None:
        return normalise(next(m["content"] for m in record.messages if m["role"] == "user"))
    return normalise(row_parts(record)[0])


def split_by_hash(
    items: Iterable[Item],
    fractions: dict[str, float],
    seed: int,
    key: Callable[[Item], str] = question_key,
) -> dict[str, list[Item]]:
    """Return {name: items} for fractions such as {"train": 0.8, "validation": 0.1, "test": 0.1}, in order.

    Items of equal `key` always share a split. Raises ConfigError unless the fractions are above 0 and sum to 1.
    """
    if not fractions or min(fractions.values()) <= 0 or not math.isclose(sum(fractions.values()), 1):
        raise ConfigError(f"split fractions {fractions}: each must be above 0 and together they must be 1")
    parts: dict[str, list[Item]] = {name: [] for name in fractions}
    for item in items:
        parts[_part(key(item), fractions, seed)].append(item)
    return parts


def hash_point(key: str, seed: int) -> float:
    """Return the place in [0, 1) that the seed gives a key."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _part(key: str, fractions: dict[str, float], seed: int) -> str:
    """Return the name of the part that the key's hash falls into."""
    point = hash_point(key, seed)
    for name, fraction in fractions.items():  # noqa: B007
        point -= fraction
        if point < 0:
            break
    return name


def duplicates(keys: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Return (index, index of the first with that key) for every key that came before."""
    first: dict[Hashable, int] = {}
    found = ((i, first.setdefault(key, i)) for i, key in enumerate(keys))
    return [(i, earlier) for i, earlier in found if earlier != i]


def deduplicate(items: Iterable[Item], key: Callable[[Item], Hashable] = row_key) -> list[Item]:
    """Return the items without those whose key came before; the first of equals stays."""
    kept: dict[Hashable, Item] = {}
    for item in items:
        kept.setdefault(key(item), item)
    return list(kept.values())
