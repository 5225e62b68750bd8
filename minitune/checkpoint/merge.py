"""Folding an adapter into the weights: W' = round(W + scaling B A), computed in fp32.

Rounding to 16 bits can swallow a small update: bf16 keeps 8 significant bits, so a change below 1/512 of a
weight vanishes. The report says what arrived: with the update U = scaling B A and the change that really
happened C = W' - W, the relative error is ||C - U|| / ||U|| and the share that survived <C, U> / ||U||^2
(the part of C along U; ||C|| alone would count rounding noise as success). Both are exact sums over all
merged weights, in fp64.
"""

from dataclasses import dataclass

import torch

from minitune.errors import CheckpointError
from minitune.model.linear import Linear
from minitune.model.lora import linear_modules
from minitune.model.transformer import Transformer


@dataclass(frozen=True)
class MergeReport:
    """What became of an adapter's update: numbers of layers, its share that survived rounding, the error."""

    layers: int
    dtype: str
    survived: float
    relative_error: float
    worst_layer: str
    worst_survived: float

    def __str__(self) -> str:
        """Return the report as one line."""
        return (
            f"merged {self.layers} layers into {self.dtype}: {self.survived:.2%} of the update survived rounding, "
            f"relative error {self.relative_error:.2g}; least in {self.worst_layer} ({self.worst_survived:.2%})"
        )


@torch.no_grad()
def merge(model: Transformer) -> MergeReport:
    """Fold every adapter into its weight, in place, remove the adapters and report the rounding.

    Raises:
        CheckpointError: there is no adapter, or a weight or adapter is not finite; weights of layers before
            that one are merged already then.
    """
    adapted = {path: layer for path, layer in linear_modules(model).items() if layer.lora is not None}
    if not adapted:
        raise CheckpointError("there is no adapter to merge; load one with adapter=...")
    sums = {path: _merge_layer(path, layer) for path, layer in adapted.items()}
    error, along, update = (sum(column) for column in zip(*sums.values(), strict=True))
    shares = {path: (a / u if u else 1.0) for path, (_, a, u) in sums.items()}
    worst = min(shares, key=shares.__getitem__)
    return MergeReport(
        layers=len(adapted),
        dtype=str(next(iter(adapted.values())).weight.dtype).removeprefix("torch."),
        survived=along / update if update else 1.0,
        relative_error=(error / update) ** 0.5 if update else 0.0,
        worst_layer=worst,
        worst_survived=shares[worst],
    )


def _merge_layer(path: str, layer: Linear) -> tuple[float, float, float]:
    """Merge one layer; return ||C - U||^2, <C, U> and ||U||^2."""
    lora = layer.lora
    before = layer.weight.float()  # (out, in)
    update = lora.scaling * (lora.B.float() @ lora.A.float())
    after = (before + update).to(layer.weight.dtype)
    if not torch.isfinite(after).all():
        raise CheckpointError(f"{path}: the merged weight is not finite in {layer.weight.dtype}; the adapter diverged")
    change = after.double() - before.double()
    update = update.double()
    layer.weight.data.copy_(after)
    layer.lora = None
    return (change - update).square().sum().item(), (change * update).sum().item(), update.square().sum().item()
