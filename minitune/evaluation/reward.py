"""Scores by a reward model: r(x, y) = w . h, h being the final hidden state of the last token of prompt and answer.

This is the reward that `--objective reward` learns from pairs (Ouyang et al. 2022, section 3.5, after Bradley & Terry
1952): only differences between answers to one prompt mean something, sigmoid(r(x, y_w) - r(x, y_l)) is the
probability that y_w is preferred. A text is rendered and encoded as training does, so that the same token is scored.
Texts of like length share a batch, padded on the right, where nothing that counts sees the padding; the choice
of batches changes a reward by rounding only.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minitune.data.examples import Example, encode_record
from minitune.data.formats import Record
from minitune.errors import DataError
from minitune.model.transformer import Transformer
from minitune.text.tokenizer import Tokenizer

Messages = Sequence[dict[str, Any]]


def score(
    model: Transformer, tokenizer: Tokenizer, conversations: Sequence[Messages], *, batch_size: int = 16
) -> list[float]:
    """Return the reward of each conversation's last answer.

    Args:
        model: a reward model: `load_model` with the adapter of a run with `--objective reward`.
        tokenizer: its tokenizer.
        conversations: lists of messages `{"role", "content"}` that end with an answer.
        batch_size: conversations read at once.

    Raises:
        ConfigError: the model has no reward head. DataError: a conversation is too long or cannot be rendered.
    """
    records = [Record(f"conversation {n}", "", tuple(turns)) for n, turns in enumerate(conversations, 1)]
    return score_records(model, tokenizer, records, batch_size)


def score_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Messages],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
) -> list[list[float]]:
    """Return the reward of each of several answers to each prompt, a list of messages or a text to continue.

    The other arguments and the errors are as in `score`.
    """
    records = []
    for number, (prompt, texts) in enumerate(zip(prompts, answers, strict=True), 1):
        for text in texts:
            if isinstance(prompt, str):
                records.append(Record(f"prompt {number}", "", prompt=prompt, completion=text))
            else:
                turns = (*prompt, {"role": "assistant", "content": text})
                records.append(Record(f"prompt {number}", "", messages=turns))
    rewards = iter(score_records(model, tokenizer, records, batch_size))
    return [[next(rewards) for _ in texts] for texts in answers]


@torch.inference_mode()
def score_records(
    model: Transformer, tokenizer: Tokenizer, records: Sequence[Record], batch_size: int = 16
) -> list[float]:
    """Return the reward of each record's last answer; errors as in `score`."""
    texts = [encode_record(record, tokenizer, "last") for record in records]
    return model.rewards(last_hidden(model, texts, batch_size, "score")).tolist()


@torch.inference_mode()
def last_hidden(model: Transformer, texts: Sequence[Example], batch_size: int, what: str) -> torch.Tensor:
    """Return the final hidden state of the last token of each text, (texts, D), in their order.

    `what` names the progress bar. Raises DataError for a text with more tokens than the model has positions.
    """
    from tqdm import tqdm

    for text in texts:
        if len(text.ids) > model.config.longest:
            found = f"{text.origin}: {len(text.ids)} tokens with its answer, but the model that scores reads at most"
            raise DataError(f"{found} {model.config.longest}; shorten or remove the row")
    result = torch.empty(len(texts), model.config.hidden_size, dtype=model.dtype, device=model.device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=what, disable=None, leave=False, delay=0.5):
            rows = order[start : start + batch_size]
            ends = torch.tensor([len(texts[i].ids) - 1 for i in rows])
            ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, : len(texts[i].ids)] = torch.tensor(texts[i].ids)
            places = torch.arange(ids.shape[1]).expand(len(rows), -1)
            places = places.masked_fill(places > ends[:, None], 0).to(model.device) if model.config.by_length else None
            result[rows] = model.hidden(ids.to(model.device), positions=places)[torch.arange(len(rows)), ends]
    finally:
        model.train(was_training)
    return result
