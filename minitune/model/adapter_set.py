"""Several adapters on one base: by name in the slots of its layers, one chosen, or one for each row of a batch.

A batch of mixed rows reads the base's weights once, as one without adapters does, and adds each row's own update. The
rejected alternative, a batch for each adapter, reads them as often as there are adapters.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minitune.errors import ConfigError, nearest
from minitune.model.adapters import Choice, LoRA, Several
from minitune.model.lora import linear_modules, make_adapters
from minitune.model.lora_config import LoRAConfig


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters; none where it has no adapter, or one without a name."""
    slots = [layer.lora for layer in linear_modules(model).values() if isinstance(layer.lora, Several)]
    return list(dict.fromkeys(name for slot in slots for name in slot.named))


def add_named(model: nn.Module, name: str, adapters: Mapping[str, LoRA]) -> None:
    """Put adapters, by the path of their layer, into the slots under one name; the model's first is chosen at once.

    Raises ConfigError for a name that is taken or no plain word, and for a model whose adapter has no name.
    """
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"an adapter cannot be called {name!r}; use letters, digits, - and _, and no Python method")
    if name in adapter_names(model):
        raise ConfigError(f"there is an adapter called {name!r} already")
    layers = linear_modules(model)
    if any(isinstance(layer.lora, LoRA) for layer in layers.values()):
        raise ConfigError("the model has an adapter without a name; load it with the others, by name")
    choice = _choice(model) or Choice(name)
    model.requires_grad_(False)
    for path, lora in adapters.items():
        if layers[path].lora is None:
            layers[path].lora = Several(choice)
        layers[path].lora.named[name] = lora


def choose(model: nn.Module, name: str | None) -> None:
    """Switch one of a model's adapters on, by its name, and the others off; None is the base alone.

    Raises ConfigError for an unknown name.
    """
    check_names(model, [name])
    choice = _choice(model)
    if choice is not None:
        choice.name = name


def chosen_name(model: nn.Module) -> str | None:
    """Return the name of the adapter that is on; None where it is the base, or one without a name."""
    choice = _choice(model)
    return None if choice is None else choice.name


def check_names(model: nn.Module, names: Sequence[str | None]) -> None:
    """Raise ConfigError for the first name that none of the model's adapters has.

    None, the base alone, passes unless the model's adapter has no name: such a one cannot be set aside.
    """
    known = adapter_names(model)
    if None in names and any(isinstance(layer.lora, LoRA) for layer in linear_modules(model).values()):
        raise ConfigError('the adapter has no name by which to leave it out; load it as "[poet=FOLDER]"')
    for name in names:
        if name is not None and name not in known:
            there = f"there are {', '.join(known)}" if known else "load several by name first"
            raise ConfigError(f"no adapter is called {name!r}; {there}{nearest(str(name), known)}")


@contextmanager
def chosen_rows(model: nn.Module, names: Sequence[str | None] | None) -> Iterator[None]:
    """Give each row of the batches that run in the block the adapter of its name; None leaves the model as it is.

    Mixed rows take no gradient.
    """
    choice = None if names is None else _choice(model)
    if choice is None:
        yield
        return
    before = choice.name, choice.groups
    distinct = list(dict.fromkeys(names))
    try:
        if len(distinct) == 1:
            choice.name, choice.groups = distinct[0], None
        else:
            rows = {name: [row for row, one in enumerate(names) if one == name] for name in distinct}
            device = next(model.parameters()).device
            groups = ((name, torch.tensor(found, device=device)) for name, found in rows.items())
            choice.groups = [(name, found) for name, found in groups if name is not None]
        yield
    finally:
        choice.name, choice.groups = before


def combine(model: nn.Module, name: str, weights: Mapping[str, float], *, kind: str = "cat") -> None:
    """Add the weighted sum of some of a model's adapters as another one called `name`, and choose it.

    cat      A = [w1 s1 A1; w2 s2 A2; ...], B = [B1, B2, ...]: exactly the sum of the updates, of the sum of the ranks
    linear   A = sum of +-(|wi si|)^1/2 Ai, B = sum of (|wi si|)^1/2 Bi: of one rank, and only near the sum, since
             each A meets the other's B too

    Both are those of PEFT's `add_weighted_adapter`.

    Raises:
        ConfigError: an unknown adapter or kind, a DoRA (whose update is no sum), or ranks that differ in linear.
    """
    if kind not in ("cat", "linear") or not weights:
        raise ConfigError(f"adapters are combined by cat or linear, each with a weight; found {kind!r}, {weights}")
    check_names(model, list(weights))
    made = {}
    for path, layer in linear_modules(model).items():
        found = {one: layer.lora.get(one) for one in weights} if isinstance(layer.lora, Several) else {}
        parts = [(lora, weights[one]) for one, lora in found.items() if lora is not None]
        if any(lora.magnitude is not None for lora, _ in parts):
            raise ConfigError(f"{path} has a DoRA, whose update is no sum; use one such adapter by itself")
        if parts:
            factors = [(*lora.factors(), weight * lora.scaling) for lora, weight in parts]
            made[path] = _concatenated(factors) if kind == "cat" else _summed(factors, path)
    _add_factors(model, name, made)
    choose(model, name)


def _concatenated(factors: list[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the sum of w B A."""
    return torch.cat([scale * a for a, _, scale in factors]), torch.cat([b for _, b, _ in factors], dim=1)


def _summed(factors: list[tuple[torch.Tensor, torch.Tensor, float]], path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of the A's and of the B's, each by the root of its weight, the sign on A's side."""
    ranks = [len(a) for a, _, _ in factors]
    if len(set(ranks)) > 1:
        raise ConfigError(f"{path} has adapters of ranks {ranks}; combine them by cat")
    roots = [math.sqrt(abs(scale)) for _, _, scale in factors]
    parts = [(math.copysign(root, scale) * a, root * b) for root, (a, b, scale) in zip(roots, factors, strict=True)]
    return sum(a for a, _ in parts), sum(b for _, b in parts)


@torch.no_grad()
def _add_factors(model: nn.Module, name: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Add an adapter with the scaling 1 and these A and B, by the path of their layer."""
    configs = {path: LoRAConfig(rank=len(a), alpha=float(len(a))) for path, (a, _) in factors.items()}
    adapters = make_adapters(model, configs)
    for path, lora in adapters.items():
        lora.A.copy_(factors[path][0])
        lora.B.copy_(factors[path][1])
    add_named(model, name, adapters)


def _choice(model: nn.Module) -> Choice | None:
    """Return what all layers of a model with named adapters share."""
    slots = (layer.lora for layer in linear_modules(model).values())
    return next((slot.choice for slot in slots if isinstance(slot, Several)), None)
