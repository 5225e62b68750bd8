"""Each operation's hand-written gradient against finite differences in fp64, and its value against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune.ops import attention as attention_module
from minitune.ops.attention import Visibility, _BlockedAttention, _fused, visibility
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.ops.linear import Adapter, Remade, projections, stacked
from minitune.ops.norm import rms_norm
from minitune.ops.rope import apply_rope, rope_tables
from minitune.ops.swiglu import geglu, swiglu


def draw(*shape, seed=0, grad=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def test_rms_norm():
    x, w = draw(2, 3, 5), draw(5, seed=1)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (5,), w, 1e-5))
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, w))


def test_rms_norm_with_offset():
    x, w = draw(2, 3, 5), draw(5, seed=1)
    torch.testing.assert_close(rms_norm(x, w, 1e-5, 1.0), F.rms_norm(x, (5,), 1 + w, 1e-5))
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5, 1.0), (x, w))


def test_the_offset_form_is_rounded_once():
    x, w = draw(64, 33, grad=False).half(), draw(33, seed=1, grad=False).half()
    wide = F.rms_norm(x.float(), (33,), 1 + w.float(), 1e-5)
    assert torch.equal(rms_norm(x, w, 1e-5, 1.0), wide.half())
    assert not torch.equal(rms_norm(x, 1 + w, 1e-5), wide.half())  # Llama's form rounds twice


def test_swiglu():
    gate, up = draw(2, 7), draw(2, 7, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)
    assert gradcheck(swiglu, (gate, up))


def test_geglu():
    gate, up = draw(2, 7), draw(2, 7, seed=1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(geglu(gate, up), 0.5 * gate * (1 + torch.tanh(inner)) * up)
    assert gradcheck(geglu, (gate, up))


def test_rope_turns_each_pair_by_its_angle():
    x = draw(1, 3, 2, 4)
    positions = torch.tensor([[0, 1, 5]])
    cos, sin = rope_tables(positions, 4, 100.0)
    out = apply_rope(x, cos, sin)
    for t, position in enumerate((0, 1, 5)):
        for pair in (0, 1):
            angle = torch.tensor(position / 100.0 ** (2 * pair / 4), dtype=torch.float64)
            a, b = x[0, t, :, pair], x[0, t, :, pair + 2]
            torch.testing.assert_close(out[0, t, :, pair], a * angle.cos() - b * angle.sin(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(out[0, t, :, pair + 2], b * angle.cos() + a * angle.sin(), rtol=1e-6, atol=1e-6)
    assert gradcheck(lambda x: apply_rope(x, cos, sin), (x,))


def eager_projections(x, weights, biases, adapters):
    outs = []
    for weight, bias, adapter in zip(weights, biases, adapters, strict=True):
        full = weight if adapter is None else weight + adapter.scaling * adapter.B @ adapter.A
        outs.append(F.linear(x, full, bias))
    return outs


@pytest.mark.parametrize("present", [(True,), (True, True, True), (False, True), (True, False, True), (False, False)])
@pytest.mark.parametrize("train_base", [False, True])
def test_projections(present, train_base):
    count = len(present)
    sizes = (4, 2, 3)[:count]
    joined = draw(sum(sizes), 5, grad=False)
    weights = [part.detach().requires_grad_(train_base) for part in joined.split(sizes)]
    assert stacked(weights) is not None and stacked(weights[::-1] + [draw(1, 5)]) is None
    biases = [draw(size, seed=9, grad=train_base) if i != 1 else None for i, size in enumerate(sizes)]
    adapters = [
        Adapter(draw(2 + i, 5, seed=20 + i), draw(size, 2 + i, seed=30 + i), 0.5 + i) if has else None
        for i, (size, has) in enumerate(zip(sizes, present, strict=True))
    ]
    x = draw(2, 3, 5, seed=3)
    for ours, eager in zip(
        projections(x, weights, biases, adapters), eager_projections(x, weights, biases, adapters), strict=True
    ):
        torch.testing.assert_close(ours, eager)
    factors = [factor for adapter in adapters if adapter for factor in (adapter.A, adapter.B)]

    def run(x, *rest):
        rest = list(rest)
        own = [Adapter(rest.pop(0), rest.pop(0), adapter.scaling) if adapter else None for adapter in adapters]
        return projections(x, rest[:count], rest[count:] if train_base else biases, own)

    extra = [bias for bias in biases if bias is not None]
    if train_base and None in biases:
        biases_in = biases

        def run_with_none(x, *rest):
            rest = list(rest)
            given = iter(rest[len(rest) - len(extra) :])
            return run(x, *rest[: len(rest) - len(extra)], *[None if b is None else next(given) for b in biases_in])

        assert gradcheck(run_with_none, (x, *factors, *weights, *extra))
    else:
        assert gradcheck(run, (x, *factors, *weights, *(extra if train_base else [])))


def test_projections_dropout_is_one_mask_for_forward_and_backward():
    x, weight = draw(4, 6), [draw(3, 6, grad=False, seed=1)]
    adapter = Adapter(draw(2, 6, seed=2), draw(3, 2, seed=3), 2.0)
    torch.manual_seed(5)
    keep = torch.empty(4, 6, dtype=torch.float64).bernoulli_(0.5).div_(0.5)
    torch.manual_seed(5)
    (ours,) = projections(x, weight, [None], [adapter], dropout=0.5)
    eager = x @ weight[0].T + 2.0 * (x * keep) @ adapter.A.T @ adapter.B.T
    torch.testing.assert_close(ours, eager)
    inputs = (x, adapter.A, adapter.B)
    upstream = draw(4, 3, seed=7, grad=False)
    grads = (torch.autograd.grad(out, inputs, upstream) for out in (ours, eager))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_an_input_that_is_made_again_gives_the_same_gradients():
    gate, up, weight = draw(3, 4), draw(3, 4, seed=1), draw(2, 4, seed=2)
    adapter = Adapter(draw(2, 4, seed=3), draw(2, 2, seed=4), 2.0)
    assert gradcheck(
        lambda gate, up, weight, A, B: projections(Remade.of(swiglu, gate, up), [weight], [None], [Adapter(A, B, 2.0)]),
        (gate, up, weight, adapter.A, adapter.B),
    )
    kept, made = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        remade = Remade.of(lambda *inputs: made.append(swiglu(*inputs)) or made[-1], gate, up)
        projections(remade, [weight], [None], [adapter])
    assert made[0].data_ptr() not in kept and gate.data_ptr() in kept


@pytest.mark.parametrize("span", [2048, 32])  # bytes: all rows at once, four at a time
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy(monkeypatch, weighted, span):
    monkeypatch.setattr("minitune.ops.cross_entropy.SPAN", span)
    monkeypatch.setattr("minitune.ops.cross_entropy.CHUNK", 3)
    monkeypatch.setattr("minitune.ops.cross_entropy.GRAIN", 4)
    hidden, head = draw(7, 4), draw(11, 4, seed=1)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    eager = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), eager)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), eager)
    scale = torch.arange(1.0, 8.0, dtype=torch.float64) if weighted else torch.ones(7, dtype=torch.float64)
    assert gradcheck(lambda h, w: (linear_cross_entropy(h, w, targets) * scale).sum(), (hidden, head))


class Made(TorchDispatchMode):
    """Notes the dtype of every new storage of at least the bytes of `known`."""

    def __init__(self, known):
        super().__init__()
        self.threshold, self.seen, self.dtypes = known.nbytes, {known.untyped_storage().data_ptr()}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.threshold and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.dtypes.append(tensor.dtype)
        return result


def head_gradient(hidden, head, targets, monkeypatch):
    """Return the head's gradient over three spans of 128 rows and three slices of it, and the large tensors made."""
    monkeypatch.setattr("minitune.ops.cross_entropy.SPAN", 256)  # bytes
    monkeypatch.setattr("minitune.ops.cross_entropy.SLICE", 300)
    with Made(head) as made:
        linear_cross_entropy(hidden, head, targets).sum().backward()
    return head.grad, made.dtypes


