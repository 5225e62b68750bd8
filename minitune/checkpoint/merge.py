"""Folding an adapter into the weights: W' = round(W + scaling B A), its rows scaled in DoRA, computed in fp32.

W is decoded to fp32 where it is quantised, and W' is written in 16 or 32 bits. Merging into 4 bits is refused: a code's
neighbours are about a tenth of the largest weight away, so at an update of 1% of the weights 1.5% of it survives.

Rounding to 16 bits can swallow a small update: bf16 keeps 8 significant bits, so a change below 1/512 of a
weight vanishes. The report says what arrived: with the update U (scaling B A in LoRA) and the change that really
happened C = W' - W, the relative error is ||C - U|| / ||U|| and the share that survived <C, U> / ||U||^2
(the part of C along U; ||C|| alone would count rounding noise as success). Both are exact sums over all
merged weights, in fp64.
"""

from dataclasses import dataclass

import torch

from minitune.checkpoint.adapter import all_finite, fail_listing
from minitune.errors import CheckpointError, counted
from minitune.model.linear import Linear
from minitune.model.lora import linear_modules, quantized_weights
from minitune.model.transformer import Transformer
from minitune.ops.nf4 import QuantizedTensor


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
            f"merged {counted(self.layers, 'layer')} into {self.dtype}: {self.survived:.2%} of the update survived "
            f"rounding, relative error {self.relative_error:.2g}; least in {self.worst_layer} "
            f"({self.worst_survived:.2%})"
        )


@torch.no_grad()
def merge(model: Transformer, dtype: torch.dtype | None = None) -> MergeReport:
    """Fold every adapter into its weight, in place, remove the adapters and report the rounding.

    Of several adapters the chosen one is folded, and all are removed.

    Args:
        model: has adapters; its weights may be quantised.
        dtype: what all weights are in after it, the model's own by default. Each is rounded once, from what is stored.

    Raises:
        CheckpointError: there is no adapter, or a weight or adapter is not finite; weights of layers before
            that one are merged already then.
    """
    adapted = {path: layer for path, layer in linear_modules(model).items() if layer.chosen is not None}
    if not adapted:
        raise CheckpointError("there is no adapter to merge; load one with adapter=...")
    dtype = dtype or model.dtype
    sums = {path: _merge_layer(path, layer, dtype) for path, layer in adapted.items()}
    for layer in linear_modules(model).values():
        layer.lora = None
    for path, weight in quantized_weights(model).items():  # those without adapter
        linear_modules(model)[path].replace_weight(weight.dequantize(dtype))
    model.to(dtype)  # lays the new weights side by side
    bad = [f"{name} is not finite in {dtype}" for name, value in model.named_parameters() if not all_finite(value)]
    fail_listing("the weights cannot be converted", bad)
    error, along, update = (sum(column) for column in zip(*sums.values(), strict=True))
    shares = {path: (a / u if u else 1.0) for path, (_, a, u) in sums.items()}
    worst = min(shares, key=shares.__getitem__)
    return MergeReport(
        layers=len(adapted),
        dtype=str(dtype).removeprefix("torch."),
        survived=along / update if update else 1.0,
        relative_error=(error / update) ** 0.5 if update else 0.0,
        worst_layer=worst,
        worst_survived=shares[worst],
    )


def _merge_layer(path: str, layer: Linear, dtype: torch.dtype) -> tuple[float, float, float]:
    """Merge one layer into `dtype`; return ||C - U||^2, <C, U> and ||U||^2."""
    lora, weight = layer.chosen, layer.stored_weight
    quantized = isinstance(weight, QuantizedTensor)
    before = weight.dequantize(torch.float32) if quantized else weight.float()  # (out, in)
    exact = lora.merged(weight)
    a, b = lora.factors()
    update = lora.scaling * (b.float() @ a.float()) if lora.magnitude is None else exact - before
    after = exact.to(dtype)
    if not torch.isfinite(after).all():
        raise CheckpointError(f"{path}: the merged weight is not finite in {dtype}; the adapter diverged")
    change = after.double() - before.double()
    update = update.double()
    if quantized or weight.dtype != dtype:
        layer.replace_weight(after)
    else:
        weight.data.copy_(after)
    return (change - update).square().sum().item(), (change * update).sum().item(), update.square().sum().item()
