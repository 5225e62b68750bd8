"""How fast a step could be: its floating-point operations over the matmul rate that this machine reaches.

They are those of `minitune/planning/flops.py`: what is not needed is left out.
A floor made of the sum of the parts' measured times was rejected: it would call slow kernels unavoidable.
"""

import time
from typing import Any

from minitune.planning import flops


def generation_seconds(
    config: Any, prompt: int, new: int, bytes_per_weight: int, rate: float, bandwidth: float
) -> float:
    """Return the least time to read a prompt and write `new` tokens: each token reads every weight once.

    `rate` is in flop/s, `bandwidth` in bytes/s.
    """
    weights = config.num_layers * sum(a * b for a, b in flops.linears(config)) + config.vocab_size * config.hidden_size
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
