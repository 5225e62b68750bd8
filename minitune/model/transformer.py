"""The one transformer: token ids in, logits out.

    h = E[ids];   for each layer:  h += Attention(norm(h));  h += MLP(norm(h));   logits = norm(h) W_head^T

Modules carry the Hugging Face Llama names, so a checkpoint's tensor names are this model's. A family is
values in `ModelConfig`; there is no branch on a family's name here.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitune.errors import ConfigError, DataError
from minitune.model.cache import KVCache
from minitune.model.config import ModelConfig
from minitune.model.families import FAMILIES
from minitune.model.linear import Linear, QuantizedWeight, ScoreHead, linear_group, project
from minitune.model.rope import Rope
from minitune.ops.attention import Visibility, attention, visibility
from minitune.ops.linear import Remade, stacked
from minitune.ops.norm import rms_norm
from minitune.ops.precision import widen
from minitune.ops.rope import apply_rope
from minitune.ops.swiglu import ACTIVATIONS, GATED_UNITS


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, scaled by offset + weight (D,)."""

    def __init__(self, width: int, config: ModelConfig, dtype, device):
        """Start at a scale of 1."""
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., D)."""
        return rms_norm(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.LayerNorm):
    """Normalisation to mean 0 and variance 1 over the last dimension, with weight and bias (D,) (Ba et al. 2016)."""

    def __init__(self, width: int, config: ModelConfig, dtype, device):
        """Start at weight 1 and bias 0."""
        super().__init__(width, config.norm_eps, dtype=dtype, device=device)


_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def new_norm(config: ModelConfig, width: int, dtype, device) -> RMSNorm | LayerNorm:
    """Return a norm of the config's kind."""
    return _NORMS[config.norm](width, config, dtype, device)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, K key/value heads, each key/value head serving H / K queries."""

    def __init__(self, config: ModelConfig, index: int, dtype, device):
        """`index` is the layer's place, where its keys and values lie in the cache."""
        super().__init__()
        self.config, self.index, self.head_dim = config, index, config.head_dim
        width, outs = config.hidden_size, [n * config.head_dim for n in (config.num_heads, *[config.num_kv_heads] * 2)]
        if config.fused == "none":
            self.q_proj, self.k_proj, self.v_proj = linear_group(width, outs, config.attention_bias, dtype, device)
        else:
            (self.qkv_proj,) = linear_group(width, [sum(outs)], config.attention_bias, dtype, device)
        (self.o_proj,) = linear_group(outs[0], [width], config.output_bias, dtype, device)
        if config.qk_norm != "none":
            widths = outs if config.qk_norm == "all" else [config.head_dim] * 2
            self.q_norm, self.k_norm = (new_norm(config, width, dtype, device) for width in widths[:2])

    def stacks(self) -> list[tuple[Linear, ...]]:
        """Return the layers whose weights lie one after the other."""
        return [] if self.config.fused != "none" else [(self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, x: torch.Tensor | Remade, context: "Context", cache: KVCache | None) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        config = self.config
        q, k, v = self._projected(x)  # (B, T, H, d) and twice (B, T, K, d)
        if (rope := context.rope(self.index)) is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, T, H, d) -> (B, H, T, d)
        if rope is not None and config.qk_norm == "none":  # else q and k, or their norms' inputs, keep it anyway
            v = v.contiguous()  # a view would keep the joint q, k, v alive until the backward pass
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        seen = context.seen(self.index)
        out = attention(q, k, v, seen, scale=config.attention_scale, softcap=config.attention_softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, H, T, d) -> (B, T, H d)

    def _projected(self, x: torch.Tensor | Remade) -> list[torch.Tensor]:
        """Return queries, keys and values as heads, normed where the config says so."""
        config, heads = self.config, (self.config.num_heads, *[self.config.num_kv_heads] * 2)
        if config.fused == "none":
            parts = project(x, (self.q_proj, self.k_proj, self.v_proj))
        elif config.fused == "stacked":
            parts = self.qkv_proj(x).split([count * config.head_dim for count in heads], dim=-1)
        else:  # each head's q, k and v lie together
            joint = self.qkv_proj(x).unflatten(-1, (config.num_heads, 3, config.head_dim))
            return list(joint.unbind(-2))
        if config.qk_norm == "all":
            parts = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in parts)  # (B, T, H d) -> (B, T, H, d)
        return [self.q_norm(q), self.k_norm(k), v] if config.qk_norm == "head" else [q, k, v]


