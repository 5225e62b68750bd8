"""What holds a run to its start, against forgetting: a price on the change of each weight that trains.

    P = lambda / 2 sum_i F_i (w_i - w0_i)^2

ewc: F is the Fisher information of general text (`training/fisher.py`; Kirkpatrick et al. 2017, equation 3), so that P
is about lambda times the drift of general predictions, in nats a token. l2: F = 1 (L2-SP; Li et al. 2018, equation 2).

What an adapter changes is W, by D = s (B A - B0 A0), and the price is on that. With b = [B - B0, B0], a = [A; A - A0],
D = s b a, without cancellation:

    G = dP/dD = lambda F * D,    dA = s B^T G,    dB = s G A^T
    l2:  |D|^2 = s^2 sum((b^T b) * (a a^T)),    dA = lambda s^2 (B^T b) a,    dB = lambda s^2 b (a A^T)

ewc makes D some rows at a time, l2 never. W is not needed: it may be in 4 bits. A price on A and B themselves was
rejected: a start of B = 0 is nothing to stay by, and one s B A has many A and B.

The gradient is added once a step, times the window's weight, to the summed gradients, before they are averaged and
clipped; the loss that is reported stays the data's. A penalty in each micro-batch's loss was rejected: it would count
by their number. F is kept in bf16, whose 8 bits are more than an estimate from some thousand tokens has; the start in
the dtype of the weights, exactly. Sums and products are in fp32 or wider.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitune.data.general import general_examples
from minitune.errors import ConfigError
from minitune.model.adapters import LoRA
from minitune.model.linear import Linear, QuantizedWeight
from minitune.model.lora import linear_modules
from minitune.model.transformer import Transformer
from minitune.ops.precision import widen
from minitune.training.fisher import diagonal_fisher
from minitune.training.kept import digest, kept_tensors
from minitune.training.optimizer import SLICE
from minitune.training.options import PenaltyOptions


def adapted_layers(model: Transformer) -> dict[str, Linear]:
    """Return the layers whose adapters train, by path; ConfigError for DoRA, whose change is not s B A."""
    layers = {path: layer for path, layer in linear_modules(model).items() if layer.lora is not None}
    for path, layer in layers.items():
        if layer.lora.magnitude is not None:
            raise ConfigError(f"penalty cannot hold {path}, a DoRA adapter: its change is no product; use plain LoRA")
    return {path: layer for path, layer in layers.items() if layer.lora.A.requires_grad}


def plain_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those that train themselves and have a past: no adapter, no reward head, no table with new rows."""
    return {
        name: parameter for name, parameter in parameters.items()
        if ".lora." not in name and not name.startswith("score.") and not hasattr(parameter, "trained_rows")
    }  # fmt: skip


def held_weights(model: Transformer, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter | QuantizedWeight]:
    """Return the weights that the penalty is on, by name: those that train, and those that adapters change."""
    return plain_parameters(parameters) | {f"{p}.weight": layer.weight for p, layer in adapted_layers(model).items()}


class Penalty:
    """The price of the change since now.

    Args:
        model: at its start.
        parameters: what trains, by name.
        strength: lambda.
        fisher: F of each of `held_weights`, by name; None for l2.
    """

    def __init__(
        self, model: Transformer, parameters: dict[str, nn.Parameter], strength: float,
        fisher: dict[str, torch.Tensor] | None = None,
    ):  # fmt: skip
        """Keep a copy of what the weights are; raises ConfigError for adapters by DoRA."""
        self.strength = strength
        self.parts: list[_Plain | _LowRank] = []
        for name, parameter in plain_parameters(parameters).items():
            self.parts.append(_Plain(parameter, parameter.detach().clone(), fisher and fisher[name]))
        for path, layer in adapted_layers(model).items():
            start = tuple(factor.detach().clone() for factor in (layer.lora.A, layer.lora.B))
            fresh = not start[1].any()
            self.parts.append(_LowRank(layer.lora, None if fresh else start, fisher and fisher[f"{path}.weight"]))

    @torch.no_grad()
    def add(self, weight: float) -> float:
        """Add `weight` times the penalty's gradient to the gradients of all it is on; return the penalty."""
        sums = [part.add(weight * self.strength) for part in self.parts]
        return self.strength / 2 * float(torch.stack(sums).double().sum())


