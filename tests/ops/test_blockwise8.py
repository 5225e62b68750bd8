"""Blockwise 8-bit numbers against bitsandbytes, and the neighbourhood search against a binary search."""

import bitsandbytes.functional as bnb
import pytest
import torch

from minitune.codebooks import dynamic_map, midpoints
from minitune.errors import ConfigError
from minitune.ops import blockwise8
from minitune.ops.blockwise8 import dequantize_blockwise, nearest, quantize_blockwise
from minitune.ops.nf4 import codebook

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIGNED = pytest.mark.parametrize("signed", [True, False])


def draw(n, signed=True, dtype=torch.float32, seed=0):
    """Numbers over seven decades, with zeros and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-4 * torch.rand(n, generator=generator))
    x[::97] = 0
    x[256:512] = 0
    return (x if signed else x.abs()).to(dtype)


def search(x, values, block_size):
    """The rule written out: a binary search among the boundaries, which takes the lower entry at a boundary."""
    blocks = torch.nn.functional.pad(x.float(), (0, -len(x) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks * (1 / absmax.clamp(min=1e-38))[:, None], midpoints(values)).view(-1)[: len(x)]
    return codes.to(torch.uint8), absmax


@SIGNED
def test_map_is_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))
    assert not torch.equal(dynamic_map(signed), dynamic_map(not signed))


def test_map_by_hand():
    """Signed: 2^e steps of the fraction in the decade 10^(e-6); the two largest are 1 - 0.9/128 and 1."""
    values = dynamic_map(True)
    assert values[127] == 0 and values[255] == 1
    torch.testing.assert_close(values[[128, 254, 0]], torch.tensor([0.55e-6, 1 - 0.9 / 128, -1 + 0.9 / 128]))
    for exponent in range(7):
        upper = 10.0 ** (exponent - 6)
        inside = (values > 0.1 * upper) & (values < upper)
        assert inside.sum() == 2**exponent


@SIGNED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,block_size", [(64 * 256, 256), (3 * 4096, 4096), (4096, 64), (blockwise8.CHUNK * 2, 256)])
def test_quantise_as_bitsandbytes_in_pytorch(signed, dtype, n, block_size):
    """Their pure-PyTorch code, which other devices use; its last block, if short, is divided, so here it is whole."""
    x, values = draw(n, signed, dtype), dynamic_map(signed)
    pytorch = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk
    codes, absmax = pytorch(torch._C.DispatchKey.CompositeExplicitAutograd, x, values, block_size)
    ours = quantize_blockwise(x, values, block_size)
    assert torch.equal(ours[0], codes) and torch.equal(ours[1], absmax)


@SIGNED
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_bitsandbytes_on_the_cpu_differs(signed, dtype):
    """Its CPU library looks x / absmax up in 65,536 even steps over [-1, 1]; so 0 gets an entry that is not 0."""
    x, values = draw(1 << 16, signed, dtype), dynamic_map(signed)
    codes, state = bnb.quantize_blockwise(x, code=values, blocksize=256)
    absmax = state.absmax.clamp(min=1e-38)[:, None]
    step = ((x.float().view(-1, 256) * (1 / absmax) + 1) * 32767.5 + 0.5).floor()
    table = torch.bucketize(torch.arange(65536) / 32767.5 - 1, midpoints(values)).to(torch.uint8)
    filled = state.absmax.repeat_interleave(256) > 0
    assert torch.equal(codes[filled], table[step.long().view(-1)][filled])
    ours, our_absmax = quantize_blockwise(x, values, 256)
    assert torch.equal(our_absmax, state.absmax)
    assert (ours != codes)[filled].float().mean() > 0.001
    zero = (x == 0) & filled
    assert (values[ours[zero].long()] == 0).all() and (values[codes[zero].long()] > 1e-5).all()


@SIGNED
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, blockwise8.CHUNK + 77])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_dequantise_as_bitsandbytes(signed, n, block_size):
    values = dynamic_map(signed)
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    absmax = draw(-(-n // block_size)).abs() + 0.1
    theirs = bnb.dequantize_blockwise(codes, absmax=absmax, code=values, blocksize=block_size)
    assert torch.equal(dequantize_blockwise(codes, absmax, values, block_size), theirs)


@pytest.mark.parametrize("n", [1, 255, 257, 1000, 3 * blockwise8.CHUNK + 77])
@pytest.mark.parametrize("block_size", [96, 256])
def test_ragged(n, block_size):
    x, values = draw(n), dynamic_map(True)
    codes, absmax = quantize_blockwise(x, values, block_size)
    expected, expected_absmax = search(x, values, block_size)
    assert torch.equal(codes, expected) and torch.equal(absmax, expected_absmax)
    back = dequantize_blockwise(codes, absmax, values, block_size)
    scale = absmax.repeat_interleave(block_size)[:n]
    assert ((back - x).abs() <= scale * 0.0071).all()  # half of the widest step, 0.9 / 64
    assert (back[x == 0] == 0).all()


def test_shape_is_kept_and_rows_are_read_in_order():
    x = draw(40 * 30).view(40, 30)
    codes, absmax = quantize_blockwise(x.T, dynamic_map(True), 64)
    flat_codes, flat_absmax = quantize_blockwise(x.T.contiguous().view(-1), dynamic_map(True), 64)
    assert codes.shape == (30, 40) and torch.equal(codes.view(-1), flat_codes) and torch.equal(absmax, flat_absmax)


MAPS = {
    "signed": dynamic_map(True),
    "unsigned": dynamic_map(False),
    "nf4": codebook("nf4"),
    "fp4": codebook("fp4").sort(stable=True).values,
}


def critical(values):
    """Every boundary, every first and last float of a neighbourhood, and the floats around each."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).view(-1)
    x = torch.cat([ends[ends.isfinite()], values, midpoints(values)])
    around = [x, x.nextafter(torch.tensor(2.0)), x.nextafter(torch.tensor(-2.0))]
    return torch.cat([*around, torch.tensor([0.0, -0.0]), draw(1 << 16)])


@pytest.mark.parametrize("name", MAPS)
def test_nearest_is_a_binary_search(name):
    x = critical(MAPS[name])
    assert torch.equal(nearest(x, MAPS[name]).long(), torch.bucketize(x, midpoints(MAPS[name])))


@pytest.mark.parametrize("name", MAPS)
def test_ties_that_go_up_are_caught(name):
    x = critical(MAPS[name])
    assert not torch.equal(nearest(x, MAPS[name]).long(), torch.bucketize(x, midpoints(MAPS[name]), right=True))


def test_a_map_too_fine_for_the_search_is_refused():
    with pytest.raises(ConfigError, match="closer than 1 part in 128"):
        nearest(torch.zeros(1), torch.linspace(0.9, 1, 256))
