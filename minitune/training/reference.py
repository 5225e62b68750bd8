"""The reference's log-probabilities, made once and kept on disk, where the reference itself does not last.

Full fine-tuning changes the only copy of the weights, and a loaded adapter is part of the reference and changes too.
So before the first step every document of the data is scored by the model as it is, and the sums travel with the items.
The file is good for one model, one set of token ids and targets (data, template and tokenizer in one) and one dtype:
a file that says otherwise is refused. Keeping a second copy of the model was rejected: it costs its whole memory.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minitune.data.batching import collate_documents
from minitune.data.corpus import Corpus
from minitune.data.examples import Example
from minitune.model.transformer import Transformer
from minitune.training.kept import digest, kept_tensors
from minitune.training.objectives import to_device
from minitune.training.preference import answer_log_probabilities


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
    key = {"model": base, "data": digest(documents), "dtype": str(model.dtype).removeprefix("torch.")}
    kept, place = kept_tensors(
        "reference log-probabilities", "reference", "preference.reference_cache", path, key,
        {"log_probabilities": (len(documents),)},
        lambda: {"log_probabilities": score(model, documents, batch_size, pad_id)},
    )  # fmt: skip
    sums = iter(kept["log_probabilities"].tolist())

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
