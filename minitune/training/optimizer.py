"""AdamW, behind an interface of five verbs: average, clip, step, state, load.

The loop hands over summed gradients; with W the summed weight of the window, c the clipping norm, rate a:

    g <- sum of gradients / W;   g <- g min(1, c / (|g| + 1e-6));   AdamW(g, a)    (Loshchilov & Hutter 2019)

The update itself is torch's fused kernel in fp32. Adapters and fp32 models are updated in place. A bf16 model
keeps weights and moments in bf16, 6 bytes a parameter: slice by slice they are widened, updated in fp32 and
rounded back, weight and second moment stochastically (`ops/rounding.py`), since rounding to nearest would lose
most updates and never let a second moment decay (by 1/1000 a step, where bf16 resolves 1/256; the first decays
by 1/10). fp32 masters were rejected for bf16: 14 bytes a parameter; who has them trains in fp32.
"""

import torch
from torch import nn
from torch.optim.adamw import adamw

from minitune.ops.rounding import POOL, noise_pool, round_stochastically
from minitune.training.config import OptimizerConfig

SLICE = 1 << 18  # elements of a bf16 parameter that are widened at a time


class Optimizer:
    """AdamW for named parameters, LoRA+ rates included.

    Args:
        parameters: what trains, by name; fp32 or bf16.
        config: betas, epsilon, decay (of matrices, not of norms and biases), clipping norm.
        plus_ratio: rate of each adapter's B over that of its A (Hayou et al. 2024, LoRA+).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig, plus_ratio: float = 1.0):
        """Allocate the moments, in each parameter's dtype."""
        self.parameters, self.config, self.plus_ratio = parameters, config, plus_ratio
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
        self.steps = 0
        self.scale = 1.0  # what remains to be multiplied into bf16 gradients

    def average(self, weight: int) -> float:
        """Divide the summed gradients by `weight` (target tokens); return their global norm, taken in fp32."""
        norms = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parts = parameter.grad.view(-1).split(SLICE)  # the norm of a bf16 tensor in fp32 makes an fp32 copy of it
            norms += [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
        self._multiply(1.0 / weight)
        return float(torch.linalg.vector_norm(torch.stack(norms))) / weight

    def clip(self, norm: float) -> None:
        """Scale the averaged gradients, whose global norm is `norm`, down to the configured maximum."""
        if self.config.max_grad_norm is not None and norm > self.config.max_grad_norm:
            self._multiply(self.config.max_grad_norm / (norm + 1e-6))

    def _multiply(self, factor: float) -> None:
        """Scale fp32 gradients now and bf16 ones when they are widened, so that they are not rounded again."""
        self.scale *= factor
        for parameter in self.parameters.values():
            if parameter.dtype == torch.float32:
                parameter.grad.mul_(factor)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the model with the averaged gradients, then drop these."""
        groups: dict[tuple[float, float], list[str]] = {}
        noise = None
        for name, parameter in self.parameters.items():
            ratio = self.plus_ratio if name.endswith(".lora.B") else 1.0
            rate, decay = learning_rate * ratio, self.config.weight_decay if parameter.dim() > 1 else 0.0
            if parameter.dtype == torch.float32:
                groups.setdefault((rate, decay), []).append(name)
                continue
            noise = noise_pool(parameter.device) if noise is None else noise
            self._step_rounded(name, rate, decay, noise)
        for (rate, decay), names in groups.items():
            wide = [self.parameters[name] for name in names]
            moments = ([self.moments[name][i] for name in names] for i in (0, 1))
            self._adamw(wide, [p.grad for p in wide], *moments, rate, decay)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.steps, self.scale = self.steps + 1, 1.0

    def _step_rounded(self, name: str, rate: float, decay: float, noise: torch.Tensor) -> None:
        """Update one bf16 parameter and its moments, slice by slice, in fp32."""
        parameter = self.parameters[name]
        flats = [t.view(-1) for t in (parameter.data, *self.moments[name])]
        starts = range(0, parameter.numel(), SLICE)
        offsets = torch.randint(0, POOL, (len(starts), 2)).tolist()
        for start, places in zip(starts, offsets, strict=True):
            parts = [flat[start : start + SLICE] for flat in flats]
            gradient = parameter.grad.view(-1)[start : start + SLICE].float().mul_(self.scale)
            weight, first, second = [part.float() for part in parts]
            self._adamw([weight], [gradient], [first], [second], rate, decay)
            parts[1].copy_(first)
            for value, part, place in zip((weight, second), parts[::2], places, strict=True):
                round_stochastically(value, noise[place : place + len(part)], part)

    def _adamw(self, parameters, gradients, first, second, rate: float, decay: float) -> None:
        """Call torch's kernel on lists of fp32 tensors."""
        steps = [torch.tensor(float(self.steps), device=p.device) for p in parameters]
        beta1, beta2 = self.config.betas
        adamw(
            parameters, gradients, first, second, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=rate, weight_decay=decay, eps=self.config.eps, maximize=False,
        )  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """Return all state as named tensors: `step`, `NAME.exp_avg`, `NAME.exp_avg_sq`."""
        tensors = {"step": torch.tensor(self.steps)}
        for name, (first, second) in self.moments.items():
            tensors |= {f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `state` returned; KeyError when a tensor is missing."""
        self.steps = int(tensors["step"])
        for name, (first, second) in self.moments.items():
            first.copy_(tensors[f"{name}.exp_avg"])
            second.copy_(tensors[f"{name}.exp_avg_sq"])
