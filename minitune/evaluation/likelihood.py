"""How likely a model finds given texts: of each, the log-probability of its targets and how many it would have written.

    log p(y | x) = sum_i log p(y_i | x, y_<i),      right = sum_i [y_i = argmax_v p(v | x, y_<i)]

The text itself is read ("teacher forcing"), so one pass scores every token, and none depends on what was generated.
Texts of like length share a batch, padded on the right, where nothing that counts sees the padding. Logits are
made for some target positions at a time, never for a whole text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minitune.data.examples import Example
from minitune.errors import CheckpointError, DataError
from minitune.model.transformer import Transformer
from minitune.ops.precision import wide_dtype

CHUNK = 256  # target positions whose logits exist at once


@dataclass(frozen=True)
class Likelihood:
    """Of one text: log p of its targets in nats, how many there are, and how many the model would have chosen."""

    log_probability: float
    tokens: int
    right: int


@torch.inference_mode()
def likelihoods(
    model: Transformer,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Return the likelihood of the targets of each example, in their order.

    Args:
        model: the model.
        examples: ids with marks on the targets; token 0 is never one.
        batch_size: examples read at once.
        on_batch: called after each batch with its number of examples.

    Raises:
        DataError: an example has no target, or more tokens than the model has positions. CheckpointError: a
        probability is 0 or no number.
    """
    for example in examples:
        if len(example.ids) > model.config.longest:
            found = f"{example.origin}: {len(example.ids)} tokens with its answer, but the model reads at most"
            raise DataError(f"{found} {model.config.longest}; shorten or remove the row")
        if not any(example.targets):
            raise DataError(f"{example.origin}: an answer without a token; fill it in or remove the row")
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    found: dict[int, Likelihood] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found.update(zip(rows, _score(model, [examples[i] for i in rows]), strict=True))
            if on_batch:
                on_batch(len(rows))
    finally:
        model.train(was_training)
    for row, example in enumerate(examples):
        if not math.isfinite(found[row].log_probability):
            problem = "the model gives its answer no finite log-probability"
            raise CheckpointError(f"{example.origin}: {problem}; use dtype float32, or check the weights")
    return [found[i] for i in range(len(examples))]


def _score(model: Transformer, batch: list[Example]) -> list[Likelihood]:
    """Return the likelihoods of one batch; every text is predicted from all its tokens but the last."""
    lengths = torch.tensor([len(example.ids) for example in batch])
    width = int(lengths.max())
    ids = torch.tensor([list(example.ids) + [0] * (width - len(example.ids)) for example in batch])
    marks = torch.tensor([list(example.targets) + [False] * (width - len(example.ids)) for example in batch])
    places = torch.arange(width - 1).expand(len(batch), -1)
    places = places.masked_fill(places >= lengths[:, None], 0).to(model.device) if model.config.by_length else None
    hidden = model.hidden(ids[:, :-1].to(model.device), positions=places)
    marks = marks[:, 1:]
    targets = ids[:, 1:][marks].to(model.device)
    log_p, right = [], []
    chunks = zip(hidden[marks.to(model.device)].split(CHUNK), targets.split(CHUNK), strict=True)
    for states, wanted in chunks:
        logits = model.capped(F.linear(states, model.head_weight)).to(wide_dtype(states.dtype))
        log_p.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].double().cpu())
        right.append((logits.argmax(-1) == wanted).cpu())
    counts = marks.sum(-1).tolist()
    parts = zip(torch.cat(log_p).split(counts), torch.cat(right).split(counts), counts, strict=True)
    return [Likelihood(scores.sum().item(), count, int(hits.sum())) for scores, hits, count in parts]
