"""The NF4 and FP4 kernels, bit for bit against `ops/nf4.py`."""

from dataclasses import replace

import pytest
import torch

from minitune.codebooks import ascending, midpoints
from minitune.errors import ConfigError
from minitune.kernels import nf4
from minitune.ops import nf4 as reference
from tests.kernels.proof import DEVICE, DTYPES, SIZES, draw, framed, guarded_outputs, mutant, reference_backend

KERNELS = ("nf4_dequantize", "nf4_quantize")
MARGIN = 4096
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN and infinity


def quantized(n, dtype=torch.float32, block_size=64, double_quant=True, kind="nf4") -> reference.QuantizedTensor:
    """Quantise numbers whose blocks differ in size by the reference, and frame what is fp32 with NaN."""
    x = draw(n, dtype=dtype) * (1 + torch.arange(n, device=DEVICE) // block_size % 7)
    with reference_backend():
        weight = reference.quantize(x, kind, block_size=block_size, double_quant=double_quant)
    return weight.apply(lambda tensor: framed(tensor) if tensor.is_floating_point() and tensor.dim() else tensor)


def check_dequantize(module, weight, dtype):
    with reference_backend():
        truth = weight.dequantize(dtype)
    with guarded_outputs():
        ours = module.dequantize(weight, dtype)
    assert ours.dtype == dtype and torch.equal(ours, truth)
    room = torch.full((len(truth) + 2 * MARGIN,), float("nan"), dtype=dtype, device=DEVICE)
    out = room[MARGIN:-MARGIN]
    module.dequantize(weight, out=out)
    assert torch.equal(out, truth) and room[:MARGIN].isnan().all() and room[-MARGIN:].isnan().all()


def check_quantize(module, x, block_size, kind):
    with reference_backend():
        packed, absmax = reference.quantize_4bit(x, block_size, kind)
    with guarded_outputs():
        ours = module.quantize_4bit(framed(x), block_size, kind)
    torch.testing.assert_close(ours, (packed, absmax), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 2, 4096, 4097, 64 * 256 + 129])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize(dtype, n, double_quant):
    check_dequantize(nf4, quantized(n, dtype, double_quant=double_quant), dtype)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [257, 9001])
def test_other_blocks(block_size, kind, n):
    for double_quant in (True, False):
        check_dequantize(nf4, quantized(n, torch.float16, block_size, double_quant, kind), torch.float16)
    check_quantize(nf4, draw(n), block_size, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 2, 64 * 33 + 1])
def test_quantize(dtype, n):
    check_quantize(nf4, draw(n, dtype=dtype), 64, "nf4")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_what_is_rare(kind):
    """Every boundary and its neighbours; blocks of zeros, of the smallest numbers, with a NaN, with an infinity."""
    middle = midpoints(ascending(kind, DEVICE)[0])
    near = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), middle.new_ones(1), -middle])
    check_quantize(nf4, near, 64, kind)
    for value in (0.0, -0.0, 1e-45, 1e-38, -3e38, float("inf"), float("nan")):
        x = draw(200)
        x[64:128] = 0
        x[70] = value
        packed, absmax = nf4.quantize_4bit(x, 64, kind)
        with reference_backend():
            theirs = reference.quantize_4bit(x, 64, kind)
        torch.testing.assert_close(absmax, theirs[1], rtol=0, atol=0, equal_nan=True)
        fine = torch.arange(100, device=DEVICE) // 32 != 1 if abs(value) > 1 or value != value else slice(None)
        assert torch.equal(packed[fine], theirs[0][fine])


def test_a_matrix_into_a_given_tensor():
    with reference_backend():
        weight = reference.quantize(draw(17, 9), double_quant=False)  # blocks span rows, and the number is odd
        truth = weight.dequantize()
    out = torch.empty(17, 9, device=DEVICE)
    assert nf4.dequantize(weight, out=out) is out and torch.equal(out, truth)


def test_bad_input():
    weight = quantized(100, double_quant=False)
    packed, scales = weight.packed, weight.absmax
    cases = [
        (lambda: nf4.quantize_4bit(draw(8).double(), 64, "nf4"), "flat is float64"),
        (lambda: nf4.quantize_4bit(draw(8, 8)[:, 0], 64, "nf4"), "flat has the strides (8,)"),
        (lambda: nf4.quantize_4bit(draw(8), 48, "nf4"), "block_size is 48"),
        (lambda: nf4.quantize_4bit(draw(8), 64, "int8"), "kind is 'int8'"),
        (lambda: nf4.dequantize(replace(weight, packed=packed[:-1])), "packed has the shape (49,)"),
        (lambda: nf4.dequantize(replace(weight, absmax=scales[:1])), "absmax has the shape (1,)"),
        (lambda: nf4.dequantize(replace(weight, absmax=scales.half())), "absmax is float16"),
        (lambda: nf4.dequantize(weight, torch.float64), "out is float64"),
    ]
    for call, text in cases:
        with pytest.raises(ConfigError) as caught:
            call()
        assert text in str(caught.value) and "\n" not in str(caught.value)


MUTANTS = [
    ("tl.join(pair >> 4, pair & 15)", "tl.join(pair & 15, pair >> 4)"),
    ("(start + group) // BLOCK_SIZE", "(start + group) // BLOCK_SIZE + 1"),
    (" + tl.load(offset)", ""),
    ("block // 256", "block // 255"),
    ("mask=lane < n - start)", "mask=lane <= n - start)"),
    ("scaled > tl.load(middle + i)", "scaled >= tl.load(middle + i)"),
    ("(high << 4) | low", "(low << 4) | high"),
    ("tl.max(tl.abs(value), axis=1)", "tl.max(value, axis=1)"),
    ("tl.div_rn(1.0, tl.max", "tl.div_rn(1.0001, tl.max"),
    ('tl.where(bad > 0, float("nan"), largest)', "largest"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, monkeypatch, old, new):
    wrong = mutant(nf4, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_dequantize(wrong, quantized(64 * 300), torch.float32)
        monkeypatch.setattr(f"{__name__}.nf4", wrong)
        test_quantize_what_is_rare("nf4")
