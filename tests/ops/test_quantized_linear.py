"""Projections over quantised weights: bit for bit those over the same weights decoded, and nothing decoded is kept."""

import itertools
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune.ops import blockwise8, linear, nf4
from minitune.ops.linear import Adapter, Remade, projections
from minitune.ops.nf4 import QuantizedTensor, quantize
from minitune.ops.swiglu import swiglu

WIDTH = 33  # so that a weight's elements fill neither whole blocks nor whole bytes, and the next one is not aligned
SIZES = (7, 5, 3)
KINDS = {
    "nf4": {"kind": "nf4"},
    "nf4, fp32 scales, short blocks": {"kind": "nf4", "double_quant": False, "block_size": 32},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantised(options, count, dtype=torch.float32, width=WIDTH, sizes=SIZES):
    weights = [draw(size, width, seed=10 + i, dtype=dtype) for i, size in enumerate(sizes[:count])]
    return [quantize(weight, **options) for weight in weights]


def plain(weights, dtype):
    return [w.dequantize(dtype) if isinstance(w, QuantizedTensor) else w for w in weights]


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def run(weights, x, *, biases=(), adapters=(), dropout=0.0, remade=False, train_plain=False):
    """Apply the maps once, tracked; returns every output and every gradient."""
    inputs = [leaf(x), leaf(x.flip(-1))] if remade else [leaf(x)]
    given = Remade.of(swiglu, *inputs) if remade else inputs[0]
    weights = [leaf(w) if isinstance(w, torch.Tensor) and train_plain else w for w in weights]
    biases = [
        leaf(draw(w.shape[0], seed=30 + i, dtype=x.dtype)) if i in biases else None for i, w in enumerate(weights)
    ]
    made = [
        Adapter(leaf(draw(2 + i, x.shape[-1], seed=40 + i)), leaf(draw(w.shape[0], 2 + i, seed=50 + i)), 0.5 + i)
        if i in adapters
        else None
        for i, w in enumerate(weights)
    ]
    torch.manual_seed(3)
    outs = projections(given, weights, biases, made, dropout)
    torch.autograd.backward(outs, [draw(*out.shape, seed=60 + i, dtype=out.dtype) for i, out in enumerate(outs)])
    factors = [factor for adapter in made if adapter for factor in (adapter.A, adapter.B)]
    leaves = [t for t in (*inputs, *weights, *biases, *factors) if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*outs, *(t.grad for t in leaves)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


EVERYTHING = {"biases": (0, 2), "adapters": (0, 1), "dropout": 0.4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (130,)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                    (torch.bfloat16, torch.float32), (torch.float32, torch.float16)])  # fmt: skip
def test_equal_to_the_decoded_weights_bit_for_bit(kind, count, shape, dtypes):
    stored, computed = dtypes
    weights, x = quantised(KINDS[kind], count, stored), draw(*shape, WIDTH, seed=5, dtype=computed)
    twins = plain(weights, computed)
    for options in ({}, {"biases": (1,)}, {"adapters": (0, 1, 2)}, EVERYTHING, {**EVERYTHING, "remade": True}):
        ours = run(weights, x, **options)
        assert equal(ours, run(twins, x, **options)), options
        assert all(torch.isfinite(tensor).all() and tensor.count_nonzero() for tensor in ours)
    adapters = [Adapter(draw(2, WIDTH, seed=1), draw(w.shape[0], 2, seed=2), 2.0) for w in weights]
    for mode, made in itertools.product((torch.no_grad, torch.inference_mode), (adapters, [None] * count)):
        with mode():
            ours, theirs = (projections(x, some, [None] * count, made) for some in (weights, twins))
            assert equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("train_plain", [False, True])
def test_quantised_and_plain_weights_side_by_side(kind, which, train_plain):
    x = draw(4, WIDTH, seed=5)
    full, twins = quantised(KINDS[kind], 3), plain(quantised(KINDS[kind], 3), x.dtype)
    mixed = [weight if i in which else twin for i, (weight, twin) in enumerate(zip(full, twins, strict=True))]
    for options in ({}, EVERYTHING):
        ours = run(mixed, x, train_plain=train_plain, **options)
        theirs = run(twins, x, train_plain=train_plain, **options)
        if train_plain:  # of the twins also those were trained that are quantised in ours
            start = 3 + 1
            theirs = theirs[:start] + [theirs[start + i] for i in range(3) if i not in which] + theirs[start + 3 :]
        assert equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind):
    weights = quantised(KINDS[kind], 2)
    x, a, b = (draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(3, WIDTH), (2, WIDTH), (7, 2)]))
    inputs = [tensor.requires_grad_() for tensor in (x, a, b)]
    assert gradcheck(lambda x, a, b: projections(x, weights, [None] * 2, [Adapter(a, b, 1.5), None]), inputs)
    value = projections(x, weights, [None] * 2, [Adapter(a, b, 1.5), None])
    eager = [x @ weight.dequantize(torch.float64).T for weight in weights]
    torch.testing.assert_close(value[0], eager[0] + 1.5 * x @ a.T @ b.T)
    torch.testing.assert_close(value[1], eager[1])


