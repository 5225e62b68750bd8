"""The same tiny model twice: drawn and saved by transformers, loaded from that folder by the engine."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import minitune
from minitune.model.config import ModelConfig
from minitune.model.names import checkpoint_name, is_transposed
from minitune.model.transformer import Transformer
from tests.parity.cases import LENGTH, VOCABULARY, Case


@dataclass
class Twins:
    """Our model and transformers', of equal weights, and the folder that both were read from."""

    ours: Transformer
    theirs: nn.Module
    folder: Path

    @property
    def config(self) -> ModelConfig:
        """Of our model."""
        return self.ours.config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its remarks on tiny models' configs."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Draw weights of the size of a trained model's: activations near 1, norms away from theirs, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fresh = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(fresh * 0.15)
        else:  # added: a norm's weight is near 1, or 0 where the family adds 1 to it
            parameter.add_(fresh * 0.3)


def write(case: Case, folder: Path) -> nn.Module:
    """Save a model of transformers to `folder` and return it."""
    from transformers import AutoModelForCausalLM

    with quiet():
        theirs = AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager").float().eval()
        draw(theirs, zlib.crc32(case.name.encode()))
        theirs.save_pretrained(folder)
    return theirs


def twins(case: Case, folder: Path) -> Twins:
    """Return both models in fp32."""
    theirs = write(case, folder)
    return Twins(minitune.load_model(folder, dtype="float32"), theirs, folder)


def rewritten(folder: Path, target: Path, tensors=None, **changes) -> Path:
    """Copy a checkpoint with other config fields (None removes nothing: it is written) or other tensors."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    fields = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    save_file(tensors(weights) if tensors else weights, target / "model.safetensors", {"format": "pt"})
    return target


def their_layers(model: nn.Module) -> nn.ModuleList:
    """Return transformers' layers, whatever the family calls them."""
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def their_forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits (B, T, V) of a model that has seen nothing before.

    transformers' dynamic rope keeps the frequencies of the longest text so far for shorter ones after it, so that its
    answers depend on what was asked before; they are reset here.
    """
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()
    return model(input_ids=ids, use_cache=False, return_dict=True).logits


def layer_outputs(layers: nn.ModuleList, forward, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the hidden state after each layer, by hooks, and the logits."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    logits = forward(ids)
    for hook in hooks:
        hook.remove()
    return seen, logits


def our_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Return our gradients by the family's own tensor names, in its layout."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.T if is_transposed(model.config, name) else parameter.grad
            found[checkpoint_name(model.config, name)] = grad
    return found


def token_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Draw ids (B, T)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
