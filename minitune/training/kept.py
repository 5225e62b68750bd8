"""Tensors that are dear to make before the first step, and kept in a file for the next run.

A file is good for one key: the model's fingerprint, the digest of the token ids and targets, the dtype and the like.
One that says otherwise, or does not hold what it should, is refused. A place by the hash of the key is never another's.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from minitune.data.examples import Example
from minitune.errors import CheckpointError
from minitune.files import atomic_file
from minitune.safetensors_io import read_header, read_metadata, write_tensors
from minitune.sources import weights_folder

_NAMES = {"data": "other data, or the same by another chat template or tokenizer"}


def kept_tensors(
    what: str,
    folder: str,
    option: str,
    path: str | None,
    key: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    make: Callable[[], dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], Path]:
    """Return the tensors of these names and shapes, on the CPU where they were read, and the file that keeps them.

    Args:
        what: their name in the plural, for errors.
        folder: where they lie beside the fetched weights, by the hash of the key.
        option: that gave the path.
        path: the file, read if it is there and made if not; None: one in `folder`.
        key: what they depend on.
        shapes: by name.
        make: called where there is no file.

    Raises:
        CheckpointError: the file is damaged, or of another key.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    place = Path(path) if path else weights_folder() / folder / f"{name}.safetensors"
    if place.is_file():
        return _read(place, what, option, key, shapes), place
    tensors = make()
    with atomic_file(place) as temporary:
        write_tensors(temporary, tensors, key)
    return tensors, place


def digest(documents: Iterable[Example]) -> str:
    """Return a sha256 over all token ids and targets, in order."""
    found = hashlib.sha256()
    for document in documents:
        found.update(json.dumps([document.ids, [int(target) for target in document.targets]]).encode())
    return found.hexdigest()


def _read(
    place: Path, what: str, option: str, key: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Return what `place` holds; CheckpointError where it is not that of `key`."""
    saved = read_metadata(place)
    for field, wanted in key.items():
        if saved.get(field) != wanted:
            other = _NAMES.get(field, f"another {field}")
            raise CheckpointError(f"{place}: these {what} are of {other}; delete the file, or give another {option}")
    stored, tensors = read_header(place), {}
    for name, shape in shapes.items():
        if name not in stored or stored[name].shape != tuple(shape):
            raise CheckpointError(f"{place} does not hold {name} of {list(shape)} {what}; delete it")
        tensors[name] = stored[name].read()
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{place} holds a NaN or infinity; delete it")
    return tensors