def rolled_in_backward(original):
    """Decode the weights in another order, but only in a backward pass."""
    calls = itertools.count()
    return lambda weights, like: original(weights[::-1] if next(calls) % 2 else weights, like)


def one_ulp_off(original):
    return lambda weights, like: original(weights, like) * (1 + 2**-23)


def rounded_through_bf16(original):
    return lambda weights, like: original(weights, like).bfloat16().to(like.dtype)


@pytest.mark.parametrize("mutant", [rolled_in_backward, one_ulp_off, rounded_through_bf16])
def test_a_wrong_decoding_is_noticed(monkeypatch, mutant):
    weights, x = quantised(KINDS["nf4"], 2, sizes=(6, 6)), draw(5, WIDTH, seed=5)
    expected = run(plain(weights, x.dtype), x, **EVERYTHING)
    assert equal(run(weights, x, **EVERYTHING), expected)
    monkeypatch.setattr(linear, "_join", mutant(linear._join))
    assert not equal(run(weights, x, **EVERYTHING), expected)


LARGE = ((512, 256, 256), 1024)  # decoded: 4 MB of fp32


def large(count=3):
    return quantised(KINDS["nf4"], count, width=LARGE[1], sizes=LARGE[0])


def test_what_is_kept_for_the_backward_pass():
    """x, u, the mask and the adapters, to the byte; of the weights only what they are stored as."""
    weights = large()
    x = draw(4, LARGE[1], seed=5).requires_grad_()
    adapter = Adapter(leaf(draw(3, LARGE[1], seed=1)), leaf(draw(512, 3, seed=2)), 2.0)
    for twin, kept_weights in ((weights, 0), (plain(weights, x.dtype), 4 * sum(w.shape.numel() for w in weights))):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = projections(x, twin, [None] * 3, [adapter, None, None], dropout=0.5)[0]
        own = x.nbytes * 2 + 4 * 4 * 3 + adapter.A.nbytes + adapter.B.nbytes  # x, mask (4, in) and u (4, R)
        assert sum(tensor.nbytes for tensor in kept) == own + kept_weights
        held = [value for value in tree_leaves(vars(out.grad_fn)) if isinstance(value, torch.Tensor | QuantizedTensor)]
        assert all(any(value is weight for weight in weights) for value in held)
    rooms = {room.untyped_storage().data_ptr() for room in linear._rooms.values()}
    assert not rooms & {tensor.untyped_storage().data_ptr() for tensor in kept}


