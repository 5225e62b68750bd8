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
from minitune.model.linear import Linear, QuantizedWeight, ScoreHead, linear_group, project
from minitune.ops.attention import Visibility, attention, visibility
from minitune.ops.linear import Remade, stacked
from minitune.ops.norm import rms_norm
from minitune.ops.rope import apply_rope, rope_tables
from minitune.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, scaled by weight (D,)."""

    def __init__(self, width: int, eps: float, dtype, device):
        """Start at weight 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., D)."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, K key/value heads, each key/value head serving H / K queries."""

    def __init__(self, config: ModelConfig, index: int, dtype, device):
        """`index` is the layer's place, where its keys and values lie in the cache."""
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        outs = tuple(count * config.head_dim for count in (heads, kv_heads, kv_heads))
        self.q_proj, self.k_proj, self.v_proj = linear_group(width, outs, config.attention_bias, dtype, device)
        (self.o_proj,) = linear_group(outs[0], (width,), config.attention_bias, dtype, device)

    def forward(self, x: torch.Tensor | Remade, rope, seen: Visibility, cache: KVCache | None) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D); `rope` is (cos, sin) of the tokens' positions."""
        parts = project(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # (B, T, H d) -> (B, T, H, d)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, T, H, d) -> (B, H, T, d)
        v = v.contiguous()  # a view would keep the joint q, k, v alive until the backward pass
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        out = attention(q, k, v, seen)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, H, T, d) -> (B, T, H d)


class MLP(nn.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x)), D -> F -> D."""

    def __init__(self, config: ModelConfig, dtype, device):
        """Allocate gate and up side by side."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = linear_group(width, (inner, inner), config.mlp_bias, dtype, device)
        (self.down_proj,) = linear_group(inner, (width,), config.mlp_bias, dtype, device)

    def forward(self, x: torch.Tensor | Remade) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.down_proj(Remade.of(swiglu, *project(x, (self.gate_proj, self.up_proj))))


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig, index: int, dtype, device):
        """Build the layer at place `index`."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.self_attn = Attention(config, index, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, h: torch.Tensor, rope, seen: Visibility, cache: KVCache | None) -> torch.Tensor:
        """Map h (B, T, D) to (B, T, D)."""
        h = h + self.self_attn(Remade.of(self.input_layernorm, h), rope, seen, cache)
        return h + self.mlp(Remade.of(self.post_attention_layernorm, h))


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
    """Embedding, layers and the final norm."""

    def __init__(self, config: ModelConfig, dtype, device):
        """Build all layers."""
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)


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
        """Draw every matrix from N(0, initializer_range^2); norms are 1 and biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

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
            attention_block, mlp = layer.self_attn, layer.mlp
            _restack(attention_block.q_proj, attention_block.k_proj, attention_block.v_proj)
            _restack(mlp.gate_proj, mlp.up_proj)
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
        offset = 0 if cache is None else cache.length
        positions, seen = _positions_and_visibility(ids, positions, offset)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        h = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, rope, seen, cache, use_reentrant=False)
            else:
                h = layer(h, rope, seen, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.model.norm(h)

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
        return F.linear(hidden, self.head_weight)

    def forward(
        self, ids: torch.Tensor, *, positions: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Return logits (B, T, V) in the model's dtype; arguments as in `hidden`."""
        return self.logits(self.hidden(ids, positions=positions, cache=cache))


def _positions_and_visibility(ids, positions, offset: int) -> tuple[torch.Tensor, Visibility]:
    """Return positions (B, T) and who sees whom; without positions each row is one document."""
    length = ids.shape[1]
    if positions is not None:
        return positions, visibility(positions, offset)
    positions = torch.arange(offset, offset + length, device=ids.device).expand(len(ids), -1)
    if offset == 0:
        return positions, Visibility(None, causal=True)
    return positions, Visibility(None, causal=False) if length == 1 else visibility(positions, offset)


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
    """Make a reward model of a language model, in place: its head goes, a scalar one drawn from `seed` comes."""
    model.config = dataclasses.replace(model.config, reward=True)
    model.lm_head, model.score = None, ScoreHead(model.config.hidden_size, model.device)
    drawn = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(drawn * model.config.initializer_range)
