"""4-bit weights against bitsandbytes, bit for bit, and against the rule worked out in fp64."""

import math
import threading
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch

from minitune import codebooks
from minitune.codebooks import dynamic_map, even_steps, midpoints
from minitune.errors import CheckpointError, ConfigError
from minitune.ops.blockwise8 import CHUNK
from minitune.ops.nf4 import DECODED, QuantizedTensor, codebook, quantize
from minitune.ops.quantization import BLOCK_SIZES, KINDS

# QLoRA, appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1,), (2, 3), (3, 5), (33, 1), (5, 7, 9), (37, 94), (64, 64), (130, 1000))
FOUR_BITS = pytest.mark.parametrize("kind", ["nf4", "fp4"])


@pytest.fixture(autouse=True, scope="module")
def not_compiled():
    """bitsandbytes compiles what its library does not do, rows of an odd length, once for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)


def whole_blocks(weight, block_size):
    """The flat weight with zeros behind, so that no block is short."""
    return torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block_size))


def decode(packed, state, shape):
    """The values by bitsandbytes' library, and by its pure-PyTorch code, which must agree.

    The library gets the weight as one row of whole blocks: version 0.50.2 takes wrong scales on processors with
    AVX-512 where a block goes over the end of a row (rows of 576 in blocks of 128).
    """
    n, size = math.prod(shape), state.blocksize
    row = torch.nn.functional.pad(packed.view(-1), (0, -(-n // size) * size // 2 - packed.numel()))
    state.shape = (1, 2 * len(row))
    fast = bnb.dequantize_4bit(row[:, None], state).view(-1)[:n].view(shape)
    if not state.nested:
        pytorch = torch.ops.bitsandbytes.dequantize_4bit.default._op_dk
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        slow = pytorch(key, packed.view(-1, 1), state.absmax, size, state.quant_type, shape, state.dtype)
        assert torch.equal(fast, slow)
    return fast


def test_codebook_is_the_published_one():
    assert codebook("nf4").tolist() == PUBLISHED
    assert torch.equal(codebook("nf4"), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(codebook("fp4"), bnb.get_4bit_type("fp4", device="cpu"))


def test_codebook_is_quantiles_of_a_normal():
    """By Python's own quantile function, evenly spaced: 8 probabilities above 1/2 and 7 below."""
    quantile, outermost = NormalDist().inv_cdf, 0.9677083
    above = [quantile(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    expected = torch.tensor([*below, 0.0, *above], dtype=torch.float64) / above[-1]
    torch.testing.assert_close(codebook("nf4").double(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("outermost", [0.9677, 0.9677083333333334, 1 - 1 / 32])
def test_another_outermost_probability_is_caught(outermost, monkeypatch):
    monkeypatch.setattr(codebooks, "even_steps", lambda first, last, count: even_steps(outermost, last, count))
    assert codebooks._nf4().tolist() != PUBLISHED


@FOUR_BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bit_equal_to_bitsandbytes(kind, dtype, block_size):
    """Codes, scales and values. The codes are those of whole blocks: see the next test for a short one."""
    for seed, shape in enumerate(SHAPES):
        weight = draw(*shape, dtype=dtype, seed=seed)
        ours = quantize(weight, kind, block_size=block_size, double_quant=False)
        packed, state = bnb.quantize_4bit(whole_blocks(weight, block_size), blocksize=block_size, quant_type=kind)
        assert torch.equal(ours.packed, packed.view(-1)[: len(ours.packed)])
        assert torch.equal(ours.absmax, state.absmax)
        for out in DTYPES:
            state.dtype = out
            assert torch.equal(ours.dequantize(out), decode(ours.packed, state, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_short_blocks_are_bit_equal_too(dtype, block_size):
    for seed, shape in enumerate(SHAPES):
        weight = draw(*shape, dtype=dtype, seed=seed)
        ours = quantize(weight, block_size=block_size, double_quant=False)
        packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax)


def test_where_bitsandbytes_divides():
    """On the CPU it divides a short last block by absmax, where whole ones are multiplied by 1 / absmax.

    x / absmax is a boundary here, to which a product with the reciprocal is one ulp off. With NF4 this takes a
    weight made for it. It also keeps 1e-38 as absmax of a short block of zeros.
    """
    weight = torch.tensor([0.9018602967262268, 1.046875])
    ours, (packed, _) = quantize(weight, double_quant=False), bnb.quantize_4bit(weight, quant_type="nf4")
    assert ours.packed.item() == 0xEF and packed.item() == 0xFF
    assert bnb.quantize_4bit(whole_blocks(weight, 64), quant_type="nf4")[0][0].item() == 0xEF
    assert bnb.quantize_4bit(torch.zeros(2), quant_type="nf4")[1].absmax.item() == pytest.approx(1e-38)
    assert quantize(torch.zeros(2), double_quant=False).absmax.item() == 0


@FOUR_BITS
def test_midpoints_round_down(kind):
    values = codebook(kind).sort(stable=True).values
    middle = midpoints(values)
    middle = middle[values[1:] > values[:-1]]
    places = values[values.diff(append=torch.tensor([9.0])) > 0]
    upper = middle.nextafter(torch.tensor(2.0))
    for x, expected in ((middle, places[:-1]), (upper, places[1:])):
        weight = torch.cat([x, torch.ones(1)])  # absmax 1, whose reciprocal is exact
        assert torch.equal(quantize(weight, kind, double_quant=False).dequantize()[:-1], expected)


@FOUR_BITS
def test_nearest_code_in_fp64(kind):
    weight = draw(64, 64)
    blocks, values = weight.double(), codebook(kind).double()
    absmax = blocks.abs().amax(1, keepdim=True)
    distance = (blocks[:, :, None] / absmax[:, :, None] - values).abs()
    expected = values[distance.argmin(-1)] * absmax
    back = quantize(weight, kind, double_quant=False).dequantize(torch.float64)
    torch.testing.assert_close(back, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_once(dtype):
    """The product of two fp32 numbers is exact in fp64. Rounding the code or the scale first is caught."""
    ours = quantize(draw(64, 640), double_quant=False)
    codes = torch.stack([ours.packed >> 4, ours.packed & 15], 1).view(-1, 64).long()
    code, scale = codebook("nf4")[codes], ours.absmax[:, None]
    value = ours.dequantize(dtype).view(-1, 64)
    assert torch.equal(value, (code.double() * scale.double()).float().to(dtype))
    assert not torch.equal(value, code.to(dtype) * scale.to(dtype))
    assert not torch.equal(value, (code.to(dtype) * scale).to(dtype))
    assert not torch.equal(value, (code * scale.to(dtype)).to(dtype))


def test_high_nibble_first():
    weight = torch.tensor([[-1.0, 1.0, 0.0]])
    ours = quantize(weight, double_quant=False)
    assert ours.packed.tolist() == [0x0F, 0x77]  # the last low nibble is the code of zero
    assert torch.equal(ours.dequantize(), weight)


@FOUR_BITS
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(576, 576), (37, 93), (1,), (5184 * 8, 8)])
def test_double_quantised_decode_is_bit_equal(kind, block_size, shape):
    """bitsandbytes reads our parts and gets our values. (5184 * 8) * 8 / 64 scales: 256 does not divide them."""
    weight = draw(*shape, dtype=torch.bfloat16)
    ours = quantize(weight, kind, block_size=block_size)
    nested = bnb.QuantState(ours.nested_absmax, code=dynamic_map(True), blocksize=256, dtype=torch.float32)
    for dtype in DTYPES:
        state = bnb.QuantState(
            ours.absmax_codes, blocksize=block_size, quant_type=kind, dtype=dtype, offset=ours.offset, state2=nested
        )
        assert torch.equal(ours.dequantize(dtype), decode(ours.packed, state, shape))


def test_double_quantisation():
    weight = draw(512, 4096)
    plain, double = quantize(weight, double_quant=False), quantize(weight)
    assert torch.equal(plain.packed, double.packed)
    assert torch.equal(double.offset, plain.absmax.mean())
    rest = (plain.absmax - double.offset).view(-1, 256)
    assert torch.equal(double.nested_absmax, rest.abs().amax(1))
    error = (double.scales() - plain.absmax).view(-1, 256).abs()
    assert (error <= rest.abs().amax(1, keepdim=True) * 0.0071).all()  # half of the widest step, 0.9 / 64
    assert double.nbytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)  # 4.127
    assert plain.nbytes * 8 / weight.numel() == 4.5


@pytest.mark.parametrize("n", [DECODED - 1, DECODED + 1, 2 * DECODED + 4097])
def test_weights_of_several_chunks(n):
    weight = draw(n)
    ours = quantize(weight, block_size=4096, double_quant=False)
    packed, state = bnb.quantize_4bit(weight, blocksize=4096, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.dequantize(), decode(packed, state, weight.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(kind):
    weight = draw(8, 64)
    weight[2] = 0
    for tensor in (weight, torch.zeros(3, 7)):
        back = quantize(tensor, kind, double_quant=kind == "int8").dequantize()
        assert (back[tensor == 0] == 0).all() and back.isfinite().all()
    if kind != "int8":
        assert (quantize(torch.zeros(3, 7), kind).dequantize() == 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_blocks_of_any_size(scale):
    weight = draw(4, 64) * 50
    back = quantize(weight, double_quant=False).dequantize()
    torch.testing.assert_close(
        quantize(weight * scale, double_quant=False).dequantize() / scale, back, rtol=1e-5, atol=0
    )


def test_int8_rows():
    weight = draw(40, 300)
    ours = quantize(weight, "int8")
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
    assert torch.equal(ours.absmax, absmax)
    different = (ours.packed != codes).float().mean()
    assert (ours.packed.int() - codes).abs().max() <= 1 and different < 1e-3  # they multiply by 127 / absmax at once
    assert torch.equal(ours.dequantize(), ours.packed * (absmax / 127)[:, None])
    assert ((ours.dequantize() - weight).abs() <= absmax[:, None] / 253.9).all()
    assert ours.nbytes == 40 * 300 + 40 * 4
    long = draw(3, CHUNK + 5)
    assert ((quantize(long, "int8").dequantize() - long).abs() <= long.abs().amax(1, keepdim=True) / 253.9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_out(kind):
    weight = draw(37, 94, dtype=torch.bfloat16)
    ours = quantize(weight, kind)
    room = torch.full((37 * 94 + 20,), 7.0, dtype=torch.float16)
    out = room[10:-10].view(37, 94)
    assert ours.dequantize(out=out) is out
    assert torch.equal(out, ours.dequantize(torch.float16))
    assert (room[:10] == 7).all() and (room[-10:] == 7).all()
    assert ours.dequantize().dtype == torch.bfloat16
    for bad in (torch.empty(94, 37), torch.empty(94, 37).T, torch.empty(37, 94, device="meta")):
        with pytest.raises(ConfigError, match="it must be"):
            ours.dequantize(out=bad)
    with pytest.raises(ConfigError, match="without dtype"):
        ours.dequantize(torch.float16, out=out)


def test_a_transposed_weight_is_read_row_by_row():
    weight = draw(64, 96)
    assert torch.equal(quantize(weight.T).packed, quantize(weight.T.contiguous()).packed)
    assert not torch.equal(quantize(weight.T).packed, quantize(weight).packed)


def test_threads_do_not_share_room():
    weights = [quantize(draw(512, 512, seed=seed)) for seed in range(4)]
    expected = [weight.dequantize() for weight in weights]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(20) if not torch.equal(weights[i].dequantize(), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_apply_moves_every_tensor():
    ours = quantize(draw(8, 64))
    moved = ours.apply(lambda tensor: tensor.to("meta"))
    assert isinstance(moved, QuantizedTensor) and moved.shape == ours.shape and moved.dtype == ours.dtype
    assert {name: tensor.device.type for name, tensor in moved.tensors().items()} == dict.fromkeys(
        ("packed", "absmax_codes", "nested_absmax", "offset"), "meta"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 17), (36, 92)])
def test_non_finite_weights_are_refused_by_name(kind, bad, place):
    weight = draw(37, 93)
    weight[place] = bad
    with pytest.raises(CheckpointError, match="layers.7.up_proj.weight holds a NaN or infinity"):
        quantize(weight, kind, name="layers.7.up_proj.weight")


@pytest.mark.parametrize("size", [0, 1, 16, 33, 48, 96, 100, 8192, -64, 64.5])
def test_bad_block_sizes(size):
    with pytest.raises(ConfigError, match="power of two from 32 to 4096"):
        quantize(draw(8, 64), block_size=size)


@pytest.mark.parametrize("weight", [torch.arange(64), torch.ones(64, dtype=torch.bool), torch.empty(0, 64)])
def test_bad_weights(weight):
    with pytest.raises(ConfigError, match="up_proj is .* can be quantised"):
        quantize(weight, name="up_proj")
    with pytest.raises(ConfigError, match="float64"):
        quantize(torch.ones(64, dtype=torch.float64))


def test_bad_options():
    with pytest.raises(ConfigError, match="'nf3'; known are nf4, fp4, int8"):
        quantize(draw(8, 64), "nf3")
    for options in ({"block_size": 128}, {"double_quant": False}):
        with pytest.raises(ConfigError, match="leave out block_size and double_quant"):
            quantize(draw(8, 64), "int8", **options)
