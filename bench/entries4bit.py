"""What `bench.kernels` measures of NF4, of the cross-entropy and of 8-bit AdamW; see `bench.entries`.

A matrix-vector product over 4 bits is counted by its packed weight alone, as its bar counts it. Up to 64 rows reading
the weight is most of the time, and the weight of one call must not be what the last call left in the cache: calls are
then timed on copies that the cache cannot hold together.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.entries import DTYPE, Calls, Entry, Sizes, compiled_pass, gradients, peer, relative, timed_pass, with_backend
from minitune.ops import nf4
from minitune.ops.adamw8bit import adamw8bit_step, zero_moment
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.ops.nf4_linear import nf4_linear

LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # (out, in) of Llama-3-8B's linear layers
LARGER = ((28672, 8192), (8192, 28672))
SMALL = ((256, 512),)  # on a CPU
FEW_ROWS = 64  # up to so many, calls are timed on copies
RANK = 16


class Weight:
    """One NF4 weight (out, in), double-quantised, as we and as bitsandbytes keep it; and in 16 bits."""

    def __init__(self, n: int, k: int, sizes: Sizes):
        """Draw it; a form is made when asked for."""
        self.full = sizes.draw(n, k).mul_(k**-0.5)

    def in_full(self) -> torch.Tensor:
        """Return the weight in bf16."""
        return self.full

    def ours(self) -> nf4.QuantizedTensor:
        """Return our form."""
        return nf4.quantize(self.full, "nf4", double_quant=True)

    def bitsandbytes(self) -> tuple[torch.Tensor, Any]:
        """Return its packed weight and state."""
        functional = peer("bitsandbytes").functional
        return functional.quantize_4bit(self.full, blocksize=64, compress_statistics=True, quant_type="nf4")


def clone(form: Any) -> Any:
    """Return a copy of a form; the scales of bitsandbytes, 3% of its bytes, are shared."""
    if isinstance(form, nf4.QuantizedTensor):
        return form.apply(torch.clone)
    return (form[0].clone(), form[1]) if isinstance(form, tuple) else form.clone()


def matmul_4bit(x: torch.Tensor, form: tuple) -> torch.Tensor:
    """Return x W^T by bitsandbytes."""
    return peer("bitsandbytes").matmul_4bit(x, form[0].t(), quant_state=form[1])


def _calls(function: Callable, x: torch.Tensor, form: Any, copies: int) -> Calls:
    """Return the call of function(x, form), or several of them on clones of form."""

    def call(form):
        return torch.no_grad()(lambda: function(x, form))

    return call(form) if copies == 1 else [call(clone(form)) for _ in range(copies)]


def _copies(sizes: Sizes, rows: int, size: int, cache_bytes: int) -> int:
    """Return how many copies of a weight of `size` bytes its calls are to be spread over."""
    return max(2, min(64, -(-3 * cache_bytes // size))) if sizes.gpu and rows <= FEW_ROWS else 1


def _forward(sizes: Sizes, rows: int, n: int, k: int, cache_bytes: int) -> Entry:
    """Return the entry of the NF4 linear map of `rows` rows."""

    def side(function, form, spread=True):
        def make():
            copies = _copies(sizes, rows, n * k // 2, cache_bytes) if spread else 1
            return _calls(function, sizes.draw(rows, k), form(Weight(n, k, sizes)), copies)

        return make

    def check():
        weight, x = Weight(n, k, sizes).ours(), sizes.draw(min(rows, 256), k)
        truth = with_backend("reference", nf4_linear)(x.double(), weight)
        return tuple(relative([with_backend(name, nf4_linear)(x, weight)], [truth]) for name in ("auto", "reference"))

    def compiled():
        weight = Weight(n, k, sizes).ours()
        return compiled_pass(lambda x: nf4_linear(x, weight), lambda: (sizes.draw(rows, k),), None)

    sides = {
        "ours": side(nf4_linear, Weight.ours),
        "eager": side(nf4_linear, Weight.ours, spread=False),
        "cublas": side(F.linear, Weight.in_full),
        "bitsandbytes": side(matmul_4bit, Weight.bitsandbytes),
    }
    traffic = n * k / 2 if rows == 1 else n * k * 4.127 / 8 + 2 * rows * (n + k)
    bars = ("matvec",) if rows == 1 and n * k >= 4096**2 else ("cublas",) if rows >= 2048 else ()
    return Entry(
        "nf4_matvec" if rows == 1 else "nf4_matmul", f"NF4 linear M={rows}", f"{n}x{k}", traffic, 2 * rows * n * k,
        sides, check, (*bars, "bitsandbytes"), compiled if (rows, n, k) == (2048, 4096, 4096) else None,
    )  # fmt: skip


def _with_adapter(sizes: Sizes, rows: int, n: int, k: int, cache_bytes: int) -> Entry:
    """Return the entry of the NF4 linear map with LoRA's term in the same launch, beside two launches more."""

    def fused(x, weight, b):
        return nf4_linear(x, weight, x[:, :RANK], b.to(x.dtype), 2.0)

    def apart(x, weight, b):
        return nf4_linear(x, weight).addmm_(x[:, :RANK], b.T, alpha=2.0)

    def side(function, spread=True):
        def make():
            copies = _copies(sizes, rows, n * k // 2, cache_bytes) if spread else 1
            run = partial(function, b=sizes.draw(n, RANK))
            return _calls(run, sizes.draw(rows, k), Weight(n, k, sizes).ours(), copies)

        return make

    def check():
        weight, x = Weight(n, k, sizes).ours(), sizes.draw(min(rows, 256), k)
        run = partial(fused, b=sizes.draw(n, RANK))
        truth = with_backend("reference", run)(x.double(), weight)
        return tuple(relative([with_backend(name, run)(x, weight)], [truth]) for name in ("auto", "reference"))

    sides = {"ours": side(fused), "eager": side(fused, spread=False), "unfused": side(apart)}
    traffic = n * k / 2 if rows == 1 else n * k * 4.127 / 8 + 2 * rows * (n + k)
    return Entry("nf4_matvec" if rows == 1 else "nf4_matmul", f"NF4 linear + LoRA M={rows}", f"{n}x{k}", traffic,
                 2 * rows * (n * k + RANK * n), sides, check, ("unfused",))  # fmt: skip


def _backward(sizes: Sizes, rows: int, n: int, k: int) -> Entry:
    """Return the entry of dx = dy W."""

    def side(function, form):
        def make():
            weight = form(Weight(n, k, sizes))
            return timed_pass(lambda x: function(x, weight), (sizes.draw(rows, k),), (True,))

        return make

    def check():
        weight, x, dy = Weight(n, k, sizes).ours(), sizes.draw(min(rows, 256), k), sizes.draw(min(rows, 256), n)

        def run(name, x):
            return with_backend(name, gradients)(lambda x: nf4_linear(x, weight), (x,), (True,), dy)

        truth = run("reference", x.double())
        return relative(run("auto", x), truth), relative(run("reference", x), truth)

    sides = {
        "ours": side(nf4_linear, Weight.ours),
        "eager": side(nf4_linear, Weight.ours),
        "cublas": side(F.linear, Weight.in_full),
        "bitsandbytes": side(matmul_4bit, Weight.bitsandbytes),
    }
    traffic = n * k * 4.127 / 8 + 2 * rows * (n + k)
    bars = ("cublas", "bitsandbytes") if rows >= 2048 else ("bitsandbytes",)
    return Entry("nf4_matmul_backward", f"NF4 input gradient M={rows}", f"{n}x{k}", traffic, 2 * rows * n * k, sides,
                 check, bars)  # fmt: skip


def linear(sizes: Sizes, cache_bytes: int) -> Iterator[Entry]:
    """NF4 linear maps: forward for 1 to 8,192 rows, with LoRA's term, and the gradient of their input."""
    for n, k in sizes.pick((*LLAMA, *LARGER), SMALL):
        yield _forward(sizes, 1, n, k, cache_bytes)
    for n, k in sizes.pick(LLAMA, SMALL):
        for rows in sizes.pick((2048, 8192, 8, 64, 512), (8, 64)):
            yield _forward(sizes, rows, n, k, cache_bytes)
    for n, k in sizes.pick(LLAMA, SMALL):
        for rows in sizes.pick((2048, 8192, 64, 512), (64,)):
            yield _backward(sizes, rows, n, k)
    for n, k in sizes.pick(LLAMA[::2], SMALL):
        for rows in sizes.pick((1, 8, 64, 2048), (1,)):
            yield _with_adapter(sizes, rows, n, k, cache_bytes)


def _unequal(ours: Any, theirs: Any) -> tuple[float, float]:
    """Return the share of elements that differ, as an error against a reference that has none."""
    return float((ours != theirs).double().mean()), 0.0


def formats(sizes: Sizes) -> Iterator[Entry]:
    """NF4 decoded and encoded; both must equal the reference bit for bit. bytes: 16 bits one way, 4.1 or 4.5 back."""
    for n, k in sizes.pick((LLAMA[0], LLAMA[2], LARGER[0]), SMALL):
        count, shape = n * k, f"{n}x{k}"

        def decode(form=Weight.ours, n=n, k=k):
            weight = form(Weight(n, k, sizes))
            if isinstance(weight, tuple):
                return lambda: peer("bitsandbytes").functional.dequantize_4bit(*weight)
            return lambda: weight.dequantize(DTYPE)

        def encode(n=n, k=k):
            flat = Weight(n, k, sizes).full.view(-1)
            return lambda: nf4.quantize_4bit(flat, 64, "nf4")

        def encode_peer(n=n, k=k):
            full, quantize = Weight(n, k, sizes).full, peer("bitsandbytes").functional.quantize_4bit
            return lambda: quantize(full, blocksize=64, compress_statistics=False, quant_type="nf4")

        def check(n=n, k=k):
            weight = Weight(n, k, sizes).ours()
            return _unequal(*(with_backend(name, weight.dequantize)(DTYPE) for name in ("auto", "reference")))

        def check_codes(n=n, k=k):
            flat = Weight(n, k, sizes).full.view(-1)
            return _unequal(*(with_backend(b, nf4.quantize_4bit)(flat, 64, "nf4")[0] for b in ("auto", "reference")))

        sides = {"ours": decode, "eager": decode, "bitsandbytes": lambda d=decode: d(Weight.bitsandbytes)}
        yield Entry("nf4_dequantize", "NF4 decode", shape, count * (2 + 4.127 / 8), 2 * count, sides, check,
                    ("bitsandbytes",), slack=0.0)  # fmt: skip
        sides = {"ours": encode, "eager": encode, "bitsandbytes": encode_peer}
        yield Entry("nf4_quantize", "NF4 encode", shape, count * (2 + 4.5 / 8), 16 * count, sides, check_codes,
                    ("bitsandbytes",), slack=0.0)  # fmt: skip


def losses(sizes: Sizes) -> Iterator[Entry]:
    """The head's cross-entropy of 4,096 rows over 128,256 tokens: losses and the gradient of hidden, or of both."""
    for rows, width, vocabulary in sizes.pick(((4096, 4096, 128256),), ((64, 128, 2000),)):
        for title, wanted in (("frozen head", (True, False)), ("trained head", (True, True))):

            def step(function, count=rows, wanted=wanted, width=width, vocabulary=vocabulary, wide=False):
                draw = torch.Generator(sizes.device).manual_seed(0)
                shapes = ((count, width), (vocabulary, width))
                tensors = [torch.randn(s, generator=draw, device=sizes.device, dtype=DTYPE) for s in shapes]
                hidden, weight = (
                    (x * scale).to(torch.float64 if wide else DTYPE).requires_grad_(want)
                    for x, scale, want in zip(tensors, (1, width**-0.5), wanted, strict=True)
                )
                targets = torch.randint(0, vocabulary, (count,), generator=draw, device=sizes.device)
                asked = [x for x in (hidden, weight) if x.requires_grad]
                return lambda: torch.autograd.grad(function(hidden, weight, targets), asked)

            def ours(hidden, weight, targets):
                return linear_cross_entropy(hidden, weight, targets).sum()

            def liger(hidden, weight, targets):
                module = peer("liger_kernel.ops.fused_linear_cross_entropy")
                run = module.LigerFusedLinearCrossEntropyFunction.apply
                out = run(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
                return out[0] if isinstance(out, tuple) else out

            def check(step=step, ours=ours):
                truth = with_backend("reference", step(ours, 64, wide=True))()
                return tuple(relative(with_backend(name, step(ours, 64))(), truth) for name in ("auto", "reference"))

            functions = {"ours": ours, "eager": ours, "liger": liger}
            sides = {name: lambda f=f, step=step: step(f) for name, f in functions.items()}
            matmuls = 1 + sum(wanted)
            yield Entry(
                "cross_entropy_rows", f"cross-entropy, {title}", f"{rows}x{vocabulary}x{width}",
                2 * (vocabulary * width * sum((1, *wanted)) + 2 * rows * width),
                2 * matmuls * rows * vocabulary * width, sides, check, ("liger",),
            )  # fmt: skip


def adamw(sizes: Sizes) -> Iterator[Entry]:
    """One step of 8-bit AdamW on bf16 weights; bytes: w and both codes in and out, g in, and a scale for 256 each."""
    for count in sizes.pick((1 << 24, 1 << 27), (1 << 16,)):

        def state(count=count):
            parameter, gradient = sizes.draw(count), sizes.draw(count)
            return parameter, gradient, zero_moment(parameter), zero_moment(parameter)

        def step(*tensors):
            adamw8bit_step(*tensors, 1, 1e-3, (0.9, 0.999), 1e-8, 0.01)

        def make(state=state):
            tensors = state()
            return lambda: step(*tensors)

        def theirs(state=state):
            parameter, gradient, *_ = state()
            parameter = torch.nn.Parameter(parameter)
            parameter.grad = gradient
            return peer("bitsandbytes").optim.AdamW8bit([parameter], lr=1e-3, weight_decay=0.01).step

        def check(state=state):
            parameter, gradient, *_ = state()
            ours, theirs = parameter.clone(), parameter.clone()
            for name, copy in (("auto", ours), ("reference", theirs)):
                with_backend(name, step)(copy, gradient, zero_moment(copy), zero_moment(copy))
            return _unequal(ours, theirs)

        sides = {"ours": make, "eager": make, "bitsandbytes": theirs}
        yield Entry("adamw8bit_update", "8-bit AdamW", f"2^{count.bit_length() - 1}", count * (10 + 16 / 256),
                    20 * count, sides, check, ("bitsandbytes",), slack=1e-4)  # fmt: skip
