"""Model surgery for adapters: visible, recursive, reversible.

`add_lora` walks the module tree, fills the adapter slot of each linear layer that is named, freezes
everything else, and returns what it added. Wrapping layers in a second class was rejected: the base's
parameter names would change with the method.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minitune.errors import ConfigError, nearest
from minitune.model.adapters import LoRA
from minitune.model.linear import Linear
from minitune.model.lora_config import LoRAConfig
from minitune.model.names import checkpoint_name
from minitune.model.transformer import Transformer
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


def _targets(model: Transformer, wanted: tuple[str, ...] | str, first_layer: int) -> dict[str, Linear]:
    """Return the layers that are wanted, by our names or by those of the family's checkpoints."""
    below = tuple(f"model.layers.{number}." for number in range(first_layer))
    layers = {path: layer for path, layer in linear_modules(model).items() if not path.startswith(below)}
    theirs = {path: checkpoint_name(model.config, path) for path in layers}
    if wanted == "all-linear":
        return layers
    names = (wanted,) if isinstance(wanted, str) else wanted
    chosen: dict[str, Linear] = {}
    for name in names:
        called = {path: (f".{path}", f".{theirs[path]}") for path in layers}
        hits = {path: layer for path, layer in layers.items() if any(one.endswith(f".{name}") for one in called[path])}
        if not hits:
            known = sorted({path.rsplit(".", 1)[-1] for path in theirs.values()})
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {name!r}; "
                f"there are {', '.join(known)}{nearest(name, known)}"
            )
        chosen |= hits
    return {path: layer for path, layer in layers.items() if path in chosen}


def add_lora(model: Transformer, config: LoRAConfig, *, seed: int = 0, first_layer: int = 0) -> dict[str, LoRA]:
    """Give each targeted linear layer an adapter and freeze all other parameters.

    Args:
        model: changed in place.
        config: rank, scaling and targets.
        seed: of the draw of A; the same seed gives the same adapter on every device.
        first_layer: the number of layers, from the lowest, that get no adapter.

    Returns:
        The adapters by the path of their layer.

    Raises:
        ConfigError: an unknown target, or a layer that has an adapter already.
    """
    return install(model, dict.fromkeys(_targets(model, config.target_modules, first_layer), config), seed=seed)


def install(model: nn.Module, configs: dict[str, LoRAConfig], *, seed: int = 0) -> dict[str, LoRA]:
    """Give each layer, by its path, the adapter of its own settings, and freeze all other parameters.

    Args, result and errors as for `add_lora`; the model is unchanged where one of them cannot be made.
    """
    layers = linear_modules(model)
    taken = [path for path in configs if layers[path].lora is not None]
    if taken:
        raise ConfigError(f"{taken[0]} has an adapter already; merge it or load the base without it")
    added = make_adapters(model, configs, seed=seed)
    model.requires_grad_(False)
    for path, lora in added.items():
        layers[path].lora = lora
    return added


def make_adapters(model: nn.Module, configs: dict[str, LoRAConfig], *, seed: int = 0) -> dict[str, LoRA]:
    """Return an adapter for each layer, by its path, in no slot yet; ConfigError where one cannot be made."""
    generator, layers, made = torch.Generator().manual_seed(seed), linear_modules(model), {}
    for path, config in configs.items():
        layer = layers[path]
        out_features, in_features = layer.weight.shape
        made[path] = LoRA(config, in_features, out_features, layer.weight.device).train(layer.training)
        made[path].reset(generator, layer.stored_weight)
    return made


def lora_modules(model: nn.Module) -> dict[str, LoRA]:
    """Return an adapter of each layer that has any, by its path: of several the chosen one, else the first."""
    slots = {path: layer for path, layer in linear_modules(model).items() if layer.lora is not None}
    return {path: layer.chosen or next(iter(layer.lora.named.values())) for path, layer in slots.items()}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base alone inside the block; what was off before stays off after.

    Parameters of the base that were trained beside its adapters (embeddings, biases) stay as they are now.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoRA)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, state in zip(adapters, before, strict=True):
            adapter.enabled = state


@contextmanager
def hold_scales(model: nn.Module) -> Iterator[None]:
    """Compute DoRA's row scales once for the block, in which no weight may change; else each pass computes them."""
    slots = [(layer, layer.lora.modules()) for layer in linear_modules(model).values() if layer.lora is not None]
    held = [(lora, layer) for layer, inner in slots for lora in inner if getattr(lora, "magnitude", None) is not None]
    try:
        for lora, layer in held:
            lora.held_scales = lora.row_scales(layer.stored_weight).detach()
        yield
    finally:
        for lora, _ in held:
            lora.held_scales = None
