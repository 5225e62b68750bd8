"""Cross-entropy of a linear head without the logits:  l_i = log sum_v exp(z_iv) - z_it,  z = h W^T.

With Gemma 2's soft-cap c, z = c tanh(h W^T / c), and the gradient of h W^T is that of z times 1 - (z / c)^2.
A row of target -100 has loss 0 and no gradient.

The (N, V) logits are the largest tensor of a training step and are never needed whole. They are made for
a chunk of rows at a time, and in the same pass turned into their gradient softmax(z) - onehot(t), which
gives dh at once; the chunk is then dropped. Since l_i depends on h_i alone, scaling row i of dh by the
incoming gradient of l_i is exact. dW sums over rows, so it is accumulated for the incoming gradient of a
sum (all rows alike) and made again, chunk by chunk, when the rows turn out to be weighted differently.
Recomputing every chunk in the backward pass (as checkpointing does) was rejected: one more head matmul.
"""

import torch
import torch.nn.functional as F

from minitune.ops.backend import kernel
from minitune.ops.precision import wide_dtype

CHUNK = 128  # rows; 128 x 49,152 fp32 logits are 25 MB
SPAN = 1 << 11  # bytes of a gradient's column that the head's gradient is summed over at once: 1,024 rows in 16 bits
SLICE = 1 << 12  # rows of the head's gradient that a 16-bit product is added to at a time
IGNORED = -100  # the target of a row without loss
GRAIN = 32  # rows; the CPU's matmul library keeps a plan for every shape, so there are to be few shapes


def _fill(hidden, targets):
    """Add rows of zeros, with target 0, up to a multiple of GRAIN; they add nothing to the gradient of the head."""
    missing = -len(targets) % GRAIN
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing))


def _chunk(hidden, weight, targets, wide, narrow, softcap, *, gradient: bool):
    """Return the losses (n,) of one chunk and, if wanted, d(their sum)/d(logits) (n, V), the latter in `narrow`."""
    torch.mm(hidden, weight.T, out=narrow)
    if narrow.dtype != wide.dtype:
        wide.copy_(narrow)
    if softcap is not None:
        bent = wide.div_(softcap).tanh_().square()  # one more (n, V): d(capped)/d(logit) is 1 - this
        wide.mul_(softcap)
    row, ignored = torch.arange(len(targets), device=targets.device), targets == IGNORED
    targets = targets.masked_fill(ignored, 0)
    picked, top = wide[row, targets], wide.amax(-1, keepdim=True)
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    losses = ((total.log() + top).squeeze(1) - picked).masked_fill_(ignored, 0)
    if not gradient:
        return losses, None
    wide.div_(total)
    wide[row, targets] -= 1
    if softcap is not None:
        wide.addcmul_(wide, bent, value=-1)
    if ignored.any():
        wide[ignored] = 0
    return losses, wide if narrow.dtype == wide.dtype else narrow.copy_(wide)


def _add_product(total, gradient, hidden):
    """Add gradient^T hidden to total (V, D), fp32; in 16 bits a slice of V at a time.

    Torch cannot add a product of 16-bit factors to an fp32 sum on the CPU: it would make the product whole, and a
    widened copy of it, 10 bytes for each of V x D where the sum alone takes 4.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.T, hidden)
        return
    for part, columns in zip(total.split(SLICE), gradient.split(SLICE, dim=1), strict=True):
        part += columns.T @ hidden


def _spans(hidden, weight, targets, softcap, *, train_head: bool, losses=None, dhidden=None, scale=None):
    """Go through all chunks; fill losses (N,) and dhidden (N, D) where given; return dW (V, D) if the head trains.

    dW sums over rows of scale_i (softmax - onehot)_i h_i^T, with 1 for no scale. Room for logits is made once and used
    for all chunks: new tensors would cost more than the arithmetic on them. `span` holds the gradients of one chunk, or
    of as many as dW is summed over in one matmul; in 16 bits a chunk's arithmetic is done in `wide`, in fp32.
    """
    count, dtype, rows = len(hidden), wide_dtype(hidden.dtype), SPAN // hidden.itemsize if train_head else CHUNK
    span = hidden.new_empty(min(rows, count), len(weight))
    wide = None if hidden.dtype == dtype else hidden.new_empty(min(CHUNK, count), len(weight), dtype=dtype)
    dweight = torch.zeros_like(weight, dtype=dtype) if train_head and count > rows else None
    for start in range(0, count, rows):
        end = min(start + rows, count)
        for first in range(start, end, CHUNK):
            part = slice(first, min(first + CHUNK, end))
            narrow = span[first - start : part.stop - start]
            place = narrow if wide is None else wide[: len(narrow)]
            wanted = train_head or dhidden is not None
            loss, gradient = _chunk(hidden[part], weight, targets[part], place, narrow, softcap, gradient=wanted)
            if losses is not None:
                losses[part] = loss
            if dhidden is not None:
                torch.mm(gradient, weight, out=dhidden[part])
            if scale is not None:
                gradient.mul_(scale[part, None])
        if dweight is not None:
            _add_product(dweight, span[: end - start], hidden[start:end])
        elif train_head:  # one span
            dweight = span[:end].T @ hidden
    return dweight if dweight is None else dweight.to(weight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap):
        ctx.count, ctx.softcap, train_head = len(targets), softcap, ctx.needs_input_grad[1]
        hidden, targets = _fill(hidden, targets)
        losses = torch.empty(len(targets), dtype=wide_dtype(hidden.dtype), device=hidden.device)
        dhidden = torch.empty_like(hidden)
        dweight = _spans(hidden, weight, targets, softcap, train_head=train_head, losses=losses, dhidden=dhidden)
        ctx.save_for_backward(dhidden, dweight, *((hidden, weight, targets) if train_head else ()))
        return losses[: ctx.count]

    @staticmethod
    def backward(ctx, dlosses):
        dhidden, dweight, *again = ctx.saved_tensors
        if dweight is not None:
            if not (dlosses == dlosses[0]).all():
                scale = F.pad(dlosses, (0, len(dhidden) - ctx.count))
                dweight = _spans(*again, ctx.softcap, train_head=True, scale=scale)
            elif dlosses[0] != 1:  # 1 is a plain sum, the loop's case: no copy then
                dweight = dweight * dlosses[0].to(dweight.dtype)
        return dhidden[: ctx.count] * dlosses[:, None].to(dhidden.dtype), dweight, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, softcap: float | None = None
) -> torch.Tensor:
    """Return the loss of each row in nats, (N,) fp32.

    Args:
        hidden: (N, D), the final hidden states at target positions only.
        weight: (V, D), the head.
        targets: (N,) int64 in [0, V), or -100 for a row whose loss is 0.
        softcap: c where the logits are capped to c tanh(logits / c).
    """
    if hidden.is_cuda and (fused := kernel("cross_entropy.linear_cross_entropy", hidden, weight)):
        return fused(hidden, weight, targets, softcap=softcap)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, softcap)
    # The same rows and arithmetic as with a gradient: equal inputs have losses equal to the bit, so that a model whose
    # adapter does nothing is no nat away from its reference.
    filled, padded = _fill(hidden, targets)
    losses = torch.empty(len(padded), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    _spans(filled, weight, padded, softcap, train_head=False, losses=losses)
    return losses[: len(targets)]
