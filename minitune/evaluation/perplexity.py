"""Perplexity of a text: exp of the mean loss per token, exp(-1/N sum_i log p(t_i | window before i)).

The text is read in windows of `window` tokens that start every `stride` tokens. Each token is predicted once, in
the first window that reaches it, and the mean is over tokens, never over windows. With stride = window every
token sees on average half a window of context; a smaller stride gives more and costs window / stride times
the work. Bits per byte is the same loss over the UTF-8 bytes that the scored tokens stand for,

    sum_i -log2 p(t_i) / bytes,

which does not depend on how a tokenizer cuts a text, so that models with different ones compare (Gao et al. 2020).

The interval resamples windows, not tokens: tokens of one window share its subject. Losses come from the hidden states
of scored positions, chunk by chunk: the logits never exist whole.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitune.data.reading import read_rows
from minitune.errors import CheckpointError, ConfigError, DataError, counted
from minitune.evaluation.bootstrap import interval, ratio_of
from minitune.evaluation.comparison import FEWEST
from minitune.model.transformer import Transformer
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats per token over `tokens` scored tokens, `perplexity` = exp(loss).

    `interval` is perplexity's 95% bootstrap interval over windows, None where there are too few to say;
    `bits_per_byte` is None where ids were scored whose text is not known; its interval is that of the loss, at the
    whole text's tokens per byte.
    """

    perplexity: float
    loss: float
    tokens: int
    window: int
    stride: int
    interval: tuple[float, float] | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file; raises DataError for another kind, an empty or a broken one."""
    if path.suffix != ".txt":
        raise DataError(f"{path}: perplexity reads plain text; give a .txt file")
    ((_, fields),) = read_rows(path)
    return fields["text"]


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
    whole = tokenizer.encode(text)
    ids = whole[:max_tokens]
    found = score_ids(model, ids, window=window, stride=stride, batch_size=batch_size, on_batch=on_batch)
    read = text if len(ids) == len(whole) else tokenizer.decode(ids)
    # The first token is not scored. Where it, or the cut, ends inside a character, this is at most 3 bytes off.
    size = len(read.encode()) - len(tokenizer.decode(ids[:1]).encode())
    if size <= 0:
        return found
    bits = found.tokens / (math.log(2) * size)  # bits per byte of a loss of 1
    edges = found.interval and tuple(bits * math.log(edge) for edge in found.interval)
    return replace(found, bits_per_byte=bits * found.loss, bits_per_byte_interval=edges)


def score_ids(
    model: Transformer, ids: list[int], *, window: int, stride: int | None = None, **options: Any
) -> Perplexity:
    """Score token ids; arguments and errors as in `perplexity`."""
    stride = window if stride is None else stride
    losses, tokens = window_losses(model, ids, window=window, stride=stride, **options)
    loss = sum(losses) / sum(tokens)
    edges = interval(ratio_of(losses, tokens)) if len(losses) >= FEWEST else None
    return Perplexity(_exp(loss), loss, sum(tokens), window, stride, edges and (_exp(edges[0]), _exp(edges[1])))


@torch.inference_mode()
def window_losses(
    model: Transformer,
    ids: list[int],
    *,
    window: int,
    stride: int,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """Return the summed loss in nats and the number of scored tokens of each window; arguments as in `perplexity`."""
    if not 2 <= window <= model.config.longest:
        raise ConfigError(f"window is {window}; it must be 2 to the model's {model.config.longest} positions")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}; it must be 1 to the window, {window}, or tokens would be left out")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if len(ids) < 2:
        raise DataError(f"the text has {counted(len(ids), 'token')}; perplexity needs at least 2")
    losses: list[float] = []
    tokens: list[int] = []
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(plan_windows(len(ids), window, stride), batch_size):
            scored = _score(model, ids, batch)
            losses += [loss for loss, _ in scored]
            tokens += [count for _, count in scored]
            if on_batch:
                on_batch(sum(count for _, count in scored))
    finally:
        model.train(was_training)
    return losses, tokens


def check_finite(losses: Sequence[float]) -> None:
    """Raise CheckpointError where a loss is no finite number: of such a model nothing was measured."""
    if not all(map(math.isfinite, losses)):
        raise CheckpointError("the model gives the text no finite loss; use dtype float32, or check the weights")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


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


def _score(model: Transformer, ids: list[int], batch: list[tuple[int, int, int]]) -> list[tuple[float, int]]:
    """Return the summed loss in nats and the number of scored tokens of each of a batch of equally long windows."""
    device = model.head_weight.device
    inputs = torch.tensor([ids[start:end] for start, end, _ in batch], device=device)  # (B, T)
    targets = torch.tensor([ids[start + 1 : end + 1] for start, end, _ in batch], device=device)
    places = torch.tensor([range(start, end) for start, end, _ in batch], device=device)
    scored = places >= torch.tensor([[first] for _, _, first in batch], device=device)
    losses = linear_cross_entropy(
        model.hidden(inputs)[scored], model.head_weight, targets[scored], softcap=model.config.logits_softcap
    )
    counts = scored.sum(-1).tolist()
    return [(part.sum().item(), len(part)) for part in losses.double().split(counts)]
