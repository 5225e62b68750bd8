"""Low-rank adapters: what a slot of a linear layer can hold.

    LoRA    y = W x + b + s B A x                                       (Hu et al. 2021, equation 3)
    PiSSA   the same over W - s B0 A0, from A = A0 and B = B0           (Meng et al. 2024, equations 2 to 5)
    DoRA    y = m / ||W + s B A|| (W + s B A) x + b, norms of rows      (Liu et al. 2024, equation 5)

PiSSA as published overwrites W with its residual. Here W stays, and the adapter has twice the rank, [A; A0] and
[B, -B0], whose second half is frozen: the base can still be run alone, may be quantised, and what is saved is plain
LoRA on the base that everyone has.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from minitune.errors import ConfigError
from minitune.model.lora_config import LoRAConfig
from minitune.ops.linear import Weight
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
    """A low-rank update: A (R, in) and B (out, R), so drawn that it starts as nothing.

    With `config.dora` it has a `magnitude` m (out,) too, and after PiSSA's start the frozen factors A0 and B0. All are
    fp32 whatever the base's dtype is; they are cast for the matmul. `enabled = False` switches the update off without
    removing it.
    """

    def __init__(self, config: LoRAConfig, in_features: int, out_features: int, device: torch.device):
        """Allocate; `reset` draws A."""
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.zeros(config.rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        self.magnitude = nn.Parameter(torch.ones(out_features, device=device)) if config.dora else None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        self.scaling = config.scaling
        self.dropout = config.dropout
        self.enabled = True
        self.plain = not config.dora and config.init == "kaiming"  # then `linear.project` takes A and B as they are
        self.held_scales: torch.Tensor | None = None  # of `row_scales`, while nothing changes (`lora.hold_scales`)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: Weight) -> None:
        """Start as nothing over W (out, in).

        A is drawn uniformly in +-1/sqrt(in) (Kaiming with a = sqrt(5)) and B is zero, or both are PiSSA's, taken off
        again by A0 and B0. The magnitude is the length of W's rows.
        """
        if self.config.init == "kaiming":
            bound = 1 / math.sqrt(self.A.shape[1])
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()
        else:
            a, b = principal_factors(_full(weight), self.config, generator)
            self.A.copy_(a)
            self.B.copy_(b)
            self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_lengths(weight))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of the plain LoRA on W that this amounts to: of rank 2 R after PiSSA's start."""
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    @torch.no_grad()
    def merged(self, weight: Weight) -> torch.Tensor:
        """Return the weight (out, in) that this makes of W, in fp32 or wider."""
        a, b = self.factors()
        full = _full(weight) + self.scaling * (b @ a)
        if self.magnitude is None:
            return full
        return self.magnitude[:, None] * full / torch.linalg.vector_norm(full, dim=1, keepdim=True)

    @torch.no_grad()
    def row_lengths(self, weight: Weight) -> torch.Tensor:
        """Return ||W + s B A|| of every row, (out,), without gradient."""
        a, b = self.factors()
        return torch.linalg.vector_norm(_full(weight) + self.scaling * (b @ a), dim=1)

    def row_scales(self, weight: Weight) -> torch.Tensor:
        """Return m / ||W + s B A|| (out,); the gradient takes the length as a constant (Liu et al., section 4.3)."""
        return self.magnitude / self.row_lengths(weight) if self.held_scales is None else self.held_scales


@dataclass
class Choice:
    """Which of several adapters is on, shared by all layers of a model: one for all rows, or `groups` of rows."""

    name: str | None = None
    """The adapter of every row; None is the base alone."""
    groups: list[tuple[str, torch.Tensor]] | None = field(default=None)
    """While a batch of mixed rows runs: each adapter and the numbers (n,) of its rows."""


class Several(nn.Module):
    """The adapters of one layer by name, of which `choice` says which is on."""

    plain, enabled = False, True

    def __init__(self, choice: Choice):
        """Start without any."""
        super().__init__()
        self.named, self.choice = nn.ModuleDict(), choice

    def get(self, name: str | None) -> LoRA | None:
        """Return the adapter of that name, None where it has no part in this layer."""
        return self.named[name] if name in self.named else None


def principal_factors(
    weight: torch.Tensor, config: LoRAConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (R, in) and B (out, R) with s B A the best approximation of W (out, in) of that rank.

    With W = U S V^T: A = (S/s)^1/2 V^T and B = U (S/s)^1/2 (Meng et al. 2024, equations 2 and 3). "pissa" takes the
    whole decomposition, "pissa_niter_N" that of W seen through a random subspace, turned N times towards the largest
    components (Halko et al. 2011, algorithms 4.4 and 5.1), in a fraction of the time.

    Raises ConfigError where the rank is more than W can have.
    """
    rank, most = config.rank, min(weight.shape)
    if rank > most:
        raise ConfigError(f"lora.rank is {rank}, but a weight of {tuple(weight.shape)} has {most} components (pissa)")
    if weight.is_meta:  # when memory is counted
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
    rounds = config.init.removeprefix("pissa").removeprefix("_niter_")
    if rounds:
        drawn = torch.randn(weight.shape[1], rank, generator=generator).to(weight)
        basis = torch.linalg.qr(weight @ drawn).Q  # (out, R)
        for _ in range(int(rounds)):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        left = basis @ inner
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / config.scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _full(weight: Weight) -> torch.Tensor:
    """Return W in fp32, or wider where it is."""
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else widen(weight.detach())
