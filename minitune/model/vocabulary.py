"""Surgery on the rows of embedding and head: more of them, only some of them trained, or a head of its own."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from minitune.errors import ConfigError
from minitune.model.linear import Linear
from minitune.model.transformer import Transformer

NOISE = 0.1  # of the standard deviation of a column, in new rows


def grow_vocabulary(model: Transformer, size: int) -> None:
    """Give embedding and head `size` rows, in place; new ones are zero.

    Raises:
        ConfigError: the model has more rows than that.
    """
    more = size - model.config.vocab_size
    if more < 0:
        raise ConfigError(f"the vocabulary has {model.config.vocab_size} tokens; it cannot be cut to {size}")
    trained = trained_rows(model) if more else ()  # the new parameters do not know it
    for table in (model.model.embed_tokens, model.lm_head):
        if table is not None and more:
            rows = torch.cat([table.weight.data, table.weight.new_zeros(more, table.weight.shape[1])])
            table.weight = nn.Parameter(rows, table.weight.requires_grad and not trained)
    model.config = dataclasses.replace(model.config, vocab_size=size)
    if trained:
        train_rows(model, trained)


@torch.no_grad()
def add_rows(model: Transformer, ids: Sequence[int], *, seed: int = 0) -> None:
    """Draw the rows of embedding and head for new tokens, growing both where they have too few.

    A row is the mean of those before the first new one, so that its logit starts as an average one (Hewitt 2021), plus
    noise from `seed` of a tenth of each column's standard deviation, so that no two new tokens are the same.
    """
    grow_vocabulary(model, max(model.config.vocab_size, max(ids) + 1))
    generator = torch.Generator().manual_seed(seed)
    for table in (model.model.embed_tokens, model.lm_head):
        if table is not None:
            known = table.weight[: min(ids)].float()
            noise = torch.randn(len(ids), known.shape[1], generator=generator).to(known.device)
            table.weight[list(ids)] = (known.mean(0) + NOISE * known.std(0) * noise).to(table.weight.dtype)


def train_rows(model: Transformer, ids: Sequence[int]) -> None:
    """Let the rows `ids` of embedding and head train, those that do so already too, and no others of them.

    A table that trains whole stays so. The other rows' gradient is set to zero as it arrives, and the parameter's
    `trained_rows` tells the optimiser to let no weight decay.
    """
    for table in (model.model.embed_tokens, model.lm_head):
        if table is not None and (not table.weight.requires_grad or hasattr(table.weight, "trained_rows")):
            weight = table.weight.requires_grad_(True)
            if hasattr(weight, "trained_rows"):
                weight.rows_hook.remove()
            weight.trained_rows = tuple(sorted({*ids, *getattr(weight, "trained_rows", ())}))
            mask = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)
            mask[list(weight.trained_rows)] = 1
            weight.rows_hook = weight.register_hook(mask.mul)


def trained_rows(model: Transformer) -> tuple[int, ...]:
    """Return which rows of the embedding train, in order; nothing where none or all do."""
    return getattr(model.model.embed_tokens.weight, "trained_rows", ())


def untie_head(model: Transformer) -> None:
    """Give a model whose head is its embedding a head of its own, equal to it."""
    model.lm_head = Linear(model.model.embed_tokens.weight.detach().clone())
    model.lm_head.requires_grad_(False)
    model.config = dataclasses.replace(model.config, tie_embeddings=False)
