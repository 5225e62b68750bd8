"""The linear layer with a slot for adapters, and its application in groups that share an input."""

import torch
import torch.nn.functional as F
from torch import nn

from minitune.model.adapters import LoRA, Several, Wide
from minitune.ops.linear import Adapter, Remade, projections
from minitune.ops.nf4 import QuantizedTensor
from minitune.ops.precision import widen


class ScoreHead(Wide):
    """A row of weights (1, D), fp32: what makes a reward of a hidden state."""

    def __init__(self, width: int, device: torch.device | str | None):
        """Allocate."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (n, D) to rewards (n,), in fp32 or wider."""
        weight = widen(self.weight)
        return nn.functional.linear(hidden.to(weight.dtype), weight).squeeze(-1)


class QuantizedWeight(nn.Module):
    """A frozen weight in 4 or 8 bits in the place of a parameter; it is decoded to its input's dtype when used.

    It moves with the model; casting the model leaves it as it is, scales included.
    """

    def __init__(self, tensor: QuantizedTensor):
        """Hold what `ops.nf4.quantize` made."""
        super().__init__()
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """Of the weight, (out, in)."""
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensor.packed.device

    def _apply(self, fn, recurse=True):
        device = fn(torch.empty(0, device=self.device)).device
        self.tensor = self.tensor.apply(lambda part: part.to(device))
        return self


class Linear(nn.Module):
    """y = x W^T + b, W (out, in), plus the update in slot `lora` where there is one (`model/adapters.py`).

    `weight` is a parameter, or a `QuantizedWeight` without gradient.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """Wrap an existing weight (out, in), which may be a view of a larger tensor."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.lora: LoRA | Several | None = None

    def replace_weight(self, weight: torch.Tensor | QuantizedTensor) -> None:
        """Put another weight (out, in) in W's place: quantised, or as a parameter."""
        del self.weight
        self.weight = QuantizedWeight(weight) if isinstance(weight, QuantizedTensor) else nn.Parameter(weight)

    @property
    def stored_weight(self) -> torch.Tensor | QuantizedTensor:
        """W as it is kept."""
        return self.weight.tensor if isinstance(self.weight, QuantizedWeight) else self.weight

    @property
    def chosen(self) -> LoRA | None:
        """The adapter of the slot, or of several the one that is chosen."""
        return self.lora.get(self.lora.choice.name) if isinstance(self.lora, Several) else self.lora

    def forward(self, x: torch.Tensor | Remade) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return project(x, (self,))[0]


def linear_group(in_features: int, out_features: tuple[int, ...], bias: bool, dtype, device) -> list[Linear]:
    """Return linear layers of one input whose weights lie one after the other, so that they run as one matmul."""
    weight = torch.empty(sum(out_features), in_features, dtype=dtype, device=device)
    biases = [torch.zeros(out, dtype=dtype, device=device) if bias else None for out in out_features]
    return [Linear(part, b) for part, b in zip(weight.split(out_features), biases, strict=True)]


def project(x: torch.Tensor | Remade, layers: tuple[Linear, ...]) -> tuple[torch.Tensor, ...]:
    """Apply several layers to one input x (..., in) in one matmul; returns one (..., out_i) for each."""
    adapters, dropout = [], 0.0
    for layer in layers:
        lora = layer.lora
        active = lora is not None and lora.enabled
        if active and not lora.plain:
            return _project_any(x, layers)
        adapters.append(Adapter(lora.A, lora.B, lora.scaling) if active else None)
        if active and lora.training:
            dropout = lora.dropout
    return projections(
        x, [layer.stored_weight for layer in layers], [layer.bias for layer in layers], adapters, dropout
    )


def _project_any(x: torch.Tensor | Remade, layers: tuple[Linear, ...]) -> tuple[torch.Tensor, ...]:
    """Do as `project`, for slots that hold anything."""
    for layer in layers:
        if isinstance(layer.lora, Several) and layer.lora.choice.groups is not None:
            return _project_rows(x, layers, layer.lora.choice.groups)
    loras = [layer.chosen for layer in layers]
    loras = [lora if lora is not None and lora.enabled else None for lora in loras]
    present = [lora for lora in loras if lora is not None]
    dropout = max((lora.dropout for lora in present if lora.training), default=0.0)
    if any(lora.magnitude is not None or lora.A0 is not None and dropout for lora in present):
        x = x.make() if isinstance(x, Remade) else x
        return tuple(_project_alone(x, layer, lora) for layer, lora in zip(layers, loras, strict=True))
    adapters = [None if lora is None else Adapter(*lora.factors(), lora.scaling) for lora in loras]
    return projections(
        x, [layer.stored_weight for layer in layers], [layer.bias for layer in layers], adapters, dropout
    )


def _project_rows(x, layers: tuple[Linear, ...], groups: list[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Apply the layers to a batch whose rows have different adapters: W once for all, then each group's update."""
    x = x.make() if isinstance(x, Remade) else x
    weights, biases = [layer.stored_weight for layer in layers], [layer.bias for layer in layers]
    parts = projections(x, weights, biases, [None] * len(layers))
    for name, rows in groups:
        for part, layer in zip(parts, layers, strict=True):
            lora = layer.lora.get(name) if isinstance(layer.lora, Several) else None
            if lora is not None and lora.enabled:
                part[rows] = _updated(part[rows], x[rows], layer, lora)
    return parts


def _project_alone(x: torch.Tensor, layer: Linear, lora: LoRA | None) -> torch.Tensor:
    """Apply one layer with an update that is not the plain one of `projections`."""
    (y,) = projections(x, [layer.stored_weight], [layer.bias], [None])
    return y if lora is None else _updated(y, x, layer, lora)


def _updated(y: torch.Tensor, x: torch.Tensor, layer: Linear, lora: LoRA) -> torch.Tensor:
    """Return y = W x + b (..., out) with the adapter's update for x (..., in).

    Dropout acts on what passes A, and in DoRA on what m scales, but not on W x itself nor on what PiSSA takes off W:

        DoRA's y = W x + b + (m / ||.|| - 1) W drop(x) + m / ||.|| s B A drop(x)

    which is equation 5 where nothing drops.
    """
    if lora.A0 is not None:
        y = y - _low_rank(x, lora.A0, lora.B0, lora.scaling)
    dropped = x
    if lora.training and lora.dropout:
        dropped = F.dropout(x, lora.dropout)
    update = _low_rank(dropped, lora.A, lora.B, lora.scaling)
    if lora.magnitude is None:
        return y + update
    if dropped is x:
        inner = y if layer.bias is None else y - layer.bias
    else:
        (inner,) = projections(dropped, [layer.stored_weight], [None], [None])
        if lora.A0 is not None:
            inner = inner - _low_rank(dropped, lora.A0, lora.B0, lora.scaling)
    scales = lora.row_scales(layer.stored_weight)
    return y + (scales - 1).to(y.dtype) * inner + scales.to(y.dtype) * update


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return s B A x, (..., out)."""
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling
