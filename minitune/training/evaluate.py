"""Validation inside the loop: the loss over every validation target, and answers to a few prompts.

The loss is the same objective summed over all batches and divided once by all targets, so it does not depend
on how rows are batched. Evaluation leaves no trace in the run: dropout is off, no random number is drawn from
the run's stream.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from minitune.data.batching import Batch
from minitune.data.examples import Example
from minitune.decoding import generate_ids
from minitune.model.transformer import Transformer
from minitune.training.objectives import Objective, add_metrics, mean_metrics, to_device


@torch.no_grad()
def validation_loss(
    model: Transformer, batches: Iterable[Batch], objective: Objective, stopped: Callable[[], bool]
) -> tuple[float, dict[str, float]] | None:
    """Return the mean loss, per target token or pair, in nats, and the means of the metrics.

    None when `stopped` said so on the way.
    """
    device = model.device
    loss, weight, sums = 0.0, 0, {}
    model.eval()
    try:
        for batch in batches:
            if stopped():
                return None
            loss_sum, count, metrics = objective(model, to_device(batch, device))
            loss, weight = loss + float(loss_sum), weight + count
            add_metrics(sums, metrics)
    finally:
        model.train()
    return loss / weight, mean_metrics(sums)


def sample_prompts(examples: list[Example], count: int, room: int) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, expected ids) of the first examples whose prompt leaves `room` tokens.

    The prompt is what stands before the first target; of plain text, where all is target, its first half.
    """
    chosen = []
    for example in examples:
        start = example.targets.index(True)
        start = start if start > 1 else max(1, len(example.ids) // 2)
        end = next((i for i in range(start, len(example.ids)) if not example.targets[i]), len(example.ids))
        if len(chosen) < count and start <= room:
            chosen.append((list(example.ids[:start]), list(example.ids[start:end])))
    return chosen


def answer_samples(
    model: Transformer, tokenizer: Any, prompts: list[tuple[list[int], list[int]]], max_new_tokens: int
) -> list[dict[str, str]]:
    """Return prompt, expected and greedy answer of each prompt as text."""
    if not prompts:
        return []
    asked = [prompt for prompt, _ in prompts]
    answers = generate_ids(model, asked, max_new_tokens=max_new_tokens, end_ids=tokenizer.end_ids)
    return [
        {"prompt": tokenizer.decode(p), "expected": tokenizer.decode(e), "answer": tokenizer.decode(a)}
        for (p, e), a in zip(prompts, answers, strict=True)
    ]
