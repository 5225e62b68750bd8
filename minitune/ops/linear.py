"""Linear maps that share their input, each with an optional low-rank adapter, as one matmul.

    y = x W^T + b + s (drop(x) A^T) B^T                      (Hu et al. 2021, equation 3)
    u = drop(x) A^T,  du = s dy B
    dx = dy W + drop'(du A),   dA = du^T drop(x),   dB = s dy^T u,   dW = dy^T x only where W is trained

No update s B A of W's size is ever made. Projections of one input (q, k, v; gate, up) are computed
together: their weights lie one after the other in memory (`stacked`), their adapters are concatenated, the
B's as a block diagonal. Separate calls were rejected: at these widths three small matmuls cost more than a
big one, and so do three additions into dx.

A weight W may be a `QuantizedTensor` (Dettmers et al. 2023, equation 5). It is decoded in both passes into one piece
of memory that all layers share, and nothing decoded is kept: 0.5 bytes an element instead of 2.

The gradients of A, B and W need x again. Where x is cheap to make (a norm, an activation), `Remade` keeps what
it was made from, which is kept anyway, and makes it again: at 4 x 256 tokens that saves 165 MB of bf16 in a
135M model for 60 norms and 30 SiLUs.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from minitune.ops.allocate import passing
from minitune.ops.nf4 import QuantizedTensor
from minitune.ops.nf4_linear import nf4_linear

_rooms: dict[tuple, torch.Tensor] = {}  # what decoded weights are written to, by device, dtype and thread

Weight = torch.Tensor | QuantizedTensor


@dataclass(frozen=True)
class Adapter:
    """One projection's low-rank update: A (R, in), B (out, R), both of any float dtype, and s."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Remade:
    """An input of projections that is made when they are, and again in the backward pass; it is not kept between."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> "Remade":
        """Remember how to make it; `function` must be deterministic."""
        return cls(function, inputs)

    def make(self) -> torch.Tensor:
        """Apply the function."""
        return self.function(*self.inputs)


def stacked(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the weights (out_i, in) as one (sum out_i, in) view if they are adjacent in memory, else None."""
    first = weights[0]
    if len(weights) == 1:
        return first
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous() or weight.dtype != first.dtype:
            return None
        end += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return None
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _join(weights: list[Weight], like: torch.Tensor) -> torch.Tensor:
    """Return the weights as one (sum out_i, in): a view where they are adjacent, decoded where they are quantised.

    Decoded weights last until the next call for the same device, dtype (like's) and thread.
    """
    if not any(isinstance(weight, QuantizedTensor) for weight in weights):
        view = stacked(weights)
        return torch.cat(weights) if view is None else view
    sizes = [weight.shape[0] for weight in weights]
    joined = _room(sum(sizes) * like.shape[-1], like).view(sum(sizes), -1)
    for weight, part in zip(weights, joined.split(sizes), strict=True):
        weight.dequantize(out=part) if isinstance(weight, QuantizedTensor) else part.copy_(weight)
    return joined


def _room(count: int, like: torch.Tensor) -> torch.Tensor:
    """Return `count` elements of memory that every call for like's device and dtype shares; it grows as needed."""
    key = (like.device, like.dtype, threading.get_ident())
    if key not in _rooms or len(_rooms[key]) < count:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside
            _rooms[key] = torch.empty(count, dtype=like.dtype, device=like.device)
    return _rooms[key][:count]


def join_adapters(adapters, sizes, like):
    """Concatenate the A's to (sum R, in) and lay s B on a block diagonal (sum out, sum R), in like's dtype.

    A projection without adapter has no rows in the first and zero rows in the second.
    """
    a = torch.cat([adapter.A for adapter in adapters if adapter is not None]).to(like.dtype)
    blocks = [a.new_zeros(n, 0) if one is None else one.B * one.scaling for n, one in zip(sizes, adapters, strict=True)]
    return a, torch.block_diag(*blocks).to(like.dtype)