def test_a_16_bit_head_gradient_is_summed_in_fp32_without_a_copy(monkeypatch):
    rows, vocabulary, width = 300, 700, 640
    hidden = draw(rows, width, dtype=torch.bfloat16, grad=False)
    head = draw(vocabulary, width, seed=1, dtype=torch.bfloat16)
    targets = torch.arange(rows) * 7 % vocabulary
    wide = head.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ wide.T, targets, reduction="sum").backward()
    eager = head.detach().clone().requires_grad_()
    F.cross_entropy((hidden @ eager.T).float(), targets, reduction="sum").backward()
    ours, made = head_gradient(hidden, head, targets, monkeypatch)
    error, theirs = ((grad.double() - wide.grad).norm() / wide.grad.norm() for grad in (ours, eager.grad))
    assert error <= 2 * theirs
    assert made == [torch.float32, torch.bfloat16], "the sum, and what it is rounded to"


@pytest.mark.parametrize("length,block", [(5, 2), (4, 4), (7, 3), (6, 16)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_blocked_attention_gradient(monkeypatch, length, block, packed, softcap):
    monkeypatch.setattr(attention_module, "BLOCK", block)
    monkeypatch.setattr(attention_module, "GRAIN", 2)
    q, k, v = draw(2, 4, length, 2), draw(2, 2, length, 2, seed=1), draw(2, 2, length, 2, seed=2)
    positions = torch.arange(length).repeat(2, 1)
    if packed:
        positions[0, 2:] -= 2
        positions[1, 3:] -= 3
    seen = visibility(positions) if packed else Visibility(None, causal=True)
    assert gradcheck(lambda q, k, v: _BlockedAttention.apply(q, k, v, seen, 0.9, softcap), (q, k, v))
    upstream = draw(2, 4, length, 2, seed=4, grad=False)
    mixed = _BlockedAttention.apply(q, k, v, seen, 0.9, softcap)
    expected = plain_attention(q, k, v, visibility(positions).mask, 0.9, softcap)
    torch.testing.assert_close(mixed, expected)
    ours = torch.autograd.grad(mixed, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def plain_attention(q, k, v, mask, scale, softcap):
    """The equation as it stands, with whole score matrices."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


def test_bf16_attention_gradient_is_as_exact_as_the_fused_one():
    shapes = ((2, 4, 200, 16), (2, 2, 200, 16), (2, 2, 200, 16))
    wide = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    upstream = draw(2, 4, 200, 16, seed=9, grad=False)
    seen = Visibility(None, causal=True)
    truth = torch.autograd.grad(_fused(*wide, seen, 0.25), wide, upstream)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    truth_narrow = [x.detach().double().requires_grad_() for x in narrow]
    truth = torch.autograd.grad(_fused(*truth_narrow, seen, 0.25), truth_narrow, upstream.bfloat16().double())

    def errors(function):
        grads = torch.autograd.grad(function(), narrow, upstream.bfloat16())
        return [((g.double() - t).norm() / t.norm()).item() for g, t in zip(grads, truth, strict=True)]

    ours = errors(lambda: _BlockedAttention.apply(*narrow, seen, 0.25, None))
    theirs = errors(lambda: _fused(*narrow, seen, 0.25))
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_losses_are_the_same_bits_with_and_without_gradient(rows, dtype, softcap):
    draw = torch.Generator().manual_seed(rows)
    hidden, head = (torch.randn(n, 48, generator=draw).to(dtype) for n in (rows, 501))
    targets = torch.randint(0, 501, (rows,), generator=draw)
    without = linear_cross_entropy(hidden, head, targets, softcap=softcap)
    with_gradient = linear_cross_entropy(hidden.clone().requires_grad_(), head, targets, softcap=softcap)
    assert torch.equal(without, with_gradient)
