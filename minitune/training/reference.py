"""The reference's log-probabilities, made once and kept on disk, where the reference itself does not last.

Full fine-tuning changes the only copy of the weights, and a loaded adapter is part of the reference and changes too.
So before the first step every document of the data is scored by the model as it is, and the sums travel with the items.
The file is good for one model, one set of token ids and targets (data, template and tokenizer in one) and one dtype:
a file that says otherwise is refused. Keeping a second copy of the model was rejected: it costs its whole memory.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minitune.data.batching import collate_documents
from minitune.data.corpus import Corpus
from minitune.data.examples import Example
from minitune.errors import CheckpointError
from minitune.files import atomic_file
from minitune.model.transformer import Transformer
from minitune.safetensors_io import read_header, read_metadata, write_tensors
from minitune.sources import weights_folder
from minitune.training.objectives import to_device
from minitune.training.preference import answer_log_probabilities

_NAMES = {"model": "another model", "data": "other data, or the same by another chat template or tokenizer",
          "dtype": "another dtype"}  # fmt: skip


def with_reference(
    model: Transformer, corpus: Corpus, base: str, *, batch_size: int, pad_id: int, path: str | None = None
) -> tuple[Corpus, Path]:
    """Return the corpus with the log-probabilities of all its documents under `model`, and the file that keeps them.

    Args:
        model: the reference, adapters included, in evaluation mode.
        corpus: pairs or judged examples.
        base: fingerprint of the weights of all that is the reference.
        batch_size: documents scored at a time.
        pad_id: fills short rows.
        path: the file, read if it is there and made if not. None: a place beside the fetched weights, by fingerprint.

    Raises:
        CheckpointError: the file is damaged, or of another model, data or dtype.
    """
    documents = list(_documents(corpus))
    dtype = str(model.dtype).removeprefix("torch.")
    key = {"model": base, "data": _digest(documents), "dtype": dtype}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    place = Path(path) if path else weights_folder() / "reference" / f"{name}.safetensors"
    if place.is_file():
        values = _read(place, key, len(documents))
    else:
        values = score(model, documents, batch_size, pad_id)
        with atomic_file(place) as temporary:
            write_tensors(temporary, {"log_probabilities": values}, key)
    sums = iter(values.tolist())

    def filled(item: Any) -> Any:
        return dataclasses.replace(item, reference=tuple(next(sums) for _ in item.scored))

    training = [([filled(item) for item in items], weight) for items, weight in corpus.training]
    return dataclasses.replace(corpus, training=training, validation=[filled(i) for i in corpus.validation]), place


@torch.no_grad()
def score(model: Transformer, documents: list[Example], batch_size: int, pad_id: int) -> torch.Tensor:
    """Return the summed log-probability of each document's targets, (documents,) fp32, on the CPU.

    Documents of like length are scored together.
    """
    from tqdm import tqdm

    values = torch.empty(len(documents))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    for start in tqdm(range(0, len(order), batch_size), desc="reference", unit=" batches", disable=None, leave=False):
        part = order[start : start + batch_size]
        batch = collate_documents([[documents[i]] for i in part], pad_id)
        values[part] = answer_log_probabilities(model, to_device(batch, model.device))[0].cpu()
    return values


def _documents(corpus: Corpus) -> Iterator[Example]:
    for items in (*(items for items, _ in corpus.training), corpus.validation):
        for item in items:
            yield from item.scored


def _digest(documents: list[Example]) -> str:
    """Return a sha256 over all token ids and targets, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.ids, [int(target) for target in document.targets]]).encode())
    return digest.hexdigest()


def _read(place: Path, key: dict[str, str], count: int) -> torch.Tensor:
    """Return the sums that `place` holds; CheckpointError where they are not those of `key`."""
    saved = read_metadata(place)
    for field, wanted in key.items():
        if saved.get(field) != wanted:
            raise CheckpointError(
                f"{place}: these reference log-probabilities are of {_NAMES[field]}; "
                f"delete the file, or give another preference.reference_cache"
            )
    tensor = read_header(place).get("log_probabilities")
    if tensor is None or tensor.shape != (count,):
        raise CheckpointError(f"{place} does not hold {count} log-probabilities; delete it")
    values = tensor.read()
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{place} holds a NaN or infinity; delete it")
    return values
