"""Random models in 4 bits, the same numbers for both sides, made layer by layer: nothing is ever held in 16 bits.

A weight is drawn on the device from a seed that follows from its name, quantised and dropped, so a model of 8 billion
parameters takes 0.5 bytes for each weight of its layers and the room of one weight besides.
"""

import zlib
from typing import Any

import torch

from bench.cases import SHAPES

SCALE = 0.02  # standard deviation, that of a freshly drawn Llama


def drawn(name: str, shape: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return the weight of this name: ones for a norm, else normal numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(SCALE)


def ours(shape: str, dtype: torch.dtype, device: str) -> Any:
    """Return our model in NF4 with double quantisation."""
    from minitune.model.config import ModelConfig
    from minitune.model.linear import Linear
    from minitune.model.transformer import Transformer
    from minitune.ops.nf4 import quantize

    config = ModelConfig.from_hf({"model_type": "llama", **SHAPES[shape]})
    model = Transformer(config, dtype=dtype, device="meta", init=False)
    for name, place in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(parent), drawn(name, place.shape, dtype, device)
        if isinstance(module, Linear) and module is not model.lm_head:
            module.replace_weight(quantize(weight, "nf4", double_quant=True))
        else:
            setattr(module, leaf, torch.nn.Parameter(weight))
    return model


def transformers_4bit(shape: str, dtype: torch.dtype, device: str) -> Any:
    """Return transformers' model with bitsandbytes' NF4 layers, double-quantised, as its loader would build it."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"compress_statistics": True, "quant_type": "nf4"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    for name, place in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(parent), drawn(name, place.shape, dtype, device)
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            layer = bnb.nn.Linear4bit(
                place.shape[1], place.shape[0], bias=False, compute_dtype=dtype, device="meta", **options
            )
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(device)
            model.set_submodule(parent, layer)
        else:
            setattr(module, leaf, torch.nn.Parameter(weight))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its tables were left on "meta"
    model.tie_weights()
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model
