"""Model surgery for LoRA: visible, recursive, reversible.

`add_lora` walks the module tree, fills the adapter slot of each linear layer that is named, freezes
everything else, and returns what it added. Wrapping layers in a second class was rejected: the base's
parameter names would change with the method.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minitune.errors import ConfigError, nearest
from minitune.model.linear import Linear, LoRA
from minitune.model.lora_config import LoRAConfig
from minitune.ops.nf4 import QuantizedTensor


def linear_modules(module: nn.Module, prefix: str = "") -> dict[str, Linear]:
    """Return the linear layers below `module` by their dotted path, without the head."""
    found: dict[str, Linear] = {}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, Linear) and name != "lm_head":
            found[path] = child
        else:
            found |= linear_modules(child, f"{path}.")
    return found


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the weights that are quantised, by the path of their layer."""
    stored = {path: layer.stored_weight for path, layer in linear_modules(model).items()}
    return {path: weight for path, weight in stored.items() if isinstance(weight, QuantizedTensor)}


def _targets(model: nn.Module, wanted: tuple[str, ...] | str) -> dict[str, Linear]:
    layers = linear_modules(model)
    if wanted == "all-linear":
        return layers
    names = (wanted,) if isinstance(wanted, str) else wanted
    chosen: dict[str, Linear] = {}
    for name in names:
        hits = {path: layer for path, layer in layers.items() if path == name or path.endswith(f".{name}")}
        if not hits:
            known = sorted({path.rsplit(".", 1)[-1] for path in layers})
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {name!r}; "
                f"there are {', '.join(known)}{nearest(name, known)}"
            )
        chosen |= hits
    return {path: layer for path, layer in layers.items() if path in chosen}


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> dict[str, LoRA]:
    """Give each targeted linear layer an adapter and freeze all other parameters.

    Args:
        model: changed in place.
        config: rank, scaling and targets.
        seed: of the draw of A; the same seed gives the same adapter on every device.

    Returns:
        The adapters by the path of their layer.

    Raises:
        ConfigError: an unknown target, or a layer that has an adapter already.
    """
    targets = _targets(model, config.target_modules)
    taken = [path for path, layer in targets.items() if layer.lora is not None]
    if taken:
        raise ConfigError(f"{taken[0]} has an adapter already; merge it or load the base without it")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = {}
    for path, layer in targets.items():
        out_features, in_features = layer.weight.shape
        layer.lora = LoRA(config, in_features, out_features, layer.weight.device).train(layer.training)
        layer.lora.reset(generator)
        added[path] = layer.lora
    return added


def lora_modules(model: nn.Module) -> dict[str, LoRA]:
    """Return the adapters of a model by the path of their layer."""
    return {path: layer.lora for path, layer in linear_modules(model).items() if layer.lora is not None}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base alone inside the block; what was off before stays off after."""
    adapters = lora_modules(model).values()
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, state in zip(adapters, before, strict=True):
            adapter.enabled = state
