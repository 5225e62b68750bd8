"""Perplexity of a text: exp of the mean loss per token, exp(-1/N sum_i log p(t_i | window before i)).

The text is read in windows of `window` tokens that start every `stride` tokens. Each token is predicted once, in
the first window that reaches it, and the mean is over tokens, never over windows. With stride = window every
token sees on average half a window of context; a smaller stride gives more and costs window / stride times
the work. Losses come from the hidden states of scored positions, chunk by chunk: the logits never exist whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitune.errors import ConfigError, DataError, counted
from minitune.model.transformer import Transformer
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats per token over `tokens` scored tokens, `perplexity` = exp(loss)."""

    perplexity: float
    loss: float
    tokens: int
    window: int
    stride: int


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score a text.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: read from its start as one document.
        window: tokens that the model sees at once, at most its positions.
        stride: tokens between the starts of two windows; None is `window`.
        max_tokens: use only so many tokens from the start; None uses all.
        batch_size: windows read at once.
        on_batch: called after each batch with the number of tokens it scored.

    Raises:
        ConfigError: window, stride or batch_size is out of range. DataError: the text has under two tokens.
    """
    return score_ids(
        model, tokenizer.encode(text)[:max_tokens],
        window=window, stride=stride, batch_size=batch_size, on_batch=on_batch,
    )  # fmt: skip


@torch.inference_mode()
def score_ids(
    model: Transformer,
    ids: list[int],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score token ids; arguments and errors as in `perplexity`."""
    stride = window if stride is None else stride
    if not 2 <= window <= model.config.longest:
        raise ConfigError(f"window is {window}; it must be 2 to the model's {model.config.longest} positions")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}; it must be 1 to the window, {window}, or tokens would be left out")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if len(ids) < 2:
        raise DataError(f"the text has {counted(len(ids), 'token')}; perplexity needs at least 2")
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(plan_windows(len(ids), window, stride), batch_size):
            scored, tokens = _score(model, ids, batch)
            total, count = total + scored, count + tokens
            if on_batch:
                on_batch(tokens)
    finally:
        model.train(was_training)
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count, window, stride)


def plan_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, end, first) of each window: ids[start:end] are read, ids[first:end] predict their next ids.

    Every token of `length` but the very first is predicted exactly once.
    """
    inputs, windows, first = length - 1, [], 0
    for start in range(0, inputs, stride):
        end = min(start + window, inputs)
        windows.append((start, end, first))
        first = end
        if end == inputs:
            break
    return windows


def _batches(windows: list[tuple[int, int, int]], size: int) -> list[list[tuple[int, int, int]]]:
    """Group windows of one length; only the last window can be shorter, and it goes alone."""
    length = windows[0][1] - windows[0][0]
    full = [one for one in windows if one[1] - one[0] == length]
    short = [[one] for one in windows[len(full) :]]
    return [full[i : i + size] for i in range(0, len(full), size)] + short


def _score(model: Transformer, ids: list[int], batch: list[tuple[int, int, int]]) -> tuple[float, int]:
    """Return the summed loss in nats and the number of scored tokens of one batch of equally long windows."""
    device = model.head_weight.device
    inputs = torch.tensor([ids[start:end] for start, end, _ in batch], device=device)  # (B, T)
    targets = torch.tensor([ids[start + 1 : end + 1] for start, end, _ in batch], device=device)
    places = torch.tensor([range(start, end) for start, end, _ in batch], device=device)
    scored = places >= torch.tensor([[first] for _, _, first in batch], device=device)
    losses = linear_cross_entropy(
        model.hidden(inputs)[scored], model.head_weight, targets[scored], softcap=model.config.logits_softcap
    )
    return losses.double().sum().item(), len(losses)
