"""How fast a step could be: its floating-point operations over the matmul rate that this machine reaches.

With N tokens, P weights in the linear layers, R the adapters' rank, V the vocabulary, M target tokens:

    base       2 P N forward, 2 P N for the gradient of the input, and 2 P N for that of the weights if they train
    adapters   2 R (in + out) N for each layer, three times: forward, input, weights
    attention  2 matmuls of 2 H d pairs each forward, 5 backward (the scores are made again), pairs = T (T + 1) / 2
    head       2 V D M forward, as much for its input, as much for its weight if it trains
    reference  base, attention and head forward once more, where another model's log-probabilities are needed

What is not needed is left out: the input gradient of the first layer's q, k, v under LoRA, and with checkpointing
the second making of each layer's result.
A floor made of the sum of the parts' measured times was rejected: it would call slow kernels unavoidable.
"""

import time
from collections.abc import Sequence
from typing import Any

from bench.cases import RANK


def _linears(config: Any) -> list[tuple[int, int]]:
    """Return (in, out) of the seven linear layers of one block: q, k, v, o, gate, up, down."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [(width, heads), (width, kv), (width, kv), (heads, width), (width, inner), (width, inner), (inner, width)]


def step_flops(
    config: Any,
    lengths: Sequence[int],
    targets: int,
    *,
    full: bool,
    checkpointing: bool = False,
    rank: int = RANK,
    causal: bool = True,
    attention_backward: int = 5,
    reference: bool = False,
) -> float:
    """Return the floating-point operations of one training step, a multiplication and an addition being two.

    Args:
        config: a `ModelConfig`.
        lengths: tokens of each document.
        targets: tokens with a loss; the head runs on these.
        full: whether all weights train, else LoRA of `rank` on all linear layers.
        checkpointing: whether the layers run forward twice.
        causal: count the pairs of tokens that see each other, else all pairs.
        attention_backward: matmuls of its backward pass; 4 where the probabilities are kept.
        reference: whether the model runs forward once more, without adapters.
    """  # fmt: skip
    tokens, layers, linears = sum(lengths), config.num_layers, _linears(config)
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    base = 2 * tokens * sum(a * b for a, b in linears)
    adapters = 0 if full else 2 * tokens * rank * sum(a + b for a, b in linears)
    attention = 2 * config.num_heads * config.head_dim * pairs  # one matmul
    forward = layers * (base + adapters + 2 * attention)
    backward = layers * ((2 if full else 1) * base + 2 * adapters + attention_backward * attention)
    if not full:
        backward -= 2 * tokens * sum(a * (b + rank) for a, b in linears[:3])
    again = 0.0
    if checkpointing:  # all but the layer's last result, which no gradient needs
        inner, width = linears[-1]
        again = forward - layers * 2 * tokens * width * (inner + (0 if full else rank))
    head = 2 * targets * config.vocab_size * config.hidden_size
    other = layers * (base + 2 * attention) + head if reference else 0.0
    return forward + again + backward + (3 if full else 2) * head + other


def generation_seconds(
    config: Any, prompt: int, new: int, bytes_per_weight: int, rate: float, bandwidth: float
) -> float:
    """Return the least time to read a prompt and write `new` tokens: each token reads every weight once.

    `rate` is in flop/s, `bandwidth` in bytes/s.
    """
    weights = config.num_layers * sum(a * b for a, b in _linears(config)) + config.vocab_size * config.hidden_size
    return 2 * weights * prompt / rate + (new - 1) * weights * bytes_per_weight / bandwidth


def _best(work, repeats: int = 6) -> float:
    """Return the seconds of the fastest of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def measure_rates(size: int = 2048) -> dict[str, float]:
    """Measure flop/s of matmuls in fp32, "medium" and bf16, the error of "medium", bytes/s of copying and reading."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    operations, rates = 2 * size**3, {}
    rates["float32"] = operations / _best(lambda: a @ b)
    torch.set_float32_matmul_precision("medium")
    rates["medium"] = operations / _best(lambda: a @ b)
    exact = a[:256].double() @ b.double()
    rates["medium_error"] = float(((a[:256] @ b).double() - exact).norm() / exact.norm())
    torch.set_float32_matmul_precision("highest")
    low_a, low_b = a.bfloat16(), b.bfloat16()
    rates["bfloat16"] = operations / _best(lambda: low_a @ low_b)
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.numel() * 4 / _best(lambda: target.copy_(source))  # read and written
    rates["read"] = max(rates["copy"], source.numel() * 4 / _best(lambda: source.sum()))
    return rates


def matmul_rate(rates: dict[str, float], dtype: str, medium: bool) -> float:
    """Return the rate that a job of this dtype could reach; "medium" counts for fp32 where it is as accurate."""
    if dtype == "float32" and (medium or rates["medium_error"] < 2e-6):
        return max(rates["float32"], rates["medium"])
    return rates[dtype]