@dataclass(frozen=True)
class _Plain:
    """A parameter, what it was, and its F."""

    parameter: nn.Parameter
    start: torch.Tensor
    fisher: torch.Tensor | None

    def add(self, factor: float) -> torch.Tensor:
        """Add factor F (w - w0) to the gradient; return sum F (w - w0)^2."""
        tensors = [self.parameter.data, self.start, _gradient(self.parameter)]
        tensors += [] if self.fisher is None else [self.fisher]
        total = torch.zeros((), device=self.start.device)
        for weight, start, gradient, *fisher in zip(*(t.view(-1).split(SLICE) for t in tensors), strict=True):
            change = widen(weight) - widen(start)
            priced = change * fisher[0] if fisher else change
            gradient.add_(priced, alpha=factor)  # in bf16: summed in fp32 and rounded once
            total = total + (change * priced).sum()
        return total


@dataclass(frozen=True)
class _LowRank:
    """An adapter, its factors at the start (None where B was zero), and F (out, in) of the weight it changes."""

    lora: LoRA
    start: tuple[torch.Tensor, torch.Tensor] | None
    fisher: torch.Tensor | None

    def add(self, factor: float) -> torch.Tensor:
        """Add factor F * D, taken back to A and B, to their gradients; return sum F * D^2."""
        A, B, s = self.lora.A.data, self.lora.B.data, self.lora.scaling
        a, b = A, B
        if self.start is not None:
            a, b = torch.cat([A, A - self.start[0]]), torch.cat([B - self.start[1], self.start[1]], dim=1)
        da, db = _gradient(self.lora.A), _gradient(self.lora.B)
        if self.fisher is None:
            da.add_((B.T @ b) @ a, alpha=factor * s**2)
            db.add_(b @ (a @ A.T), alpha=factor * s**2)
            return s**2 * ((b.T @ b) * (a @ a.T)).sum()
        rows, total = max(1, SLICE // A.shape[1]), torch.zeros((), device=A.device)
        for part_b, part_B, part_db, fisher in zip(*(t.split(rows) for t in (b, B, db, self.fisher)), strict=True):
            change = s * (part_b @ a)
            priced = change * fisher
            part_db.add_(priced @ A.T, alpha=factor * s)
            da.add_(part_B.T @ priced, alpha=factor * s)
            total = total + (change * priced).sum()
        return total


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient, contiguous, to be added to; zeros where there was none."""
    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
    return parameter.grad


def build_penalty(
    model: Transformer, parameters: dict[str, nn.Parameter], options: PenaltyOptions, tokenizer: Any, start: str,
    pad_id: int,
) -> tuple[Penalty, str]:  # fmt: skip
    """Return the penalty of resolved options that have a kind, and what to say of it.

    Args:
        model: at its start, of whose weights `start` is the fingerprint.
        parameters: what trains, by name.
        options: kind, strength, text.
        tokenizer: the model's.
        start: see `state.base_fingerprint`.
        pad_id: fills rows of text up.

    Raises:
        ConfigError: adapters by DoRA. DataError: the text is too short, or has a bad row. CheckpointError: the file
            that keeps F is damaged or another's.
    """
    held, fisher, said = held_weights(model, parameters), None, "L2 to the start"
    if options.kind == "ewc":
        examples = general_examples(options.text, tokenizer, options.tokens, model.config.longest)
        key = {"model": start, "data": digest(examples), "dtype": str(model.dtype).removeprefix("torch."),
               "choice of weights": hashlib.sha256(json.dumps(sorted(held)).encode()).hexdigest()}  # fmt: skip
        shapes = {name: tuple(weight.shape) for name, weight in held.items()}
        kept, place = kept_tensors(
            "values of Fisher information", "fisher", "penalty.fisher_cache", options.fisher_cache, key, shapes,
            lambda: {name: f.bfloat16() for name, f in diagonal_fisher(model, held, examples, pad_id).items()},
        )  # fmt: skip
        fisher = {name: value.to(model.device) for name, value in kept.items()}
        said = f"EWC: Fisher information of {options.tokens:,} tokens of {options.text}, kept in {place}"
    return Penalty(model, parameters, options.strength, fisher), f"{said}; strength {options.strength:g}"