class MLP(nn.Module):
    """The feed-forward, D -> F -> D: down(act(gate(x)) * up(x)), or down(act(up(x))) without gate."""

    def __init__(self, config: ModelConfig, dtype, device):
        """Allocate gate and up side by side, as one module where the family has them so."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.activation, self.gated, self.fused = config.activation, config.gated, config.fused != "none"
        if not self.gated:
            (self.up_proj,) = linear_group(width, [inner], config.mlp_bias, dtype, device)
        elif self.fused:
            (self.gate_up_proj,) = linear_group(width, [2 * inner], config.mlp_bias, dtype, device)
        else:
            self.gate_proj, self.up_proj = linear_group(width, [inner, inner], config.mlp_bias, dtype, device)
        (self.down_proj,) = linear_group(inner, [width], config.mlp_bias, dtype, device)

    def stacks(self) -> list[tuple[Linear, ...]]:
        """Return the layers whose weights lie one after the other."""
        return [(self.gate_proj, self.up_proj)] if self.gated and not self.fused else []

    def forward(self, x: torch.Tensor | Remade) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        if not self.gated:
            return self.down_proj(Remade.of(ACTIVATIONS[self.activation], self.up_proj(x)))
        joint = self.fused
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if joint else project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(Remade.of(GATED_UNITS[self.activation], gate, up))


# Which norms a layer has, around attention and around the MLP; the names are those of checkpoints.
_PLACES = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Layer(nn.Module):
    """One block: attention and MLP, each normed before, after or around it, each added to what came in."""

    def __init__(self, config: ModelConfig, index: int, dtype, device):
        """Build the layer at place `index`."""
        super().__init__()
        self.parallel, self.residual_scale = config.parallel_residual, config.residual_scale
        self.places = _PLACES[config.norm_placement]
        before, after, *mlp_places = self.places
        if before:
            setattr(self, before, new_norm(config, config.hidden_size, dtype, device))
        self.self_attn = Attention(config, index, dtype, device)
        for name in (after, *mlp_places):
            if name:
                setattr(self, name, new_norm(config, config.hidden_size, dtype, device))
        self.mlp = MLP(config, dtype, device)

    def forward(self, h: torch.Tensor, context: "Context", cache: KVCache | None) -> torch.Tensor:
        """Map h (B, T, D) to (B, T, D)."""
        before, after, before_mlp, after_mlp = (None if name is None else getattr(self, name) for name in self.places)
        mixed = self._add(h, self.self_attn(_normed(before, h), context, cache), after)
        return self._add(mixed, self.mlp(_normed(before_mlp, h if self.parallel else mixed)), after_mlp)

    def _add(self, h: torch.Tensor, part: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        part = part if norm is None else norm(part)
        return h + (part if self.residual_scale == 1 else part * self.residual_scale)


def _normed(norm: nn.Module | None, h: torch.Tensor) -> torch.Tensor | Remade:
    return h if norm is None else Remade.of(norm, h)


class Embedding(nn.Module):
    """A table of rows (V, D), looked up by token id."""

    def __init__(self, rows: int, width: int, dtype, device):
        """Allocate the table."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype, device=device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids (B, T); returns (B, T, D)."""
        return F.embedding(ids, self.weight)


