"""The linear map over NF4 against its reference in fp64, in each of its ways."""

import pytest
import torch

from minitune.errors import ConfigError
from minitune.kernels import nf4_matmul
from minitune.ops.nf4_linear import nf4_linear as reference
from tests.kernels.proof import DTYPES, check, draw, framed, gradients, mutant, reference_backend
from tests.kernels.test_nf4 import quantized

KERNELS = ("nf4_matvec", "nf4_matmul", "nf4_matmul_backward", "nf4_dequantize")
ROWS = (1, 2, 7, 8, 15, 17, 63, 64, 65, 257)
HALF = DTYPES[-1]  # fp16, or bf16 on a GPU: what the tiles take


def weight(n: int, k: int, **options):
    flat = quantized(n * k, **options)
    return flat.__class__(**{**vars(flat), "shape": torch.Size((n, k))})


def run(module, m, w, dtype, *, rank=0, pitch=0, wanted=None, scaling=0.5):
    n, k = w.shape
    inputs = [framed(draw(m, k, dtype=dtype, seed=1), pitch)]
    if rank:
        inputs += [framed(draw(m, rank, dtype=dtype, seed=2), pitch), framed(draw(n, rank, dtype=dtype, seed=3))]
    functions = (lambda x, *low, f=f: f(x, w, *low, scaling=scaling) for f in (module.nf4_linear, reference))
    check(*functions, inputs, wanted or (True,) * len(inputs))


def test_the_reference():
    """Its gradients are those of differences in fp64, and its value is that of the dequantised weight."""
    w = weight(5, 64)
    inputs = [draw(*shape, seed=i).double().requires_grad_() for i, shape in enumerate([(3, 64), (3, 2), (5, 2)])]
    with reference_backend():
        assert torch.autograd.gradcheck(lambda x, u, b: reference(x, w, u, b, 0.5), inputs)
        x, u, b = (tensor.detach() for tensor in inputs)
        truth = torch.einsum("mk,nk->mn", x, w.dequantize().double()) + 0.5 * torch.einsum("mr,nr->mn", u, b)
        torch.testing.assert_close(reference(x, w, u, b, 0.5), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("rank", [0, 4])
def test_rows(dtype, m, rank):
    run(nf4_matmul, m, weight(70, 192), dtype, rank=rank, pitch=3)


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("n,k", [(1, 64), (15, 64), (65, 320), (257, 64), (3, 1088), (17, 4096)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_sizes(m, n, k, double_quant):
    run(nf4_matmul, m, weight(n, k, double_quant=double_quant), HALF, pitch=8)


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("block_size", [32, 128, 1024, 2048])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks(m, block_size, kind):
    run(nf4_matmul, m, weight(9, 2048, block_size=block_size, kind=kind), HALF)


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k", [(17, 63), (16, 100), (5, 1), (33, 65)])
def test_blocks_across_rows(m, dtype, n, k):
    assert nf4_matmul.plan(m, n, k, 64, dtype).way == "dequantize"
    run(nf4_matmul, m, weight(n, k), dtype, rank=3)


@pytest.mark.parametrize("m", [1, 2, 17])
def test_shared_contraction(m, monkeypatch):
    """Programs share the contraction, the last with less than the others."""
    monkeypatch.setattr(nf4_matmul, "PROGRAMS", 10**6)
    sizes = nf4_matmul.plan(m, 40, 1728, 64, HALF)
    if m > 1:
        assert 0 < 1728 % sizes.span < sizes.span
    run(nf4_matmul, m, weight(40, 1728), HALF, rank=5)
    run(nf4_matmul, m, weight(600, 64), HALF, rank=5)


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, False)])
def test_low_rank(m, rank, wanted):
    run(nf4_matmul, m, weight(33, 64), HALF, rank=rank, wanted=wanted)


def check_strided_upstream(module):
    """A dy with gaps between its rows, and one that is expanded, give what the same numbers give without gaps."""
    w, x = weight(40, 64), draw(17, 64, dtype=HALF)
    for upstream in (draw(17, 43, dtype=HALF)[:, :40], torch.ones_like(x[0, 0]).expand(17, 40)):
        strided, whole = (
            gradients(lambda x: module.nf4_linear(x, w), (x,), (True,), dy) for dy in (upstream, upstream.contiguous())
        )
        assert torch.equal(strided[1], whole[1])


def test_other_layouts():
    w = weight(40, 64)
    x = draw(64, 3, 5, dtype=HALF).permute(1, 2, 0)
    check(lambda x: nf4_matmul.nf4_linear(x, w), lambda x: reference(x, w), (x,))
    rows = draw(17, 128, dtype=HALF)[:, ::2]
    check(lambda x: nf4_matmul.nf4_linear(x, w), lambda x: reference(x, w), (rows,))
    check_strided_upstream(nf4_matmul)
    assert nf4_matmul.nf4_linear(draw(0, 64), w).shape == (0, 40)
    assert nf4_matmul.nf4_linear(draw(64), w).shape == (40,)


