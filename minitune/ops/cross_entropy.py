"""Cross-entropy of a linear head without the logits:  l_i = log sum_v exp(h_i . w_v) - h_i . w_{t_i}.

The (N, V) logits are the largest tensor of a training step and are never needed whole. They are made for
a chunk of rows at a time, and in the same pass turned into their gradient softmax(z) - onehot(t), which
gives dh at once; the chunk is then dropped. Since l_i depends on h_i alone, scaling row i of dh by the
incoming gradient of l_i is exact. dW sums over rows, so it is accumulated for the incoming gradient of a
sum (all rows alike) and made again, chunk by chunk, when the rows turn out to be weighted differently.
Recomputing every chunk in the backward pass (as checkpointing does) was rejected: one more head matmul.
"""

import torch
import torch.nn.functional as F

from minitune.ops.precision import wide_dtype, widen

CHUNK = 128  # rows; 128 x 49,152 fp32 logits are 25 MB
GRAIN = 32  # rows; the CPU's matmul library keeps a plan for every shape, so there are to be few shapes


def _fill(hidden, targets):
    """Add rows of zeros, with target 0, up to a multiple of GRAIN; they add nothing to the gradient of the head."""
    missing = -len(targets) % GRAIN
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing))


def _buffers(hidden, weight):
    """Return room for one chunk's logits (CHUNK, V), wide and in hidden's dtype: made once, used for all chunks.

    New tensors for every chunk cost more than the arithmetic on them: 25 MB go back to the system each time.
    """
    shape, wide = (CHUNK, len(weight)), wide_dtype(hidden.dtype)
    room = torch.empty(shape, dtype=wide, device=hidden.device)
    return room, room if wide == hidden.dtype else torch.empty(shape, dtype=hidden.dtype, device=hidden.device)


def _chunk_gradient(hidden, weight, targets, room, losses=None):
    """Return d(sum of losses)/d(logits) of one chunk (n, V) in hidden's dtype; fill losses (n,) if given."""
    wide, narrow = (buffer[: len(targets)] for buffer in room)
    torch.mm(hidden, weight.T, out=narrow)
    if narrow.dtype != wide.dtype:
        wide.copy_(narrow)
    row = torch.arange(len(targets), device=targets.device)
    picked, top = wide[row, targets], wide.amax(-1, keepdim=True)
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    if losses is not None:
        losses.copy_((total.log() + top).squeeze(1) - picked)
    wide.div_(total)
    wide[row, targets] -= 1
    return wide if narrow.dtype == wide.dtype else narrow.copy_(wide)


def _weight_gradient(hidden, weight, targets, scale):
    """Return sum over rows of scale_i (softmax - onehot)_i h_i^T, (V, D), made chunk by chunk in fp32."""
    total = torch.zeros(weight.shape, dtype=wide_dtype(hidden.dtype), device=weight.device)
    room = _buffers(hidden, weight)
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        gradient = _chunk_gradient(hidden[part], weight, targets[part], room)
        total += (gradient * scale[part, None].to(gradient.dtype)).T @ hidden[part]
    return total.to(weight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.count, wide = len(targets), wide_dtype(hidden.dtype)
        hidden, targets = _fill(hidden, targets)
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        train_head, room = ctx.needs_input_grad[1], _buffers(hidden, weight)
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if train_head else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            gradient = _chunk_gradient(hidden[part], weight, targets[part], room, losses[part])
            torch.mm(gradient, weight, out=dhidden[part])
            if dweight is not None:
                dweight += gradient.T @ hidden[part]
        ctx.save_for_backward(dhidden, dweight, *((hidden, weight, targets) if train_head else ()))
        return losses[: ctx.count]

    @staticmethod
    def backward(ctx, dlosses):
        dhidden, dweight, *again = ctx.saved_tensors
        if dweight is not None:
            _, weight, _ = again
            if not (dlosses == dlosses[0]).all():
                dweight = _weight_gradient(*again, F.pad(dlosses, (0, len(dhidden) - ctx.count)))
            elif dlosses[0] != 1:  # 1 is a plain sum, the loop's case: no copy then
                dweight = dweight * dlosses[0]
            dweight = dweight.to(weight.dtype)
        return dhidden[: ctx.count] * dlosses[:, None].to(dhidden.dtype), dweight, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row in nats, (N,) fp32.

    Args:
        hidden: (N, D), the final hidden states at target positions only.
        weight: (V, D), the head.
        targets: (N,) int64 in [0, V).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    losses = torch.empty(len(targets), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        logits = widen(hidden[part] @ weight.T)
        losses[part] = torch.logsumexp(logits, -1) - logits.gather(1, targets[part, None]).squeeze(1)
    return losses
