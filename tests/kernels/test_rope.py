"""Rope's kernel against the reference in fp64, both ways and in place."""

import functools

import pytest
import torch

from minitune.errors import ConfigError
from minitune.kernels import rope
from minitune.ops.rope import apply_rope as reference
from minitune.ops.rope import rope_tables
from tests.kernels.proof import DEVICE, DTYPES, check, draw, framed, gradients, mutant

KERNELS = ("rope_turn",)


def tables(batch: int, length: int, width: int):
    positions = torch.arange(batch * length, device=DEVICE).view(batch, length) * 3  # other angles in each row
    return rope_tables(positions, width, 10000.0)


def run(kernel, batch: int, length: int, heads: int, width: int, dtype, *, joint=False, wanted=True):
    if joint:  # as q lies in the joint result of its projections with k and v
        x = framed(draw(batch, length, (heads + 3) * width, dtype=dtype))[..., width : (heads + 1) * width]
        x = x.unflatten(-1, (heads, width))
    else:
        x = framed(draw(batch, length, heads, width, dtype=dtype))
    cos, sin = tables(batch, length, width)
    turned = functools.partial(kernel, cos=framed(cos), sin=framed(sin))
    check(turned, functools.partial(reference, cos=cos, sin=sin), (x,), (wanted,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,width", [(1, 2), (3, 6), (9, 64), (8, 128), (5, 80), (17, 16)])
@pytest.mark.parametrize("joint", [False, True])
def test_heads(dtype, heads, width, joint):
    run(rope.apply_rope, 2, 7, heads, width, dtype, joint=joint)


@pytest.mark.parametrize("batch,length,wanted", [(3, 1, True), (3, 17, False), (2, 65, True), (1, 257, True)])
def test_lengths(batch, length, wanted):
    run(rope.apply_rope, batch, length, 2, 32, DTYPES[1], wanted=wanted)


def test_more_heads_than_one_program_takes():
    run(rope.apply_rope, 1, 3, 33, 256, torch.float32)


def test_the_memory_of_the_results():
    x, (cos, sin) = draw(2, 5, 3, 8), tables(2, 5, 8)
    out, dx = gradients(lambda x: rope.apply_rope(x, cos, sin), (x,), (True,))
    assert out.transpose(1, 2).is_contiguous() and dx.is_contiguous()
    heads_first = draw(2, 3, 5, 8, seed=99).transpose(1, 2)
    check(lambda x: rope.apply_rope(x, cos, sin), lambda x: reference(x, cos, sin), (heads_first,))


def test_one_table_for_all_rows():
    x, (cos, sin) = draw(2, 5, 3, 8), tables(1, 5, 8)
    check(lambda x: rope.apply_rope(x, cos, sin), lambda x: reference(x, cos, sin), (x,))


def test_in_place():
    x, (cos, sin) = draw(2, 17, 3, 64), tables(2, 17, 64)
    right, gradient = gradients(lambda x: rope.apply_rope(x, cos, sin), (x,), (True,))
    inner = framed(x.view(2, 17, -1), 64).unflatten(-1, (3, 64))
    assert rope.apply_rope(inner, cos, sin, inplace=True).data_ptr() == inner.data_ptr()
    assert torch.equal(inner, right)
    ours, again = gradients(lambda x: rope.apply_rope(x * 1, cos, sin, inplace=True), (x,), (True,))
    assert torch.equal(ours, right) and torch.equal(again, gradient)
    with pytest.raises(RuntimeError, match="leaf"):
        rope.apply_rope(x.clone().requires_grad_(), cos, sin, inplace=True)


def test_a_gradient_that_others_hold_is_left_alone():
    x, other, (cos, sin) = draw(1, 3, 2, 8).requires_grad_(), draw(1, 3, 2, 8).requires_grad_(), tables(1, 3, 8)
    (rope.apply_rope(x, cos, sin) + other).backward(upstream := draw(1, 3, 2, 8, seed=5))
    assert torch.equal(other.grad, upstream)


@pytest.mark.parametrize(
    "x,cos,text",
    [
        (draw(2, 5, 24), None, "x has the shape (2, 5, 24), but the kernel needs (any, any, any, any)"),
        (draw(2, 5, 3, 8).double(), None, "x is float64"),
        (draw(2, 5, 3, 8), draw(2, 5, 1, 4).half(), "cos is float16, but the kernel takes float32"),
        (draw(2, 5, 3, 8), draw(2, 4, 1, 4), "cos has the shape (2, 4, 1, 4), but the kernel needs (2, 5, 1, 4)"),
        (draw(2, 5, 3, 7), draw(2, 5, 1, 3), "even"),
        (draw(2, 5, 3, 8), draw(2, 5, 1, 4).to("meta"), "cos is on meta"),
    ],
)
def test_bad_input(x, cos, text):
    with pytest.raises(ConfigError) as caught:
        rope.apply_rope(x, cos, cos if cos is None or cos.shape[-1] == 3 else draw(2, 5, 1, 4))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_in_place_needs_adjacent_pairs():
    with pytest.raises(ConfigError, match="stride"):
        rope.apply_rope(draw(2, 5, 8, 3).transpose(2, 3), draw(2, 5, 1, 4), draw(2, 5, 1, 4), inplace=True)


def mutant_case(module):
    run(module.apply_rope, 2, 5, 3, 6, torch.float32, joint=True)


def test_the_case_of_the_mutants_passes():
    mutant_case(rope)


MUTANTS = [
    ("turned = pair < HALF", "turned = pair < BLOCK"),
    ("a * c - b * s", "a * c + b * s"),
    ("* HALF + pair", "* BLOCK + pair"),
    ("_turn(dy, *ctx.saved_tensors, dx, -1)", "_turn(dy, *ctx.saved_tensors, dx, 1)"),
    ("inside = (head < heads) & turned", "inside = (head <= heads) & turned"),
    ("source + HALF, mask", "source + BLOCK, mask"),
    ("% length).to(tl.int64)", "% heads).to(tl.int64)"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(rope, tmp_path, old, new)
    with pytest.raises(Exception) as caught:
        mutant_case(wrong)
    assert caught.type is AssertionError, caught.value