class Allocations(TorchDispatchMode):
    """Sums the bytes of every storage that an operation makes anew, of those above a threshold."""

    def __init__(self, threshold, known):
        super().__init__()
        self.threshold, self.known, self.new = threshold, {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.threshold and storage.data_ptr() not in self.known:
                self.new.append((str(function), storage.nbytes()))
        return result


def allocated(weights, threshold=1 << 20):
    adapter = Adapter(leaf(draw(3, LARGE[1], seed=1)), leaf(draw(512, 3, seed=2)), 2.0)
    x = draw(4, LARGE[1], seed=5).requires_grad_()
    decoding = nf4._room(x.device, nf4.DECODED // 2, threading.get_ident())  # of one size, whatever is decoded
    with Allocations(threshold, [*linear._rooms.values(), *decoding]) as mode:
        outs = projections(x, weights, [None] * 3, [adapter, None, None])
        sum(out.sum() for out in outs).backward()
    return mode.new


def test_a_step_allocates_nothing_of_the_size_of_a_weight():
    weights = large()
    allocated(weights)  # makes the room
    assert allocated(weights) == []
    assert len(allocated(plain(weights, torch.float32))) >= 2, "weights apart are joined in each pass: it can be seen"


def test_all_layers_share_one_room_that_grows_to_the_largest(monkeypatch):
    monkeypatch.setattr(linear, "_rooms", {})
    for sizes in ((64,), (512, 256), (128,), (256, 256, 256)):
        weights = quantised(KINDS["nf4"], len(sizes), width=128, sizes=sizes)
        run(weights, draw(4, 128, seed=5), adapters=(0,))
    assert [len(room) for room in linear._rooms.values()] == [768 * 128]
    run(weights, draw(4, 128, seed=5, dtype=torch.bfloat16))
    assert sorted(room.dtype.itemsize for room in linear._rooms.values()) == [2, 4], "another dtype has its own"


def forget():
    """Put the caches back to those of a process that has decoded nothing."""
    linear._rooms.clear()
    for module in (nf4, blockwise8):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_a_first_use_in_inference_mode(kind):
    x = draw(4, WIDTH, seed=5)
    weights = quantised(KINDS[kind], 2)
    expected = run(plain(weights, x.dtype), x, **EVERYTHING)
    forget()
    try:
        with torch.inference_mode():
            loaded = quantised(KINDS[kind], 2)  # also a model that was loaded there
            projections(x, loaded, [None] * 2, [None] * 2)
        assert equal(run(weights, x, **EVERYTHING), expected)
        assert equal(run(loaded, x, **EVERYTHING), expected)
    finally:
        forget()  # what was cached in inference mode is no business of the tests after this one


def at_once(*works):
    """Run the functions on a thread each; returns their results, raises what one of them raised."""
    results, errors = [None] * len(works), []

    def call(i):
        try:
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def meeting_before_each_matmul(monkeypatch):
    """Let two threads have decoded their weights before either of them multiplies."""
    barrier, original = threading.Barrier(2, timeout=20), linear.F.linear

    def meet(*arguments):
        barrier.wait()
        return original(*arguments)

    monkeypatch.setattr(linear.F, "linear", meet)


@pytest.mark.parametrize("separate", [True, False])
def test_two_threads_do_not_write_to_each_others_room(monkeypatch, separate):
    x = draw(4, 64, seed=5)
    weights = [quantize(draw(96, 64, seed=seed)) for seed in (1, 2)]
    expected = [x @ weight.dequantize().T for weight in weights]
    if not separate:
        monkeypatch.setattr(linear, "threading", SimpleNamespace(get_ident=lambda: 0))
    projections(x, weights[:1], [None], [None])  # the room that both would share is there
    meeting_before_each_matmul(monkeypatch)
    ours = at_once(*(lambda w=w: projections(x, [w], [None], [None])[0] for w in weights))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, expected, strict=True)) == separate


def test_many_passes_on_two_threads_at_once():
    x, until = draw(8, 1024, seed=5), time.monotonic() + 1.0
    groups = [large(), quantised(KINDS["fp4"], 2, width=1024, sizes=(300, 500))]

    def once(group):  # draws nothing: all threads share the random state
        given = leaf(x)
        outs = projections(given, group, [None] * len(group), [None] * len(group))
        sum(out.sum() for out in outs).backward()
        return [*outs, given.grad]

    def often(group, expected):
        rounds = 0
        while time.monotonic() < until or rounds < 3:
            rounds += 1
            if not equal(once(group), expected):
                return False
        return True

    works = [partial(often, group, once(plain(group, x.dtype))) for group in groups]
    assert at_once(*works) == [True, True]
