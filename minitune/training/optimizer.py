"""AdamW, 8-bit AdamW and SGD, behind an interface of five verbs: average, clip, step, state, load.

The loop hands over summed gradients; with W the summed weight of the window, c the clipping norm, rate a:

    g <- sum of gradients / W;   g <- g min(1, c / (|g| + 1e-6));   AdamW(g, a)    (Loshchilov & Hutter 2019)

adamw      The update itself is torch's fused kernel in fp32. Adapters and fp32 models are updated in place. A bf16
           model keeps weights and moments in bf16, 6 bytes a parameter: slice by slice they are widened, updated in
           fp32 and rounded back, weight and second moment stochastically (`ops/rounding.py`), since rounding to
           nearest would lose most updates and never let a second moment decay (by 1/1000 a step, where bf16 resolves
           1/256; the first decays by 1/10). fp32 masters were rejected for bf16: 14 bytes a parameter; who has them
           trains in fp32.
adamw8bit  `ops/adamw8bit.py`: moments in 2.03 bytes a parameter. Embeddings, and tensors too small to matter, have
           fp32 moments.
sgd        w <- w - a (g + d w): no state at all.

With `paged` the moments lie in the computer's page-locked memory, and the GPU holds those of one parameter at a time,
while it is updated (Dettmers et al. 2023, section 3, where the driver moves them as memory runs short). The numbers are
the same; a step waits for twice the moments' bytes over the bus.

With `fused_backward` each parameter is updated in the backward pass, as soon as its gradient is whole, and the gradient
is dropped (Lv et al. 2023, LOMO, section 3.1): all gradients never exist together. The weight of the window has to be
known by then, so a window is one micro-batch, and there is no clipping by a norm that nobody knows yet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.optim.adamw import adamw

from minitune.ops.adamw8bit import adamw8bit_step, keeps_8_bits, zero_moment
from minitune.ops.rounding import POOL, noise_pool, round_stochastically
from minitune.training.config import ADAM, OptimizerConfig

SLICE = 1 << 18  # elements of a parameter that are widened at a time


class Optimizer:
    """An optimiser for named parameters, LoRA+ rates included.

    Args:
        parameters: what trains, by name; fp32 or bf16.
        config: kind, betas, epsilon, decay (of matrices, not of norms and biases), clipping norm.
        plus_ratio: rate of each adapter's B over that of its A (Hayou et al. 2024, LoRA+).
        fused_backward: update in the backward pass; `begin` goes before each.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], config: OptimizerConfig, plus_ratio: float = 1.0,
        *, fused_backward: bool = False,
    ):  # fmt: skip
        """Allocate the moments: of adamw in each parameter's dtype."""
        self.parameters, self.config, self.plus_ratio = parameters, config, plus_ratio
        self.betas, self.eps = config.betas or ADAM["betas"], config.eps or ADAM["eps"]
        keep = _page if config.paged else lambda moment: moment
        self.moments = {n: {f: keep(t) for f, t in self._zero_moments(n, p).items()} for n, p in parameters.items()}
        self.steps = 0
        self.scale = 1.0  # what remains to be multiplied into bf16 gradients
        self.noise: torch.Tensor | None = None
        self.fused_backward, self.hooks = fused_backward, []

    def _zero_moments(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        if self.config.kind == "sgd":
            return {}
        if self.config.kind == "adamw8bit" and keeps_8_bits(name, parameter):
            (first, first_absmax), (second, second_absmax) = zero_moment(parameter), zero_moment(parameter)
            return {"exp_avg": first, "exp_avg_sq": second,
                    "exp_avg_absmax": first_absmax, "exp_avg_sq_absmax": second_absmax}  # fmt: skip
        dtype = torch.float32 if self.config.kind == "adamw8bit" else parameter.dtype
        return {field: torch.zeros_like(parameter, dtype=dtype) for field in ("exp_avg", "exp_avg_sq")}

    def begin(self, weight: int, learning_rate: float) -> None:
        """Before a fused backward pass of a loss summed over `weight`: it is to update each parameter, until `step`."""
        self.scale, self.rate, self.norms, self.bad = 1.0 / weight, learning_rate, [], False
        for name, parameter in self.parameters.items():
            self.hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._step_at_once, name)))

    @torch.no_grad()
    def _step_at_once(self, name: str, parameter: nn.Parameter) -> None:
        """Update a parameter whose gradient is whole; after one that is not finite, nothing more is changed."""
        self.norms.append(_norm(parameter.grad))
        self.bad = self.bad or not torch.isfinite(self.norms[-1])
        if not self.bad:
            if parameter.dtype == torch.float32:
                parameter.grad.mul_(self.scale)
            self._step_one(name, *self._rate_and_decay(name, self.rate))
            parameter.grad = None

    def average(self, weight: int) -> float:
        """Divide the summed gradients by `weight` (target tokens); return their global norm, taken in fp32.

        After a fused backward pass they have been divided, and used.
        """
        if not self.fused_backward:
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.norms = [_norm(parameter.grad) for parameter in self.parameters.values()]
            self._multiply(1.0 / weight)
        return float(torch.linalg.vector_norm(torch.stack(self.norms))) / weight

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
        """Update the model with the averaged gradients, then drop these; after a fused backward pass, count only."""
        while self.hooks:
            self.hooks.pop().remove()
        together: dict[tuple[float, float], list[str]] = {}
        for name, parameter in self.parameters.items() if not self.fused_backward else ():
            rate_and_decay = self._rate_and_decay(name, learning_rate)
            if self.config.kind == "adamw" and parameter.dtype == torch.float32 and not self.config.paged:
                together.setdefault(rate_and_decay, []).append(name)
            else:
                self._step_one(name, *rate_and_decay)
        for (rate, decay), names in together.items():
            wide = [self.parameters[name] for name in names]
            moments = ([self.moments[name][field] for name in names] for field in ("exp_avg", "exp_avg_sq"))
            self._adamw(wide, [p.grad for p in wide], *moments, rate, decay)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.steps, self.scale, self.noise = self.steps + 1, 1.0, None

    def _rate_and_decay(self, name: str, learning_rate: float) -> tuple[float, float]:
        ratio = self.plus_ratio if name.endswith(".lora.B") else 1.0
        parameter = self.parameters[name]
        decays = parameter.dim() > 1 and not hasattr(parameter, "trained_rows")  # `model/vocabulary.py`
        return learning_rate * ratio, self.config.weight_decay if decays else 0.0

    def _step_one(self, name: str, rate: float, decay: float) -> None:
        with self._fetched(name) as moments:
            self._update(name, moments, rate, decay)

    @contextmanager
    def _fetched(self, name: str) -> Iterator[dict[str, torch.Tensor]]:
        """Give a parameter's moments, where they are paged on the parameter's device until the block ends."""
        kept = self.moments[name]
        if not self.config.paged:
            yield kept
            return
        device = self.parameters[name].device
        moments = {field: tensor.to(device, copy=True, non_blocking=True) for field, tensor in kept.items()}
        yield moments
        for field, tensor in moments.items():  # in the order of the stream, so before the next step fetches them
            kept[field].copy_(tensor, non_blocking=True)

    def _update(self, name: str, moments: dict[str, torch.Tensor], rate: float, decay: float) -> None:
        """Update one parameter and its moments, slice by slice, in fp32."""
        parameter = self.parameters[name]
        narrow = parameter.dtype == torch.bfloat16
        scale = self.scale if narrow else 1.0
        if "exp_avg_absmax" in moments:
            first, second = ((moments[field], moments[f"{field}_absmax"]) for field in ("exp_avg", "exp_avg_sq"))
            seed = int(torch.randint(1 << 31, ())) if narrow else None
            adamw8bit_step(parameter.data, parameter.grad.contiguous(), first, second, self.steps + 1, rate,
                           self.betas, self.eps, decay, scale, seed)  # fmt: skip
            return
        flats = [t.view(-1).split(SLICE) for t in (parameter.data, *moments.values())]
        gradients = parameter.grad.reshape(-1).split(SLICE)
        for gradient, *parts in zip(gradients, *flats, strict=True):
            gradient = gradient.float() if scale == 1.0 else gradient.float().mul_(scale)
            weight, *wide = (part.float() for part in parts)
            if wide:
                self._adamw([weight], [gradient], [wide[0]], [wide[1]], rate, decay)
            else:
                weight.mul_(1 - rate * decay).add_(gradient, alpha=-rate)
            for value, part, stochastic in zip((weight, *wide), parts, (True, False, True), strict=False):
                self._store(value, part, stochastic)

    def _store(self, value: torch.Tensor, place: torch.Tensor, stochastic: bool) -> None:
        """Round value (n,), fp32, into place; where place is fp32 it is value itself."""
        if place.dtype == torch.float32:
            return
        if not stochastic:
            place.copy_(value)
            return
        if self.noise is None:
            self.noise = noise_pool(place.device)
        start = int(torch.randint(0, POOL, ()))
        round_stochastically(value, self.noise[start : start + len(place)], place)

    def _adamw(self, parameters, gradients, first, second, rate: float, decay: float) -> None:
        """Call torch's kernel on lists of fp32 tensors."""
        steps = [torch.tensor(float(self.steps), device=p.device) for p in parameters]
        beta1, beta2 = self.betas
        adamw(
            parameters, gradients, first, second, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=rate, weight_decay=decay, eps=self.eps, maximize=False,
        )  # fmt: skip

    def _wait(self) -> None:
        """Wait until paged moments are back in the computer's memory."""
        for device in {p.device for p in self.parameters.values() if p.is_cuda and self.config.paged}:
            torch.cuda.synchronize(device)

    def state(self) -> dict[str, torch.Tensor]:
        """Return all state as named tensors: `step`, and `NAME.exp_avg` and the like."""
        self._wait()
        named = {f"{n}.{field}": tensor for n, moments in self.moments.items() for field, tensor in moments.items()}
        return {"step": torch.tensor(self.steps), **named}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `state` returned; KeyError when a tensor is missing."""
        self._wait()
        self.steps = int(tensors["step"])
        for name, moments in self.moments.items():
            for field, tensor in moments.items():
                tensor.copy_(tensors[f"{name}.{field}"])


def _page(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in the computer's memory, page-locked where the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """Return the norm in fp32, slice by slice: of a bf16 tensor it would be that of an fp32 copy."""
    parts = gradient.reshape(-1).split(SLICE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in parts]))
