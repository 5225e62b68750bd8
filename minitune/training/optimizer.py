"""AdamW over fp32 masters, behind an interface of five verbs: average, clip, step, state, load.

The loop hands over summed gradients; with W the summed weight of the window, c the clipping norm, rate a:

    g <- sum of gradients / W;   g <- g min(1, c / (|g| + 1e-6));   AdamW(g, a)    (Loshchilov & Hutter 2019)

An fp32 parameter is its own master. A bf16 parameter has an fp32 copy here, which AdamW updates and which is
then rounded into the model: bf16 keeps 8 bits, so an update below 1/256 of a weight would round away, and
training would stand still without a word. Updating bf16 weights directly was rejected for that reason.
"""

import torch
from torch import nn

from minitune.training.config import OptimizerConfig


class Optimizer:
    """AdamW for named parameters, LoRA+ rates included.

    Args:
        parameters: what trains, by name.
        config: betas, epsilon, decay, clipping norm.
        plus_ratio: rate of each adapter's B over that of its A (Hayou et al. 2024, LoRA+).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig, plus_ratio: float = 1.0):
        """Make the masters and the groups; moments appear at the first step."""
        self.parameters = parameters
        self.max_grad_norm = config.max_grad_norm
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            ratio = plus_ratio if name.endswith(".lora.B") else 1.0
            groups.setdefault((ratio, config.weight_decay if master.dim() > 1 else 0.0), []).append(master)
        self.adamw = torch.optim.AdamW(
            [{"params": g, "ratio": ratio, "weight_decay": decay} for (ratio, decay), g in groups.items()],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            fused=all(p.device.type in ("cpu", "cuda") for p in parameters.values()),
        )

    def average(self, weight: int) -> float:
        """Divide the summed gradients by `weight` (target tokens) in fp32; return their global norm."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.masters[name] is not parameter:
                self.masters[name].grad = parameter.grad.float()
        gradients = [master.grad for master in self.masters.values()]
        torch._foreach_div_(gradients, float(weight))
        return float(nn.utils.get_total_norm(gradients))

    def clip(self, norm: float) -> None:
        """Scale the averaged gradients, whose global norm is `norm`, down to the configured maximum."""
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            torch._foreach_mul_([m.grad for m in self.masters.values()], self.max_grad_norm / (norm + 1e-6))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update masters and model with the averaged gradients, then drop these."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self.adamw.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
                self.masters[name].grad = None
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Return all state as named tensors: `NAME.exp_avg`, `.exp_avg_sq`, `.step`, `.master`."""
        tensors = {}
        for name, master in self.masters.items():
            tensors |= {f"{name}.{key}": value for key, value in self.adamw.state[master].items()}
            if master is not self.parameters[name]:
                tensors[f"{name}.master"] = master.detach()
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `state` returned; KeyError when a tensor is missing."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.copy_(tensors[f"{name}.master"])
            if f"{name}.step" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.adamw.state[master] = {key: tensors[f"{name}.{key}"].to(master.device) for key in keys}
