"""The model that a command works on: the options that commands share, and the one way to load what they name."""

import os.path
from dataclasses import dataclass
from typing import Any, Literal

from minitune.errors import ConfigError, counted, nearest


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is kept and computed."""

    model: str = "smollm2-135m-instruct"
    """A fetched model's name, a Hugging Face folder or a GGUF file."""
    adapter: tuple[str, ...] | str | None = None
    """A PEFT adapter folder to put on it, or several by name, as [poet=runs/poet/adapter,judge=runs/judge/adapter]."""
    use: str | None = None
    """Of several adapters: the one that is on (default: the first)."""
    weights: tuple[float, ...] | None = None
    """Of several adapters: use their sum with these weights, as [0.7,0.3]."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic; auto is bfloat16 where the processor is fast at it."""
    quantize: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    """Keep the linear layers' weights in 4 or 8 bits; auto does as the adapter's training did."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Triton's kernels or PyTorch alone; auto takes the kernels on a GPU."""

    @property
    def adapters(self) -> dict[str, str] | str | None:
        """What `load_model` takes: a folder, or folders by name; ConfigError for options that contradict each other."""
        return check_adapters(self.adapter, self.use, self.weights)

    def load(self) -> tuple[Any, Any]:
        """Return the model, in evaluation mode, and its tokenizer.

        Raises:
            ConfigError: a device or backend that is not here. CheckpointError: as `load_model`, and where the
                tokenizer has ids that the model lacks.
        """
        adapters = self.adapters
        from minitune.checkpoint.load import load_model, load_tokenizer
        from minitune.device import choose_device, choose_dtype
        from minitune.ops.backend import set_backend

        set_backend(self.backend)
        tokenizer = load_tokenizer(self.model, adapter=adapters)
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        model = load_model(self.model, dtype=dtype, device=device, adapter=adapters, quantize=self.quantize)
        choose_adapters(model, self.use, adapters, self.weights)
        tokenizer.check_fits(model.config.vocab_size)
        return model, tokenizer


def check_adapters(
    adapter: tuple[str, ...] | str | None, use: str | None, weights: tuple[float, ...] | None
) -> dict[str, str] | str | None:
    """Return the option `adapter` as `load_model` takes it: a folder, or folders by name.

    Raises ConfigError for several without names or brackets, and for `use` or `weights` that do not go with them.
    """
    if isinstance(adapter, str) and "=" in adapter and not os.path.exists(os.path.expanduser(adapter)):
        raise ConfigError(f'adapter is {adapter}, no such folder; with names, brackets: --adapter "[{adapter}]"')
    several = {} if adapter is None or isinstance(adapter, str) else dict(one.partition("=")[::2] for one in adapter)
    if several and (len(several) < len(adapter) or not all(several.values())):
        raise ConfigError(f"adapter is {list(adapter)}; several need a name each, as [poet=FOLDER,judge=FOLDER]")
    for name, value in (("use", use), ("weights", weights)):
        if value is not None and not several:
            raise ConfigError(f"{name} is set without several adapters, to which it belongs; leave it out")
    if use is not None and weights is not None:
        raise ConfigError("use takes one adapter and weights their sum; leave one of them out")
    if use is not None and use not in several:
        raise ConfigError(f"use is {use!r}; there are {', '.join(several)}{nearest(use, several)}")
    if weights is not None and len(weights) != len(several):
        raise ConfigError(f"there are {len(weights)} weights for {counted(len(several), 'adapter')}")
    return several or adapter


def choose_adapters(model: Any, use: str | None, adapters: Any, weights: tuple[float, ...] | None) -> None:
    """Switch on the adapter called `use`, or the sum of all with these weights; without either, leave the first on."""
    from minitune.model.adapter_set import choose, combine

    if weights is not None:
        combine(model, "sum", dict(zip(adapters, weights, strict=True)))
    elif use is not None:
        choose(model, use)
