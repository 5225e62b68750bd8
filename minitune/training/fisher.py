"""The diagonal of the Fisher information: what general text says of each weight, before training.

    F_i = E over contexts x of text, next tokens y ~ p(y|x) of  (d log p(y|x) / dw_i)^2           (a token)

To second order, KL(p_start || p) = 1/2 D^T F D nats a token for a change D of the weights (Martens 2020, section 9),
of which the diagonal is kept. So y is drawn from the model. The text's own next tokens would make the "empirical
Fisher", which is no such curvature (Martens 2020, section 11.1; Kunstner et al. 2019).

One backward pass a window: scores of drawn tokens are zero in the mean given their contexts, so they are uncorrelated,
and the square of a window's summed gradient has the mean of the sum of its tokens' squares. The squares are summed over
windows and divided by all tokens. Squaring the gradient of a batch's mean loss, a known mistake, gives F / tokens of
the batch; a pass for each token would be exact for the same tokens drawn, and cost 256 times as much.

A weight in 4 bits has a gradient too: of what it decodes to.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from minitune.data.batching import collate
from minitune.data.examples import Example
from minitune.losses.sft import sft_loss
from minitune.model.linear import QuantizedWeight
from minitune.model.transformer import Transformer
from minitune.ops.precision import wide_dtype, widen
from minitune.training.objectives import final_hidden, to_device

ROWS = 128  # positions whose probabilities are made at a time

Weight = nn.Parameter | QuantizedWeight


def diagonal_fisher(
    model: Transformer, weights: dict[str, Weight], examples: list[Example], pad_id: int, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return F of each weight, of its shape, in fp32 or wider: nats a token.

    Args:
        model: at the start; its gradients are cleared.
        weights: those that are asked for, which need not train; by name.
        examples: texts, or rows whose answers are the targets. One pass each.
        pad_id: fills rows up.
        seed: of the drawn tokens.
    """
    training = model.training
    model.eval()
    try:
        sums = summed_squares(weights, _drawn_losses(model, examples, pad_id, seed))
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
    tokens = sum(sum(example.targets) for example in examples)
    return {name: value.div_(tokens) for name, value in sums.items()}


def summed_squares(weights: dict[str, Weight], losses: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sum, over losses that come one by one, of each weight's squared gradient, in fp32 or wider."""
    sums = {}
    with ExitStack() as stack:
        for name, weight in weights.items():
            dtype = torch.float32 if isinstance(weight, QuantizedWeight) else wide_dtype(weight.dtype)
            sums[name] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            stack.callback(_watch(weight, partial(_add_square, sums[name])))
        for loss in losses:
            loss.backward()
    return sums


def _add_square(total: torch.Tensor, gradient: torch.Tensor) -> None:
    wide = gradient.to(total.dtype)
    total.addcmul_(wide, wide)


def _watch(weight: Weight, receive: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Hand each gradient of a weight to `receive`, and keep none; returns what puts all back."""
    if isinstance(weight, QuantizedWeight):
        stored = weight.tensor
        weight.tensor = replace(stored, on_gradient=receive)
        return partial(setattr, weight, "tensor", stored)

    def drop(parameter: nn.Parameter) -> None:
        receive(parameter.grad)
        parameter.grad = None

    trained = weight.requires_grad
    hook = weight.requires_grad_(True).register_post_accumulate_grad_hook(drop)

    def undo() -> None:
        hook.remove()
        weight.requires_grad_(trained)

    return undo


def _drawn_losses(model: Transformer, examples: list[Example], pad_id: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield -log p of next tokens that the model itself draws at the targets of each example, summed."""
    from tqdm import tqdm

    generator = torch.Generator(model.device).manual_seed(seed)
    for example in tqdm(examples, desc="Fisher information", unit=" windows", disable=None, leave=False):
        batch = to_device(collate([[example]], pad_id), model.device)
        hidden = final_hidden(model, batch)
        targets = batch.targets.masked_scatter(
            batch.targets >= 0, draw_tokens(model, hidden.detach()[batch.targets >= 0], generator)
        )
        yield sft_loss(hidden, model.head_weight, targets, model.config.logits_softcap)[0]


@torch.no_grad()
def draw_tokens(model: Transformer, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a token (n,) drawn from the model's own distribution at each hidden state (n, D)."""
    parts = [widen(model.logits(part)).softmax(-1) for part in hidden.split(ROWS)]
    return torch.cat([part.multinomial(1, generator=generator).squeeze(1) for part in parts])