class Decoder(nn.Module):
    """Embedding, learned positions where the family has them, layers and the final norm."""

    def __init__(self, config: ModelConfig, dtype, device):
        """Build all layers."""
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        if config.learned_positions:
            self.embed_positions = Embedding(config.max_positions, config.hidden_size, dtype, device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = new_norm(config, config.hidden_size, dtype, device)


class Transformer(nn.Module):
    """A causal language model. Parameters have the names of Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig, *, dtype=torch.float32, device="cpu", init: bool = True, seed: int = 0):
        """Build the model and draw its weights; `init=False` leaves them unset, for a loader to fill all."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype, device)
        self.lm_head = (
            None
            if config.tie_embeddings or config.reward
            else Linear(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        )
        self.score = ScoreHead(config.hidden_size, device) if config.reward else None
        self.gradient_checkpointing = False
        if init:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range^2); norms scale by 1 and biases are 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0 - self.config.norm_offset)

    @property
    def head_weight(self) -> torch.Tensor:
        """The head (V, D): the embedding table where the head is tied. ConfigError for a reward model, without one."""
        if self.config.reward:
            raise ConfigError("this is a reward model, which scores answers and cannot write or rate tokens")
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _apply(self, fn, recurse=True):
        """Move or cast as nn.Module does, then lay the grouped weights side by side again."""
        super()._apply(fn, recurse)
        for layer in self.model.layers:
            for stack in (*layer.self_attn.stacks(), *layer.mlp.stacks()):
                _restack(*stack)
        return self

    def hidden(
        self, ids: torch.Tensor, *, positions: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Return the final hidden states (B, T, D), after the last norm.

        Args:
            ids: (B, T) int64.
            positions: (B, T) int64, each token's position in its own document, restarting at 0; a token sees
                itself and that many tokens before it. Padding has position 0. None: one document a row.
            cache: keys and values of earlier tokens; these are appended.

        Raises:
            DataError: an id outside the vocabulary.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise DataError(f"a token id is not below the vocabulary size {self.config.vocab_size}; wrong tokenizer?")
        new, offset = ids.shape[1], 0 if cache is None else cache.length
        places = positions
        if positions is None:
            places = torch.arange(offset, offset + new, device=ids.device).expand(len(ids), -1)
        if cache is not None and cache.remember(ids, places):  # the text has outgrown what its first part was read with
            (ids, places), offset = cache.restart(), 0
            positions = places
        context = Context.of(self.config, positions, places, offset)
        h = self.embedded(ids, places)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, context, cache, use_reentrant=False)
            else:
                h = layer(h, context, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        h = self.model.norm(h[:, -new:])
        return h if self.config.logits_scale == 1 else h / self.config.logits_scale

    def embedded(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the first hidden states (B, T, D) of ids at their positions, both (B, T)."""
        config, h = self.config, self.model.embed_tokens(ids)
        if config.embedding_scale != 1:
            h = h * torch.tensor(
                config.embedding_scale, dtype=h.dtype, device=h.device
            )  # rounded, as Gemma's code does
        if config.learned_positions:
            if places.numel() and int(places.max()) >= config.max_positions:
                raise DataError(
                    f"a text is longer than the {config.max_positions} positions that the model has learned"
                )
            h = h + self.model.embed_positions(places)
        return h

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are neither quantised nor an adapter's."""
        return self.model.embed_tokens.weight.dtype

    def rewards(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the final hidden states (n, D) of texts' last tokens to rewards (n,), fp32.

        ConfigError for a model without reward head.
        """
        if self.score is None:
            raise ConfigError("this is a language model without a reward head; train one with --objective reward")
        return self.score(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map final hidden states (..., D) to logits (..., V)."""
        return self.capped(F.linear(hidden, self.head_weight))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Bend what the head makes, where the family does (Gemma 2): c tanh(z / c), in fp32 as the loss does."""
        cap = self.config.logits_softcap
        return logits if cap is None else torch.tanh(widen(logits) / cap) * cap

    def forward(
        self, ids: torch.Tensor, *, positions: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Return logits (B, T, V) in the model's dtype, in fp32 or wider where they are capped; see `hidden`."""
        return self.logits(self.hidden(ids, positions=positions, cache=cache))


@dataclasses.dataclass(frozen=True)
class Context:
    """What the layers of one pass share: the tables of each rope, and who sees whom in each window."""

    config: ModelConfig
    tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[int | None, Visibility]

    @classmethod
    def of(cls, config: ModelConfig, given: torch.Tensor | None, places: torch.Tensor, offset: int) -> "Context":
        """Build it for tokens at `places` (B, T), after `offset` tokens of a cache.

        Without `given` positions each row is one document, and no mask is needed where no window is shorter.
        """
        layers = range(config.num_layers)
        ropes = {config.layer_rope(layer) for layer in layers} - {None}
        tables = {rope: rope.tables(places, config.head_dim, config.max_positions) for rope in ropes}
        windows = {config.window(layer) for layer in layers}
        return cls(config, tables, {window: _visibility(given, places, offset, window) for window in windows})

    def rope(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return cos and sin of that layer; None where it has no rope."""
        rope = self.config.layer_rope(layer)
        return None if rope is None else self.tables[rope]

    def seen(self, layer: int) -> Visibility:
        """Return who sees whom in that layer."""
        return self.masks[self.config.window(layer)]


def _visibility(given: torch.Tensor | None, places: torch.Tensor, offset: int, window: int | None) -> Visibility:
    """Return who sees whom; without given positions each row is one document."""
    length = places.shape[1]
    if window is not None and window >= offset + length:
        window = None
    if given is None and window is None and (offset == 0 or length == 1):
        return Visibility(None, causal=offset == 0)
    return visibility(places, offset, window)


def _restack(*layers: Linear) -> None:
    """Make the layers' weights views of one tensor, unless they are already, or are quantised."""
    if any(isinstance(layer.weight, QuantizedWeight) for layer in layers):
        return
    weights = [layer.weight.data for layer in layers]
    if stacked(weights) is None:
        joined = torch.cat(weights)
        for layer, part in zip(layers, joined.split([len(weight) for weight in weights]), strict=True):
            layer.weight.data = part


def add_score_head(model: Transformer, seed: int = 0) -> None:
    """Make a reward model of a language model, in place: its head goes, a scalar one drawn from `seed` comes.

    ConfigError for a family that transformers has no such class for: nobody else could read it.
    """
    if FAMILIES[model.config.family].reward_architecture is None:
        raise ConfigError(f"no reward model can be made of {model.config.family}: transformers has no class to read it")
    model.config = dataclasses.replace(model.config, reward=True)
    model.lm_head, model.score = None, ScoreHead(model.config.hidden_size, model.device)
    drawn = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(drawn * model.config.initializer_range)
