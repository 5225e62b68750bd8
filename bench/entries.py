"""What `bench.kernels` measures of norms, rope and gated units: shapes, least traffic and work, peers, and a check.

An operation of `minitune.ops` is "ours" where its kernel runs and "eager" where its reference is asked for: one
function for both, so that the two cannot drift apart. Bytes are the least that the operation can move, each operand
once. What is quantised, the cross-entropy and the optimiser are in `bench.entries4bit`.

Peers run as their users call them, defaults and all: Liger's RMSNorm writes its gradient over dy and always makes that
of the weight; its rope turns q and k together, in place, so it is given a k of one head beside q.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitune.ops import norm, rope, swiglu
from minitune.ops.backend import get_backend, set_backend

DTYPE = torch.bfloat16
Calls = Callable[[], Any] | list[Callable[[], Any]]


class Missing(Exception):
    """A peer is not installed; no failure."""


@dataclass
class Entry:
    """One operation at one shape."""

    kernel: str
    """The @triton.jit function at work."""
    title: str
    shape: str
    bytes: float
    flops: float
    sides: dict[str, Callable[[], Calls]]
    """By name, what makes the calls to time; several calls, each on its own copy, where one is very short."""
    check: Callable[[], tuple[float, float]]
    """Returns the errors of ours and of eager, against fp64."""
    bars: tuple[str, ...] = ()
    compiled: Callable[[], Callable] | None = None
    """Makes the call of the compiled reference; None where that is not measured."""
    slack: float = 1e-4
    """How far our error may lie above twice the reference's."""

    @property
    def key(self) -> str:
        """Name it in the results."""
        return f"{self.title} {self.shape}"


@dataclass(frozen=True)
class Sizes:
    """Which shapes to take: all on a GPU, few in a quick run, small ones on a CPU."""

    gpu: bool
    quick: bool = False

    def pick(self, shapes: Sequence, small: Sequence) -> Sequence:
        """Return the shapes to measure."""
        return small if not self.gpu else shapes[:1] if self.quick else shapes

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cuda" if self.gpu else "cpu"

    def draw(self, *shape: int) -> torch.Tensor:
        """Return normal numbers in bf16."""
        return torch.randn(*shape, device=self.device, dtype=DTYPE)


def with_backend(name: str, call: Callable) -> Callable:
    """Return the call, made under that backend."""

    def run(*arguments):
        before = get_backend()
        set_backend(name)
        try:
            return call(*arguments)
        finally:
            set_backend(before)

    return run


