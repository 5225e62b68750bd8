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
from minitune.training.objectives import (
    Objective,
    add_metrics,
    document_losses,
    mean_metrics,
    supervised,
    to_device,
)

Rows = list[tuple[float, int]]


@torch.no_grad()
def validation_loss(
    model: Transformer, batches: Iterable[Batch], objective: Objective, stopped: Callable[[], bool]
) -> tuple[float, dict[str, float], Rows] | None:
    """Return the mean loss, per target token or pair, in nats, the means of the metrics, and the rows' own.

    `Rows` are (summed loss, target tokens) of each document, for intervals; none where a loss is over preferences.
    None when `stopped` said so on the way.
    """
    device = model.device
    loss, weight, sums, rows = 0.0, 0, {}, []
    model.eval()
    try:
        for batch in batches:
            if stopped():
                return None
            batch = to_device(batch, device)
            if objective is supervised:
                losses, counts = document_losses(model, batch)
                rows += zip(losses.tolist(), counts.tolist(), strict=True)
                loss, weight = loss + float(losses.sum()), weight + batch.target_count
                continue
            loss_sum, count, metrics = objective(model, batch)
            loss, weight = loss + float(loss_sum), weight + count
            add_metrics(sums, metrics)
    finally:
        model.train()
    return loss / weight, mean_metrics(sums), rows


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
) -> list[dict[str, Any]]:
    """Return prompt, expected and greedy answer of each prompt as text, and how long those are.

    `tokens` are those of the answer, `expected_tokens` those of the expected one; `ended` says whether the answer
    ended by itself.
    """
    if not prompts:
        return []
    asked = [prompt for prompt, _ in prompts]
    answers = generate_ids(model, asked, max_new_tokens=max_new_tokens, end_ids=tokenizer.end_ids)
    return [
        {"prompt": tokenizer.decode(p), "expected": tokenizer.decode(e), "answer": tokenizer.decode(a),
         "expected_tokens": len(e), "tokens": len(a), "ended": len(a) < max_new_tokens}
        for (p, e), a in zip(prompts, answers, strict=True)
    ]  # fmt: skip
