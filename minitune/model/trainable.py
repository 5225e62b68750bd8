"""Which parameters train: all, the adapters, the upper layers, or those whose name matches a pattern."""

import re
from collections.abc import Iterable

from torch import nn

from minitune.errors import ConfigError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_all(model: nn.Module) -> dict[str, nn.Parameter]:
    """Train every parameter."""
    model.requires_grad_(True)
    return trainable_parameters(model)


def train_last_layers(model: nn.Module, count: int) -> dict[str, nn.Parameter]:
    """Train the last `count` layers and the final norm; the embedding and the head stay as they are.

    Raises:
        ConfigError: `count` is not between 1 and the number of layers.
    """
    layers = model.model.layers
    if not 1 <= count <= len(layers):
        raise ConfigError(f"last_layers is {count}; it must be 1 to {len(layers)}, the layers of the model")
    model.requires_grad_(False)
    for module in (*layers[len(layers) - count :], model.model.norm):
        module.requires_grad_(True)
    return trainable_parameters(model)


def freeze_below(model: nn.Module, count: int) -> None:
    """Stop training the lowest `count` layers and the embedding below them, a head that is tied to it included.

    Raises:
        ConfigError: no layer would be left to train.
    """
    layers = model.model.layers
    if count >= len(layers):
        raise ConfigError(f"freeze_layers is {count}; it must be below {len(layers)}, the layers of the model")
    for module in (*layers[:count], model.model.embed_tokens, getattr(model.model, "embed_positions", None)):
        if module is not None:
            module.requires_grad_(False)


def train_whole(model: nn.Module, modules: Iterable[str]) -> None:
    """Let every parameter of the modules of these names train too, beside what trains already.

    Raises:
        ConfigError: there is no such module, it has no weights (a tied head, one in 4 bits), or an adapter.
    """
    for name in modules:
        found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
        own = [parameter for module in found for parameter in module.named_parameters()]
        if not own:
            raise ConfigError(f"lora.modules_to_save: no module {name!r} has weights of its own that could train")
        if any(".lora." in f".{inner}" for inner, _ in own):
            raise ConfigError(f"lora.modules_to_save: {name!r} has an adapter; leave it out of lora.target_modules")
        for _, parameter in own:
            parameter.requires_grad_(True)


def train_matching(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Train the parameters in whose name the regular expression `pattern` is found.

    Raises:
        ConfigError: the pattern is not a regular expression, or matches nothing.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    names = [name for name, _ in model.named_parameters() if expression.search(name)]
    if not names:
        example = next(name for name, _ in model.named_parameters())
        raise ConfigError(f"pattern {pattern!r} matches no parameter; a name looks like {example}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return trainable_parameters(model)
