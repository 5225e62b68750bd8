"""The floating-point operations of a training step, from a model's config: a multiplication and an addition are two.

With N tokens, P weights in the linear layers of the blocks, R the adapters' rank, V the vocabulary, M target tokens:

    base       2 P N forward, 2 P N for the gradient of the input, and 2 P N for that of the weights if they train
    adapters   2 R (in + out) N for each layer, three times: forward, input, weights
    attention  2 matmuls of 2 H d pairs each forward, 5 backward (the scores are made again)
    head       2 V D M forward, as much for its input, as much for its weight if it trains
    reference  base, attention and head forward once more, where another model's log-probabilities are needed

For full fine-tuning without the attention that is the well-known 6 P N. A document of T tokens has T (T + 1) / 2 pairs;
where a layer sees only a window of w, W (W + 1) / 2 + (T - W) W with W = min(w, T). What is not needed is left out: the
gradients below the first layer that trains, the input gradient of the first layer's q, k, v under LoRA, and with
checkpointing the second making of each layer's result. 6 P N alone was rejected: it is a third too much for LoRA and
leaves out the attention, which is half of all at long lengths.
"""

from collections.abc import Sequence
from typing import Any


def linears(config: Any) -> list[tuple[int, int]]:
    """Return (in, out) of a block's linear layers: q, k, v, o, then gate where there is one, up and down."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    up = [(width, inner)] * (2 if config.gated else 1)
    return [(width, heads), (width, kv), (width, kv), (heads, width), *up, (inner, width)]


def pairs(length: int, window: int | None = None) -> float:
    """Return how many pairs of tokens of a document see each other in a layer with that window."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def step_flops(
    config: Any,
    lengths: Sequence[int],
    targets: int,
    *,
    method: str,
    rank: int = 0,
    trained_layers: int | None = None,
    checkpointing: bool = False,
    causal: bool = True,
    attention_backward: int = 5,
    reference: bool = False,
) -> float:
    """Return the floating-point operations of one training step.

    Args:
        config: a `ModelConfig`.
        lengths: tokens of each document.
        targets: tokens with a loss; the head runs on these.
        method: full, last_layers, lora or qlora.
        rank: of the adapters, on all linear layers, for lora and qlora.
        trained_layers: for last_layers, how many train; the others run forward only.
        checkpointing: whether the layers run forward twice.
        causal: count the pairs of tokens that see each other, else all pairs.
        attention_backward: matmuls of its backward pass; 4 where the probabilities are kept.
        reference: whether the model runs forward once more, without adapters.
    """
    tokens, layers, shapes = sum(lengths), config.num_layers, linears(config)
    weights, adapters = method in ("full", "last_layers"), method in ("lora", "qlora")
    rank = rank if adapters else 0
    base = 2 * tokens * sum(a * b for a, b in shapes)
    low = 2 * tokens * rank * sum(a + b for a, b in shapes)
    matmul = [2 * config.num_heads * config.head_dim * seen for seen in _seen(config, lengths, causal)]  # by layer
    last = trained_layers or layers
    forward = layers * (base + low) + 2 * sum(matmul)
    backward = last * ((2 if weights else 1) * base + 2 * low) + attention_backward * sum(matmul[layers - last :])
    if adapters:
        backward -= 2 * tokens * sum(a * (b + rank) for a, b in shapes[:3])
    again = 0.0
    if checkpointing:  # all but the layer's last result, which no gradient needs
        inner, width = shapes[-1]
        again = last * (base + low - 2 * tokens * width * (inner + rank)) + 2 * sum(matmul[layers - last :])
    head = 2 * targets * config.vocab_size * config.hidden_size
    other = layers * base + 2 * sum(matmul) + head if reference else 0.0
    return forward + again + backward + (3 if method == "full" else 2) * head + other


def _seen(config: Any, lengths: Sequence[int], causal: bool) -> list[float]:
    """Return each layer's pairs of tokens that see each other."""
    windows = config.windows or (None,) * config.num_layers
    by_window = {w: sum(pairs(n, w) if causal else n * n for n in lengths) for w in set(windows)}
    return [by_window[window] for window in windows]