def test_the_plan():
    """Every way is taken where it should be; tiles and shares cover the whole contraction."""
    plan = nf4_matmul.plan
    assert plan(1, 4096, 4096).way == "matvec" and plan(1, 4096, 4096).BN == 8 and plan(1, 28672, 8192).BN == 16
    assert plan(1, 4096, 4096, backward=True).way == plan(64, 4096, 4096).way == "tiles"
    assert plan(65, 4096, 4096).way == plan(0, 4096, 4096).way == plan(2, 64, 96).way == "dequantize"
    assert plan(2, 4096, 4096, dtype=torch.float32).way == "dequantize"
    shapes = [(2, 64, 64, False), (16, 1024, 4096, True), (64, 4096, 14336, False), (2, 576, 1536, True)]
    for m, n, k, backward in shapes:
        sizes = plan(m, n, k, backward=backward)
        inside, step = (n, sizes.BN) if backward else (k, sizes.BK)
        programs = -(-k // sizes.BK) if backward else -(-n // sizes.BN)
        assert sizes.span > 0 and sizes.span % step == 0
        assert -(-inside // sizes.span) * programs <= max(nf4_matmul.PROGRAMS, programs)


def test_bad_input():
    w, x = weight(8, 64), draw(2, 64)
    u, b = draw(2, 4), draw(8, 4)
    linear = nf4_matmul.nf4_linear

    def misplaced(tensor):
        return torch.cat([tensor[:1], tensor])[1:] if tensor.dtype == torch.uint8 else tensor

    cases = [
        (lambda: linear(x.double(), w), "x is float64"),
        (lambda: linear(draw(2, 63), w), "x has the shape (2, 63), but the kernel needs (..., 64)"),
        (lambda: linear(x, w, u), "u and B must be given together"),
        (lambda: linear(x, w, u, b.half()), "B is float16"),
        (lambda: linear(x, w, u[:, :3], b), "u has the shape (2, 3)"),
        (lambda: linear(x, w, u, draw(4, 8).T), "B has the strides (1, 8)"),
        (lambda: linear(x, w.apply(lambda t: t.to("meta"))), "packed is on meta"),
        (lambda: linear(x, quantized(64)), "weight has the shape (64,)"),
        (lambda: linear(x, weight(8, 64, double_quant=False).apply(lambda t: t[:-1])), "packed has the shape (255,)"),
        (lambda: linear(x[:1], w.apply(misplaced)), "packed does not begin at a multiple of 4 bytes"),
    ]
    for call, text in cases:
        with pytest.raises(ConfigError) as caught:
            call()
        assert text in str(caught.value) and "\n" not in str(caught.value)


MUTANTS = [
    ("4 * (j ^ 1)", "4 * j"),  # the nibbles swapped
    ("* 8 // BLOCK_SIZE", "* 8 // BLOCK_SIZE + 1"),  # the neighbour's scale
    ("pair[j >> 2]", "pair[1 - (j >> 2)]"),
    ("[(j >> 1) & 1])", "[0])"),
    ("odd if j & 1 else even", "even if j & 1 else odd"),
    ("mask=lane < left * 8", "mask=lane < left * 8 + 1"),
    ("scaling * tl.sum", "tl.sum"),
    ("tl.store(y + row, result.to(y.dtype.element_ty), mask=row < n)", "tl.store(y + row, result.to(tl.float16))"),
    ("column[None, :]) // BLOCK_SIZE", "column[None, :]) // BLOCK_SIZE + 1"),
    ("(row < rows)[:, None] & (column < columns)[None, :]", "(row < rows)[:, None] & (column <= columns)[None, :]"),
    ("if tl.program_id(2) == 0:", "if True:"),
    ("scaling * tl.dot(factor", "tl.dot(factor"),
    ("tile = _load_tile(dy, row, m, dy_stride, inner, n)", "tile = _load_tile(dy, row, m, n, inner, n)"),
    ("dx += tl.program_id(2)", "dx += 0 * tl.program_id(2)"),
    ("(rows @ b).mul_(ctx.scaling)", "(rows @ b)"),
    ("(rows.T @ as_rows(u)).mul_(ctx.scaling)", "rows.T @ as_rows(u)"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(nf4_matmul, tmp_path, old, new)
    wrong.PROGRAMS = 10**6
    with pytest.raises(AssertionError):
        run(wrong, 1, weight(20, 64 + 1024), torch.float16, rank=3)
        run(wrong, 9, weight(600, 64), torch.float16, rank=3, pitch=1)
        run(wrong, 9, weight(20, 1088), torch.float16, rank=3, pitch=1)
        check_strided_upstream(wrong)


def test_a_wrong_scale_is_caught(tmp_path, monkeypatch):
    """The offset of double quantisation left out; the nibbles of the tiles swapped."""
    for old, new in [(" + tl.load(offset)", ""), ("tl.join(pair >> 4, pair & 15)", "tl.join(pair & 15, pair >> 4)")]:
        wrong = mutant(nf4_matmul.nf4, tmp_path, old, new)
        for name in ("load_absmax", "unpack"):
            monkeypatch.setattr(nf4_matmul, name, getattr(wrong, name))
        with pytest.raises(AssertionError):
            run(nf4_matmul, 9, weight(20, 64), torch.float16)
