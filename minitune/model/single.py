"""One new token of one text on a CPU: what `Transformer.hidden` does, in as few operations as there can be.

With one row an operation costs its call, not its arithmetic. Each weight matrix drives the code of the operations out
of the caches, so that they take four times what they take in a loop of their own. Hence nothing is looked up, checked
or laid out here that can be beforehand, and queries and keys turn together. SmolLM2-135M in bf16 on two threads of an
AMX processor: 23 ms a token instead of 34, of which 15 to 17 read the weights; with LoRA 36 instead of 62.

There is no such plan for quantised weights, DoRA, ropes that depend on a text's length, hooks, modules of other classes
or with a `forward` of their own, training, weights that are not stacked, other devices: then the modules do it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from minitune.model.adapters import LoRA, Several
from minitune.model.cache import KVCache
from minitune.model.config import ModelConfig
from minitune.model.linear import Linear
from minitune.model.lora import linear_modules
from minitune.model.rope import Rope
from minitune.model.transformer import MLP, Attention, Layer, RMSNorm, Transformer
from minitune.ops.attention import Visibility, attention
from minitune.ops.linear import Adapter, join_adapters, stacked
from minitune.ops.swiglu import ACTIVATIONS, GATED_UNITS

Map = Callable[[torch.Tensor], torch.Tensor]  # of a vector to a vector

_ALL = Visibility(None, causal=False)
_KINDS = (Layer, Attention, MLP, Linear, RMSNorm)


def single_pass(model: Transformer, cache: KVCache) -> Map | None:
    """Return a map from the next token (1, 1) of the text in `cache` to its final hidden state (1, 1, D).

    It takes no gradient, and holds while weights and the choice of adapters stay as they are. None: there is no plan.
    """
    config, decoder = model.config, model.model
    planned = all(_planned(layer) for layer in linear_modules(model).values())
    stacks = [stack for layer in decoder.layers for stack in (*layer.self_attn.stacks(), *layer.mlp.stacks())]
    if not planned or not _ordinary(model) or config.by_length or model.device.type != "cpu":
        return None
    if any(stacked([layer.weight for layer in stack]) is None for stack in stacks):
        return None  # to join them would take their memory again
    layers, norm = [_layer(layer) for layer in decoder.layers], _norm(decoder.norm)
    reach = [(config.layer_rope(index), config.window(index)) for index in range(config.num_layers)]

    @torch.no_grad()
    def step(token: torch.Tensor) -> torch.Tensor:
        place = torch.full_like(token, cache.length)
        h = model.embedded(token, place).view(-1)
        for layer, room in zip(layers, _rooms(config, reach, cache, place), strict=True):
            h = layer(h, room)
        cache.advance(1)
        h = norm(h).view(1, 1, -1)
        return h if config.logits_scale == 1 else h / config.logits_scale

    return step


class _Room(NamedTuple):
    """What one layer needs to know of one place in the text; made for all layers at once, while that code is warm."""

    tables: tuple[torch.Tensor, torch.Tensor] | None
    """Of rope, for whole heads, each (r,): (cos, cos) and (-sin, sin)."""
    key: torch.Tensor
    """Where this token's keys go, (1, K, 1, d)."""
    value: torch.Tensor
    keys: torch.Tensor
    """Those that it sees, (1, K, S, d), its own among them."""
    values: torch.Tensor


def _rooms(
    config: ModelConfig, reach: list[tuple[Rope | None, int | None]], cache: KVCache, place: torch.Tensor
) -> list[_Room]:
    """Return every layer's room for the token at `place` (1, 1); `reach` has each layer's rope and window."""
    end, tables = cache.end(1), {None: None}
    for rope in {rope for rope, _ in reach} - {None}:
        cos, sin = rope.tables(place, config.head_dim, config.max_positions)
        tables[rope] = torch.cat((cos, cos), -1).view(-1), torch.cat((-sin, sin), -1).view(-1)
    rooms = []
    for (rope, window), keys, values in zip(reach, cache.keys, cache.values, strict=True):
        seen = slice(0 if window is None else max(0, end - window), end)
        new = keys[:, :, end - 1 : end], values[:, :, end - 1 : end]
        rooms.append(_Room(tables[rope], *new, keys[:, :, seen], values[:, :, seen]))
    return rooms


