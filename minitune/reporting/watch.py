"""What a loop must notice by itself: numbers that are no numbers, divergence, over-fitting.

A model that knows nothing has a loss of ln V a token; one that was better and is worse than ln V + 1 for several steps
in a row has been thrown out of its basin by the learning rate and does not come back. A single spike can be an
odd batch, which is why one step is not enough. A loss over preferences is judged in the same way, by that of a model
without a preference.
"""

from typing import Any

import torch
from torch import nn

PATIENCE = 5
COLLAPSE = 0.5  # nats a token
MARGIN = 0.01  # a rise of the validation loss by less than this share is noise


def divergence(loss: float, guessing: float, high_losses: int, started_low: bool) -> tuple[int, bool]:
    """Return the updated (high losses in a row, whether the loss was ever below the line, that of guessing and 1 more).

    The run has diverged when the first reaches `PATIENCE`.
    """
    line = guessing + 1
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


def preferences(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Return what is wrong with a preference run's evaluation, beside its first one; nothing for other runs.

    Chosen answers that lose more than half a nat a token are unlearned, however well the margin grows (Pal et al.
    2024, Smaug). An accuracy that is above chance where the better answer is the longer one and below it where it is
    the shorter one, or the other way round, is what a rule about length alone would have.
    """
    warnings = []
    name, length = "validation_chosen_log_probability", last.get("validation_chosen_length")
    if name in last and name in first and length and last[name] < first[name] - COLLAPSE * length:
        before, after = first[name] / length, last[name] / length
        warnings.append(
            f"the chosen answers' log-probability has collapsed from {before:.2f} to {after:.2f} nats a token; "
            "lower optimizer.learning_rate, raise preference.beta or set preference.sft_weight"
        )
    sides = [last.get(f"validation_accuracy_chosen_{which}") for which in ("longer", "shorter")]
    if last["step"] and None not in sides and max(sides) >= 0.6 and min(sides) <= 0.4:
        kind = "longer" if sides[0] > sides[1] else "shorter"
        warnings.append(
            f"the margin is explained by length: accuracy {sides[0]:.0%} where the chosen answer is the longer one "
            f"and {sides[1]:.0%} where it is the shorter; {kind} answers are being learned"
        )
    return warnings


def sampled(parameters: dict[str, nn.Parameter], count: int = 64) -> dict[str, torch.Tensor]:
    """Return up to `count` elements of each parameter, spread over it, fp64 (count,)."""
    found = {}
    for name, parameter in parameters.items():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).round().long()
        found[name] = flat[places.to(flat.device)].double().cpu()
    return found


def movement(before: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return how far the parameters have gone since `sampled`, as the run folder has it.

    `moved` is the share of the sampled elements that differ, `update` their root-mean-square difference, `weight` the
    root mean square of what they are now.
    """
    now, then = torch.cat(list(sampled(parameters).values())), torch.cat(list(before.values()))
    size = {"update": now - then, "weight": now}
    found = {name: float(value.square().mean().sqrt()) for name, value in size.items()}
    return {"moved": float((now != then).double().mean()), **found}


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