class _Projections(torch.autograd.Function):
    """Inputs after the fixed ones: n weights, n biases or None, then A and B of each adapter present."""

    @staticmethod
    def forward(ctx, x, keep, scalings, count, recipe, *tensors):
        weights, biases, factors = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        sizes = [weight.shape[0] for weight in weights]
        flat = x.reshape(-1, x.shape[-1])
        adapters = _adapters(scalings, factors)
        # what several make (q, k, v; gate, up) is kept by what comes next; what one makes is added to the residual
        y = _base(flat, weights, biases, passing((len(flat), sizes[0]), flat) if count == 1 else None)
        u = None
        if factors:
            a, b = join_adapters(adapters, sizes, x)
            u = (flat if keep is None else flat * keep) @ a.T  # (N, sum R)
            y.addmm_(u, b.T)
        function, inputs = recipe or (None, (flat,))
        ctx.weights = weights if any(isinstance(weight, QuantizedTensor) for weight in weights) else None
        kept = tensors if ctx.weights is None else (*[None] * count, *tensors[count:])
        ctx.save_for_backward(*inputs, keep, u, *kept)
        ctx.function, ctx.kept = function, len(inputs)
        ctx.scalings, ctx.count, ctx.shape = scalings, count, x.shape
        return tuple(part.unflatten(0, x.shape[:-1]) for part in y.split(sizes, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        saved = ctx.saved_tensors
        inputs, (keep, u, *tensors) = saved[: ctx.kept], saved[ctx.kept :]
        x = inputs[0] if ctx.function is None else ctx.function(*inputs)
        flat = x.reshape(-1, x.shape[-1])
        count, needs = ctx.count, ctx.needs_input_grad[5:]
        weights, factors = ctx.weights or tensors[:count], tensors[2 * count :]
        sizes = [weight.shape[0] for weight in weights]
        parts = [part.reshape(-1, part.shape[-1]) for part in dys]
        dy = torch.cat(parts, dim=1) if count > 1 else parts[0]
        dx = dy @ _join(weights, flat) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = [None] * len(tensors)
        if factors:
            adapters = _adapters(ctx.scalings, factors)
            a, b = join_adapters(adapters, sizes, flat)
            du = dy @ b  # (N, sum R)
            if dx is not None:
                dx = dx.addmm_(du, a) if keep is None else dx.add_((du @ a).mul_(keep))
            da = du.T @ (flat if keep is None else flat * keep)
            db = dy.T @ u
            grads[2 * count :] = _split_adapters(da, db, adapters, sizes)
        if any(needs[:count]):
            dw = (dy.T @ flat).split(sizes)
            grads[:count] = [part if need else None for part, need in zip(dw, needs[:count], strict=True)]
        for weight, part in zip(weights, parts, strict=True):
            if isinstance(weight, QuantizedTensor) and weight.on_gradient is not None:
                weight.on_gradient(part.T @ flat)
        for i in range(count):
            if needs[count + i]:
                grads[count + i] = parts[i].sum(0)
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None, *grads)


def _adapters(scalings, factors) -> list[Adapter | None]:
    """Pair the flat factors (A, B, A, B, ...) with the scalings; a scaling of None has no adapter."""
    pairs = iter(zip(factors[::2], factors[1::2], strict=True))
    return [None if s is None else Adapter(*next(pairs), s) for s in scalings]


def _base(flat, weights, biases, out=None):
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([flat.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    weight = _join(list(weights), flat)
    # One row, as in decoding: reading W is all the time there is. In bf16 on the CPU, addmv reads it 1.6 to 1.8 times
    # as fast as the matmul does (AMX processor, all of a 135M model's); in fp32 0.85 times on two threads, 1.04 on one.
    if flat.dtype == torch.bfloat16 and flat.device.type == "cpu" and flat.numel() == flat.shape[-1] and bias is None:
        return torch.mv(weight, flat.reshape(-1)).view(*flat.shape[:-1], -1)
    if out is None:
        return F.linear(flat, weight, bias)
    return torch.mm(flat, weight.T, out=out) if bias is None else torch.addmm(bias, flat, weight.T, out=out)


def _untracked(x, weights, biases, adapters):
    """Apply the maps where no gradient is wanted: each adapter alone, since joining them costs more than it saves."""
    if x.is_cuda and all(isinstance(weight, QuantizedTensor) and weight.kind != "int8" for weight in weights):
        return [_quantized(x, *each) for each in zip(weights, biases, adapters, strict=True)]
    y = _base(x, weights, biases)
    parts = [y] if len(weights) == 1 else y.split_with_sizes([weight.shape[0] for weight in weights], dim=-1)
    for part, adapter in zip(parts, adapters, strict=True):
        if adapter is not None:
            u = _base(x, [adapter.A.to(x.dtype)], [None]) * adapter.scaling  # (..., R)
            part += _base(u, [adapter.B.to(x.dtype)], [None])
    return parts


def _quantized(x, weight, bias, adapter):
    """Apply one map over a 4-bit weight; for few rows its kernel decodes the weight where it is multiplied."""
    low = ()
    if adapter is not None:
        low = F.linear(x, adapter.A.to(x.dtype)), adapter.B.to(x.dtype), adapter.scaling
    y = nf4_linear(x, weight, *low)
    return y if bias is None else y + bias


def _split_adapters(da, db, adapters, sizes) -> list[torch.Tensor]:
    """Cut each adapter's own rows out of dA (sum R, in), and its block out of dB (sum out, sum R)."""
    ranks = [0 if adapter is None else len(adapter.A) for adapter in adapters]
    grads = []
    for i, (adapter, part, rows) in enumerate(zip(adapters, da.split(ranks), db.split(sizes), strict=True)):
        if adapter is not None:
            block = rows.split(ranks, dim=1)[i]
            grads += [part.to(adapter.A.dtype), block.to(adapter.B.dtype) * adapter.scaling]
    return grads


def projections(
    x: torch.Tensor | Remade,
    weights: list[Weight],
    biases: list[torch.Tensor | None],
    adapters: list[Adapter | None],
    dropout: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """Apply n linear maps with optional adapters to one input.

    Args:
        x: (..., in), or a `Remade` one.
        weights: n tensors (out_i, in), quantised or not; in one matmul, without copying when `stacked`.
        biases: n tensors (out_i,) or None.
        adapters: n adapters or None; their factors are cast to x's dtype for the matmul.
        dropout: share of x's elements dropped on the adapters' way; one mask for all of them.

    Returns:
        n tensors (..., out_i).
    """
    recipe = None
    if isinstance(x, Remade):
        recipe, x = (x.function, tuple(part.detach() for part in x.inputs)), x.make()
    present = [adapter for adapter in adapters if adapter is not None]
    factors = [factor for adapter in present for factor in (adapter.A, adapter.B)]
    tracked = torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in (x, *weights, *biases, *factors)
    )
    if not tracked and not (dropout and present):
        return _untracked(x, weights, biases, adapters)
    keep = None
    if dropout and present:
        shape = (x.numel() // x.shape[-1], x.shape[-1])
        keep = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - dropout).div_(1 - dropout)
    scalings = tuple(None if adapter is None else adapter.scaling for adapter in adapters)
    return _Projections.apply(x, keep, scalings, len(weights), recipe, *weights, *biases, *factors)