def _ordinary(model: Transformer) -> bool:
    """Tell whether calling the modules does what their classes here say, with nothing beside it."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    return not any(
        module.training or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        or isinstance(module, _KINDS) and type(module) not in _KINDS
        or isinstance(module, RMSNorm) and module.weight.dtype != model.dtype
        for module in model.modules()
    )  # fmt: skip


def _planned(layer: Linear) -> bool:
    lora = _adapter(layer)
    mixed = isinstance(layer.lora, Several) and layer.lora.choice.groups is not None
    return isinstance(layer.stored_weight, torch.Tensor) and not mixed and (lora is None or lora.magnitude is None)


def _adapter(layer: Linear) -> LoRA | None:
    """Return the adapter that is on."""
    return layer.chosen if layer.chosen is not None and layer.chosen.enabled else None


def _layer(layer: Layer) -> Callable[[torch.Tensor, _Room], torch.Tensor]:
    """As `Layer.forward`."""
    before, after, before_mlp, after_mlp = (_norm(name and getattr(layer, name)) for name in layer.places)
    attend, feed, scale = _attention(layer.self_attn), _mlp(layer.mlp), layer.residual_scale

    def apply(h: torch.Tensor, room: _Room) -> torch.Tensor:
        part = after(attend(before(h), room))
        mixed = h + (part if scale == 1 else part * scale)
        part = after_mlp(feed(before_mlp(h if layer.parallel else mixed)))
        return mixed + (part if scale == 1 else part * scale)

    return apply


def _norm(module: torch.nn.Module | None) -> Map:
    """Return a norm's map; that of a norm that is not there changes nothing."""
    if module is None:
        return lambda x: x
    if not isinstance(module, RMSNorm) or module.offset:
        return module
    weight, eps = module.weight.detach(), module.eps
    width, doubled = len(weight), (2 * len(weight),)

    def apply(x: torch.Tensor) -> torch.Tensor:
        """The mean of (x, -x) is 0, so its layer norm, one operation of torch's, holds x over its root mean square."""
        both = torch.layer_norm(torch.cat((x, -x), dim=-1), doubled, None, None, eps)
        return both.narrow(-1, 0, width).mul_(weight)

    return apply


def _linear(*layers: Linear) -> Map:
    """Return the layers' map from one input (in,) to all their outputs (sum out,)."""
    weight, bias = stacked([layer.weight.detach() for layer in layers]), None
    if any(layer.bias is not None for layer in layers):
        parts = [layer.bias if layer.bias is not None else weight.new_zeros(len(layer.weight)) for layer in layers]
        bias = torch.cat([part.detach() for part in parts])
    loras = [_adapter(layer) for layer in layers]
    if not any(loras):
        return weight.mv if bias is None else lambda x: torch.addmv(bias, weight, x)
    adapters = [lora and Adapter(*(part.detach() for part in lora.factors()), lora.scaling) for lora in loras]
    a, b = join_adapters(adapters, [len(layer.weight) for layer in layers], weight)

    def apply(x: torch.Tensor) -> torch.Tensor:
        y = weight.mv(x) if bias is None else torch.addmv(bias, weight, x)
        return y.addmv_(b, a.mv(x))

    return apply


def _mlp(block: MLP) -> Map:
    """As `MLP.forward`."""
    down = _linear(block.down_proj)
    if not block.gated:
        up, act = _linear(block.up_proj), ACTIVATIONS[block.activation]
        return lambda x: down(act(up(x)))
    joint = _linear(block.gate_up_proj) if block.fused else _linear(block.gate_proj, block.up_proj)
    unit = GATED_UNITS[block.activation]
    return lambda x: down(unit(*joint(x).chunk(2)))


def _attention(block: Attention) -> Callable[[torch.Tensor, _Room], torch.Tensor]:
    """As `Attention.forward` with a cache."""
    config, d = block.config, block.head_dim
    heads, shared, normed = config.num_heads, config.num_kv_heads, config.qk_norm
    joint = _linear(block.q_proj, block.k_proj, block.v_proj) if config.fused == "none" else _linear(block.qkv_proj)
    norms = (_norm(block.q_norm), _norm(block.k_norm)) if normed != "none" else None
    out, scale, softcap = _linear(block.o_proj), config.attention_scale, config.attention_softcap

    def apply(x: torch.Tensor, room: _Room) -> torch.Tensor:
        y = joint(x)
        if config.fused == "by_head":  # q, k and v of the first head, then of the second
            y = y.view(heads, 3, d).transpose(0, 1).reshape(-1)
        qk, v = y.view(1, -1, 1, d).split((heads + shared, shared), dim=1)
        if norms is not None:
            parts = qk.split((heads, shared), dim=1)
            parts = parts if normed == "head" else [part.flatten() for part in parts]
            qk = torch.cat([norm(part).view(1, -1, 1, d) for norm, part in zip(norms, parts, strict=True)], dim=1)
        if room.tables is not None:
            qk = _turn(qk, *room.tables)
        q, k = qk.split((heads, shared), dim=1)
        room.key.copy_(k)
        room.value.copy_(v)
        return out(attention(q, room.keys, room.values, _ALL, scale=scale, softcap=softcap).view(-1))

    return apply


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first r elements of heads x (1, n, 1, d) by tables (r,): (a, b) -> (a, b) cos + (b, a) (-sin, sin).

    The tables are fp32, so products and their sum are fp32 at least, rounded once.
    """
    width = cos.shape[0]
    if width < x.shape[-1]:
        return torch.cat((_turn(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    swapped = x.view(*x.shape[:-1], 2, -1).flip(-2).view(x.shape)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)
