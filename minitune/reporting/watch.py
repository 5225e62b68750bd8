"""What a loop must notice by itself: numbers that are no numbers, divergence, over-fitting.

A model that knows nothing has a loss of ln V; one that was better and is worse than ln V + 1 for several steps
in a row has been thrown out of its basin by the learning rate and does not come back. A single spike can be an
odd batch, which is why one step is not enough.
"""

import math
from typing import Any

import torch
from torch import nn

PATIENCE = 5
MARGIN = 0.01  # a rise of the validation loss by less than this share is noise


def divergence(loss: float, vocab_size: int, high_losses: int, started_low: bool) -> tuple[int, bool]:
    """Return the updated (high losses in a row, whether the loss was ever below the line).

    The run has diverged when the first reaches `PATIENCE`.
    """
    line = math.log(vocab_size) + 1
    if loss <= line:
        return 0, True
    return (high_losses + 1 if started_low else 0), started_low


def overfitting(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the evaluation after which training and validation loss parted, or None.

    They have parted when the last two validation losses are above the best one, the last by more than 1%, while
    the training loss has gone on falling since.
    """
    measured = [e for e in evaluations if e["training_loss"] is not None]
    if len(measured) < 3:
        return None
    best = min(measured, key=lambda e: e["validation_loss"])
    before, last = measured[-2:]
    rises = last["validation_loss"] > best["validation_loss"] * (1 + MARGIN)
    stays = best["step"] < before["step"] and before["validation_loss"] > best["validation_loss"]
    return best if rises and stays and last["training_loss"] < best["training_loss"] else None


def bad_weight(model: nn.Module) -> str | None:
    """Return the first parameter that holds a NaN or infinity."""
    return next((f"weight {n}" for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def bad_gradient(parameters: dict[str, nn.Parameter]) -> str | None:
    """Return the first non-finite gradient in the order of the backward pass: from the head down."""
    for name, parameter in reversed(parameters.items()):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return None


@torch.no_grad()
def bad_activation(model: nn.Module, batch: Any) -> str | None:
    """Run the batch again and return the first module whose output holds a NaN or infinity."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(f"output of {name}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model.hidden(batch.ids, positions=batch.positions)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
