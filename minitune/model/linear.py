"""The linear layer with a slot for an adapter, and its application in groups that share an input."""

import math

import torch
from torch import nn

from minitune.model.lora_config import LoRAConfig
from minitune.ops.linear import Adapter, Remade, projections
from minitune.ops.nf4 import QuantizedTensor
from minitune.ops.precision import widen


class Wide(nn.Module):
    """A module that stays in fp32 when the model it is part of is cast to fewer bits; it moves with it."""

    def _apply(self, fn, recurse=True):
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

        return super()._apply(moved, recurse)


class LoRA(Wide):
    """A low-rank update: A (R, in) drawn as PEFT draws it, B (out, R) zero, so that it starts as nothing.

    Both are fp32 whatever the base's dtype is; they are cast for the matmul. `enabled = False` switches the
    update off without removing it.
    """

    def __init__(self, config: LoRAConfig, in_features: int, out_features: int, device: torch.device):
        """Allocate; `reset` draws A."""
        super().__init__()
        self.A = nn.Parameter(torch.zeros(config.rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        self.scaling = config.scaling
        self.dropout = config.dropout
        self.enabled = True

    def reset(self, generator: torch.Generator) -> None:
        """Draw A uniformly in +-1/sqrt(in) (Kaiming with a = sqrt(5)) and set B to zero."""
        bound = 1 / math.sqrt(self.A.shape[1])
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()


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
    """y = x W^T + b, W (out, in), plus the update in slot `lora` where there is one.

    `weight` is a parameter, or a `QuantizedWeight` without gradient.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """Wrap an existing weight (out, in), which may be a view of a larger tensor."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.lora: LoRA | None = None

    def replace_weight(self, weight: torch.Tensor | QuantizedTensor) -> None:
        """Put another weight (out, in) in W's place: quantised, or as a parameter."""
        del self.weight
        self.weight = QuantizedWeight(weight) if isinstance(weight, QuantizedTensor) else nn.Parameter(weight)

    @property
    def stored_weight(self) -> torch.Tensor | QuantizedTensor:
        """W as it is kept."""
        return self.weight.tensor if isinstance(self.weight, QuantizedWeight) else self.weight

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
        adapters.append(Adapter(lora.A, lora.B, lora.scaling) if active else None)
        if active and lora.training:
            dropout = lora.dropout
    return projections(
        x, [layer.stored_weight for layer in layers], [layer.bias for layer in layers], adapters, dropout
    )
