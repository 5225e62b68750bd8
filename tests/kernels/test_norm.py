"""RMSNorm's kernels against the reference in fp64."""

import functools

import pytest
import torch

from minitune.errors import ConfigError
from minitune.kernels import norm
from minitune.ops.norm import rms_norm as reference
from tests.kernels.proof import DEVICE, DTYPES, SIZES, check, draw, framed, gradients, mutant

KERNELS = ("rms_norm_forward", "rms_norm_backward")
EPS = 1e-5


def run(kernel, rows: int, width: int, dtype, *, offset=0.0, pitch=0, wanted=(True, True), weight_dtype=None):
    x = framed(draw(rows, width, dtype=dtype), pitch)
    weight = framed(1 - offset + draw(width, dtype=weight_dtype or dtype, seed=1, scale=0.3))
    ours, theirs = (functools.partial(function, eps=EPS, offset=offset) for function in (kernel, reference))
    check(ours, theirs, (x, weight), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_widths(dtype, width, offset):
    run(norm.rms_norm, 65, width, dtype, offset=offset, pitch=3)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_rows(rows, wanted):
    run(norm.rms_norm, rows, 257, DTYPES[1], wanted=wanted)


@pytest.mark.parametrize("width", [4096, 8192, 8200, 16384])
def test_wide_rows(width):
    run(norm.rms_norm, 5, width, torch.float32)


def test_a_weight_of_another_dtype():
    run(norm.rms_norm, 17, 63, torch.float16, weight_dtype=torch.float32)


def test_other_layouts():
    x, weight = draw(3, 65, 17).transpose(1, 2), draw(65, seed=1)
    check(functools.partial(norm.rms_norm, eps=EPS), functools.partial(reference, eps=EPS), (x, weight))
    one = torch.ones((), device=DEVICE)
    summed = gradients(lambda x, w: norm.rms_norm(x, w, EPS).sum(), (x, weight), (True, True), one)
    weighted = gradients(lambda x, w: norm.rms_norm(x, w, EPS), (x, weight), (True, True), torch.ones_like(x))
    assert all(torch.equal(a, b) for a, b in zip(summed[1:], weighted[1:], strict=True))  # an expanded dy


def test_no_rows():
    value, dx, dw = gradients(
        lambda x, w: norm.rms_norm(x, w, EPS), (draw(0, 8), draw(8)), (True, True), torch.empty(0, 8, device=DEVICE)
    )
    assert value.shape == dx.shape == (0, 8) and torch.equal(dw, torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize(
    "x,weight,text",
    [
        (draw(2, 8).double(), draw(8), "x is float64, but the kernel takes float32, float16, bfloat16"),
        (draw(2, 8), draw(7), "weight has the shape (7,), but the kernel needs (8)"),
        (draw(2, 8), draw(16)[::2], "weight has the strides (2,)"),
        (draw(2, 8), draw(8).to("meta"), "weight is on meta, but the others are on"),
        (draw(2, 8).to("meta"), draw(8), "x is on meta"),
        (draw(1, 16385), draw(16385), "at most 16384"),
    ],
)
def test_bad_input(monkeypatch, x, weight, text):
    monkeypatch.setattr("minitune.kernels.checks.INTERPRETED", x.device.type != "meta")
    with pytest.raises(ConfigError) as caught:
        norm.rms_norm(x, weight, EPS)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def mutant_case(module):
    run(module.rms_norm, 1100, 17, torch.float32, offset=1.0, pitch=3)


def test_the_case_of_the_mutants_passes():
    mutant_case(norm)


MUTANTS = [
    ("(row < rows)[:, None] & (column < width)[None, :]", "(row < rows)[:, None] & (column <= width)[None, :]"),
    ("/ width + eps", "/ BLOCK + eps"),
    ("w += OFFSET", "w += 0.0"),
    ("(w.to(tl.float32) + OFFSET)", "(w.to(tl.float32))"),
    ("mean = tl.sum(g * normed, axis=1) / width", "mean = tl.sum(g * normed, axis=1) / BLOCK"),
    ("total += upstream * normed", "total = upstream * normed"),
    ("next_dy = _load(dy, row + step", "next_dy = _load(dy, row"),
    ("next_r = tl.load(scale + row + step", "next_r = tl.load(scale + row"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(norm, tmp_path, old, new)
    with pytest.raises(Exception) as caught:
        mutant_case(wrong)
    assert caught.type is AssertionError, caught.value
