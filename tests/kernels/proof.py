"""How a kernel is proven: against fp64, no worse than its reference, on buffers with margins, and against mutants.

    error(kernel) <= 2 error(reference) + a few last bits
for the worst element and for the root mean square, both errors against the reference in fp64 on the same numbers; the
last bits are for outputs where the reference happens to be exact. The margins of inputs are NaN, so what is read there
spoils the result; those of outputs are a number that must still be there. Outputs start as NaN: none may be left out.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minitune.ops.backend import get_backend, set_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")  # the interpreter's bf16 is wrong
SIZES = (1, 15, 17, 63, 65, 257)
MARGIN = 8192  # elements before and after each tensor; no kernel's block is larger
SENTINEL = 777.0


def draw(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return normal numbers, drawn on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def framed(x: torch.Tensor, pitch: int = 0) -> torch.Tensor:
    """Return a copy of x inside NaN: before it, after it and, with a pitch, `pitch` elements after each row."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    width = rows.shape[1] + pitch
    room = torch.full((2 * MARGIN + len(rows) * width,), float("nan"), dtype=x.dtype, device=x.device)
    inner = room[MARGIN : len(room) - MARGIN].view(len(rows), width)[:, : rows.shape[1]]
    inner.copy_(rows)
    return inner.unflatten(0, x.shape[:-1]) if x.dim() > 2 else inner.view(x.shape) if x.dim() < 2 else inner


@contextlib.contextmanager
def guarded_outputs():
    """Within it, torch.empty and empty_like give tensors full of NaN between margins that nothing may write to."""
    rooms, empty = [], torch.empty

    def guarded(*shape, dtype=torch.float32, device=None, **other):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        if not dtype.is_floating_point or other:
            return empty(shape, dtype=dtype, device=device, **other)
        count = torch.Size(shape).numel()
        room = torch.full((count + 2 * MARGIN,), SENTINEL, dtype=dtype, device=device)
        rooms.append(room)
        return room[MARGIN : MARGIN + count].fill_(float("nan")).view(shape)

    like, torch.empty = torch.empty_like, guarded
    torch.empty_like = lambda x: guarded(x.shape, dtype=x.dtype, device=x.device)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, like
    for room in rooms:
        margins = torch.cat([room[:MARGIN], room[-MARGIN:]])
        assert (margins == torch.tensor(SENTINEL).to(room.dtype).to(room.device)).all(), "written outside an output"


@contextlib.contextmanager
def reference_backend():
    """Within it, operations run their references, on a GPU too."""
    before = get_backend()
    set_backend("reference")
    try:
        yield
    finally:
        set_backend(before)


def gradients(function: Callable, inputs: Sequence[torch.Tensor], wanted: Sequence[bool], upstream=None) -> list:
    """Return the value of function(*inputs) and its gradient for each wanted input; upstream is drawn if not given."""
    leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    value = function(*leaves)
    if not any(wanted):
        return [value]
    upstream = draw(*value.shape, dtype=value.dtype, seed=99) if upstream is None else upstream
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    return [value.detach(), *torch.autograd.grad(value, asked, upstream)]


def assert_as_exact(ours: Sequence, theirs: Sequence, truths: Sequence) -> None:
    """Assert that each of `ours` is within twice the error of `theirs`, and alike in dtype and shape."""
    for index, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        assert our.dtype == their.dtype and our.shape == their.shape, (index, our.dtype, our.shape)
        last_bit = torch.finfo(our.dtype).eps
        for name, size in (("worst", lambda x: x.abs().amax()), ("rms", lambda x: x.square().mean().sqrt())):
            error, reference = (size(x.double() - truth) for x in (our, their))
            limit = 2 * reference + last_bit * size(truth) * (2 if name == "worst" else 0.5)
            assert error <= limit, f"output {index}: {name} error {error:.3g}, the reference's {reference:.3g}"


def check(kernel: Callable, reference: Callable, inputs: Sequence[torch.Tensor], wanted: Sequence[bool] = ()) -> None:
    """Run both on inputs, the reference in fp64 too, and compare values and the wanted gradients."""
    wanted = [x.is_floating_point() for x in inputs] if not wanted else wanted
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with reference_backend():
        theirs = gradients(reference, inputs, wanted)
        upstream = draw(*theirs[0].shape, dtype=theirs[0].dtype, seed=99)
        truths = gradients(reference, wide, wanted, upstream.double())
    with guarded_outputs():
        ours = gradients(kernel, inputs, wanted, framed(upstream) if any(wanted) else None)
    assert_as_exact(ours, theirs, truths)


def mutant(module, folder: Path, old: str, new: str):
    """Return a copy of the module in which `old`, which must occur, is `new`."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source, f"{module.__name__} has no {old!r}"
    name = f"mutant_{abs(hash((module.__name__, old, new)))}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
