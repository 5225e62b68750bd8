"""The learning rate as a pure function of the step: warm-up, then one of four shapes.

With s steps done of S, w = warm-up steps, x = (s - w) / (S - w) in [0, 1] and floor f:

    warm-up   (s + 1) / w                              s < w: the first step is never at rate 0
    cosine    f + (1 - f) (1 + cos pi x) / 2           (Loshchilov & Hutter 2017, equation 5)
    linear    f + (1 - f) (1 - x)
    constant  1
    wsd       1, then linear to f over the last `decay` share of S   (Hu et al. 2024, section 4.1)

All are multiplied by the peak. A scheduler object with its own state was rejected: a function has nothing to
save, so a resumed run cannot get it wrong.
"""

import math

from minitune.training.config import ScheduleConfig


def rate_factor(step: int, total: int, schedule: ScheduleConfig) -> float:
    """Return the share of the peak rate to use in the step after `step` completed ones, of `total`."""
    warmup = math.ceil(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    floor = schedule.final_ratio or 0.0
    start = warmup
    if schedule.kind == "wsd":
        start = max(warmup, total - math.ceil((schedule.decay or 0.0) * total))
    if step < start:
        return 1.0
    x = (step - start) / max(1, total - start)
    if schedule.kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2
    return floor + (1 - floor) * (1 - x)