def peer(module: str) -> Any:
    """Import a peer's module; raises Missing where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed") from None


def relative(values: Sequence, truths: Sequence) -> float:
    """Return the largest |value - truth| / |truth| of several tensors, by their norms; NaN stays NaN."""
    errors = [(value.double() - truth).norm() / truth.norm() for value, truth in zip(values, truths, strict=True)]
    return float(torch.stack(errors).max()) if errors else 0.0


def leaves_of(inputs: Sequence, wanted: Sequence[bool]) -> list[torch.Tensor]:
    """Return the inputs as leaves, with gradients where wanted."""
    return [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]


def gradients(function: Callable, inputs: Sequence, wanted: Sequence[bool], dy: torch.Tensor) -> tuple:
    """Return the wanted gradients."""
    leaves = leaves_of(inputs, wanted)
    y = function(*leaves)
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy.to(y.dtype))


def timed_pass(function: Callable, inputs: Sequence, wanted: Sequence[bool] | None) -> Callable[[], Any]:
    """Return the call to time: the forward pass without gradients, or the backward pass of one forward pass."""
    if wanted is None:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = leaves_of(inputs, wanted)
    y = function(*leaves)
    dy = torch.randn_like(y)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(y, asked, dy, retain_graph=True)


def compiled_pass(function: Callable, inputs: Callable, wanted: Sequence[bool] | None) -> Callable:
    """Return the call of the compiled function."""
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # the backward pass is run again and again
    torch._dynamo.reset()
    return timed_pass(torch.compile(function, dynamic=False), inputs(), wanted)


def elementwise(
    kernel: str, title: str, shape: str, traffic: float, flops: float, function: Callable, inputs: Callable,
    wanted: tuple[bool, ...] | None, cut: Callable, peers: dict[str, Callable], bars: tuple[str, ...],
    compiled: bool,
) -> Entry:  # fmt: skip
    """Return the entry of a differentiable operation; `inputs()` draws its arguments, `cut` leaves fewer to check."""

    def check():
        few = cut(*inputs())
        wide = [x.double() if x.is_floating_point() else x for x in few]
        grads = wanted or (False,) * len(few)
        run = function if wanted is None else lambda *xs: gradients(function, xs, grads, upstream)
        y = with_backend("reference", function)(*few)
        upstream = torch.randn_like(y)
        ours, eager, truth = (
            with_backend(name, run)(*xs) for name, xs in (("auto", few), ("reference", few), ("reference", wide))
        )
        ours, eager, truth = (out if isinstance(out, tuple) else (out,) for out in (ours, eager, truth))
        return relative(ours, truth), relative(eager, truth)

    makers = {"ours": lambda: function, "eager": lambda: function, **peers}
    sides = {name: lambda get=get: timed_pass(get(), inputs(), wanted) for name, get in makers.items()}
    make = (lambda: compiled_pass(function, inputs, wanted)) if compiled else None
    return Entry(kernel, title, shape, traffic, flops, sides, check, bars, make)


def rms_norm(sizes: Sizes) -> Iterator[Entry]:
    """RMSNorm forward, backward with w frozen, and with w trained; bytes: x in, y out; dy, x in, dx out."""
    for index, (rows, width) in enumerate(sizes.pick(((8192, 4096), (16384, 4096), (8192, 8192)), ((256, 512),))):
        n = rows * width

        def inputs(rows=rows, width=width):
            return sizes.draw(rows, width), sizes.draw(width)

        def function(x, weight):
            return norm.rms_norm(x, weight, 1e-5)

        def liger():
            apply = peer("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
            return lambda x, weight: apply(x, weight, 1e-5)

        common = (function, inputs)
        rest = (lambda x, w: (x[:1024], w), {"liger": liger}, ("bandwidth", "liger"), index == 0)
        shape = f"{rows}x{width}"
        yield elementwise("rms_norm_forward", "RMSNorm forward", shape, 4 * n, 4 * n, *common, None, *rest)
        yield elementwise("rms_norm_backward", "RMSNorm backward", shape, 6 * n, 8 * n, *common, (True, False), *rest)
        yield elementwise(
            "rms_norm_backward", "RMSNorm backward with dw", shape, 6 * n, 10 * n, *common, (True, True), *rest
        )


def rotary(sizes: Sizes) -> Iterator[Entry]:
    """Rope on the queries of Llama-3-8B; bytes: x in, y out, and the fp32 tables."""
    for index, (batch, length, heads) in enumerate(sizes.pick(((2, 4096, 32), (4, 4096, 32)), ((1, 128, 8),))):
        tokens, width = batch * length, 128
        n = tokens * heads * width

        def inputs(batch=batch, length=length, heads=heads):
            positions = torch.arange(length, device=sizes.device).expand(batch, -1)
            return sizes.draw(batch, length, heads, 128), *rope.rope_tables(positions, 128, 500000.0)

        def liger():
            apply = peer("liger_kernel.ops.rope").LigerRopeFunction.apply

            def turn(x, cos, sin):
                cos, sin = (torch.cat([t[:1, :, 0], t[:1, :, 0]], -1) for t in (cos, sin))
                return apply(x.transpose(1, 2), torch.zeros_like(x[:, :, :1]).transpose(1, 2), cos, sin)[0]

            return turn

        def cut(x, cos, sin):
            return x[:, :256], cos[:, :256], sin[:, :256]

        for title, wanted in (("rope forward", None), ("rope backward", (True, False, False))):
            yield elementwise(
                "rope_turn", title, f"{tokens}x{heads * width}", 4 * n + 4 * tokens * width, 3 * n, rope.apply_rope,
                inputs, wanted, cut, {"liger": liger} if wanted is None else {}, ("bandwidth",), index == 0,
            )  # fmt: skip


def gated(sizes: Sizes) -> Iterator[Entry]:
    """SwiGLU and GeGLU; bytes: gate, up in, y out; dy, gate, up in, dgate, dup out."""
    for index, (rows, width) in enumerate(sizes.pick(((8192, 4096), (8192, 14336)), ((256, 512),))):
        n, shape = rows * width, f"{rows}x{width}"

        def inputs(rows=rows, width=width):
            return sizes.draw(rows, width), sizes.draw(rows, width)

        for name, function, module, of in (
            ("SwiGLU", swiglu.swiglu, "swiglu", "LigerSiLUMulFunction"),
            ("GeGLU", swiglu.geglu, "geglu", "LigerGELUMulFunction"),
        ):
            peers = {"liger": lambda module=module, of=of: getattr(peer(f"liger_kernel.ops.{module}"), of).apply}
            rest = (lambda a, b: (a[:512], b[:512]), peers, ("bandwidth", "liger")[: 2 if name == "SwiGLU" else 1])
            yield elementwise(
                "glu_forward", f"{name} forward", shape, 6 * n, 6 * n, function, inputs, None, *rest, index == 0
            )
            yield elementwise(
                "glu_backward", f"{name} backward", shape, 10 * n, 12 * n, function, inputs, (True, True), *rest,
                index == 0,
            )  # fmt: skip
