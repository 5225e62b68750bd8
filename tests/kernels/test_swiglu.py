"""SwiGLU's and GeGLU's kernels against the references in fp64."""

import pytest
import torch

from minitune.errors import ConfigError
from minitune.kernels import swiglu
from minitune.ops import swiglu as reference
from tests.kernels.proof import DTYPES, SIZES, check, draw, framed, gradients, mutant

KERNELS = ("glu_forward", "glu_backward")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's, for exp of far numbers
NAMES = ("swiglu", "geglu")


def run(module, name: str, rows: int, width: int, dtype, *, pitch=0, wanted=(True, True), scale=2.0):
    gate = framed(draw(rows, width, dtype=dtype, scale=scale), pitch)
    up = framed(draw(rows, width, dtype=dtype, seed=1), 2 * pitch)
    check(getattr(module, name), getattr(reference, name), (gate, up), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("pitch", [0, 3])
def test_widths(name, dtype, width, pitch):
    run(swiglu, name, 15, width, dtype, pitch=pitch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows,width", [(65, 17), (3, 2048), (3, 2049), (2, 4100)])
@pytest.mark.parametrize("pitch", [0, 3])
def test_more_than_one_block(name, rows, width, pitch):
    run(swiglu, name, rows, width, DTYPES[1], pitch=pitch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_one_gradient(name, wanted):
    run(swiglu, name, 17, 63, torch.float32, wanted=wanted)


@pytest.mark.parametrize("name", NAMES)
def test_far_from_zero(name):
    run(swiglu, name, 17, 63, torch.float32, scale=60.0)


@pytest.mark.parametrize("name", NAMES)
def test_other_layouts(name):
    joint = draw(3, 17, 130)
    check(getattr(swiglu, name), getattr(reference, name), joint.split(65, dim=-1))
    check(getattr(swiglu, name), getattr(reference, name), (draw(3, 65, 17).transpose(1, 2), draw(3, 17, 65, seed=1)))
    gate, up = draw(17, 65), draw(17, 65, seed=1)
    summed = gradients(
        lambda g, u: getattr(swiglu, name)(g, u).sum(), (gate, up), (True, True), torch.ones_like(gate[0, 0])
    )
    weighted = gradients(getattr(swiglu, name), (gate, up), (True, True), torch.ones_like(gate))
    assert all(torch.equal(a, b) for a, b in zip(summed[1:], weighted[1:], strict=True))  # an expanded dy
    assert getattr(swiglu, name)(draw(0, 8), draw(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    "gate,up,text",
    [
        (draw(2, 8).double(), draw(2, 8), "gate is float64"),
        (draw(2, 8), draw(2, 8).half(), "up is float16, but the kernel takes float32"),
        (draw(2, 8), draw(2, 7), "up has the shape (2, 7), but the kernel needs (2, 8)"),
        (draw(2, 8), draw(2, 8).to("meta"), "up is on meta"),
    ],
)
def test_bad_input(gate, up, text):
    for name in NAMES:
        with pytest.raises(ConfigError) as caught:
            getattr(swiglu, name)(gate, up)
        assert text in str(caught.value) and "\n" not in str(caught.value)


def mutant_case(module, name):
    run(module, name, 17, 2049, torch.float32, pitch=3)


def test_the_case_of_the_mutants_passes():
    mutant_case(swiglu, "swiglu")
    mutant_case(swiglu, "geglu")


MUTANTS = [
    ("swiglu", "tl.arange(0, BLOCK) < width - start", "tl.arange(0, BLOCK) <= width - start"),
    ("swiglu", "(program % blocks).to(tl.int64)", "(program // blocks).to(tl.int64)"),
    ("swiglu", "dz = g * u * s * (1.0 + (1.0 - s) * slope)", "dz = g * u * s * (1.0 + s * slope)"),
    ("swiglu", "(g * z * s).to", "(g * s).to"),
    ("swiglu", "tl.load(up + row * up_stride", "tl.load(up + row * gate_stride"),
    ("geglu", "(1.0 + 3.0 * cubic)", "(1.0 + cubic)"),
    ("geglu", "tl.constexpr(0.044715)", "tl.constexpr(0.0447)"),
]


@pytest.mark.parametrize("name,old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name, old, new):
    wrong = mutant(swiglu, tmp_path, old, new)
    with pytest.raises(Exception) as caught:
        mutant_case(wrong, name)
    assert caught.type is AssertionError, caught.value
