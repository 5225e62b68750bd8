"""The 8-bit AdamW kernel against the definition in fp64, beside the reference's own error."""

import math

import pytest
import torch

from minitune.codebooks import dynamic_map
from minitune.errors import ConfigError
from minitune.kernels import adamw8bit
from minitune.ops import adamw8bit as reference
from minitune.ops.adamw8bit import zero_moment
from minitune.ops.blockwise8 import dequantize_blockwise
from tests.kernels.proof import DEVICE, DTYPES, SIZES, assert_as_exact, draw, framed, mutant, reference_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN and infinity
KERNELS = ("adamw8bit_update",)
RATE, BETAS, EPS, DECAY, SCALE = 1e-2, (0.9, 0.99), 1e-8, 0.1, 0.5
ROOM = 2048  # bytes before and after the codes


def guarded(codes):
    """Return a copy of codes between bytes of 171, and the whole."""
    room = torch.full((codes.numel() + 2 * ROOM,), 171, dtype=torch.uint8, device=DEVICE)
    room[ROOM:-ROOM] = codes
    return room[ROOM:-ROOM], room


def state(n, steps=2, dtype=torch.float32):
    """Return a parameter and its moments after some steps of the reference, whose blocks differ in size."""
    parameter = draw(n, dtype=dtype)
    moments = zero_moment(parameter), zero_moment(parameter)
    with reference_backend():
        for step in range(1, steps + 1):
            reference.adamw8bit_step(parameter, gradient(n, step, dtype), *moments, step, RATE, BETAS, EPS, DECAY)
    return parameter, *moments


def gradient(n, step, dtype):
    """Return numbers whose blocks differ in size; every seventh is so small that its v is 0 in 8 bits."""
    place = torch.arange(n, device=DEVICE)
    return (draw(n, seed=step) * 4.0 ** (place // 256 % 5) * torch.where(place % 7 == 3, 1e-5, 1.0)).to(dtype)


def exact(parameter, g, first, second, step):
    """Return weight, m and v of one step in fp64."""
    g = g.double() * SCALE
    m, v = (
        dequantize_blockwise(codes, absmax, dynamic_map(signed, DEVICE), 256).double()
        for (codes, absmax), signed in ((first, True), (second, False))
    )
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    root = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    return parameter.double() * (1 - RATE * DECAY) - RATE / (1 - BETAS[0] ** step) * m / root, m, v


def assert_encoded(codes, absmax, value, signed):
    """Each code is that of the nearest entry, up to the fp32 roundings of the value and of its block's scale."""
    blocks = torch.nn.functional.pad(value, (0, -len(value) % 256)).view(-1, 256)
    torch.testing.assert_close(absmax.double(), blocks.abs().amax(1), rtol=1e-6, atol=1e-37)
    scaled = (blocks / absmax.double().clamp(min=1e-38)[:, None]).view(-1)[: len(value)]
    distance = (scaled[:, None] - dynamic_map(signed, DEVICE).double()).abs()
    if not signed:
        assert codes.min() >= 1
        distance[:, 0] = torch.inf  # v is never encoded as 0
    ours = distance.gather(1, codes.long()[:, None]).squeeze(1)
    assert (ours <= distance.amin(1) + 1e-6 * scaled.abs() + 1e-12).all()


def check(module, n, dtype, start=2):
    parameter, first, second = state(n, start, dtype)
    g = gradient(n, 9, dtype)
    truths = exact(parameter, g, first, second, start + 1)
    arguments = (start + 1, RATE, BETAS, EPS, DECAY, SCALE)
    theirs, ours = parameter.clone(), framed(parameter)
    rooms = [guarded(codes) for codes, _ in (first, second)]
    moments = [(inner, framed(absmax)) for (inner, _), (_, absmax) in zip(rooms, (first, second), strict=True)]
    module.adamw8bit_step(ours, framed(g), *moments, *arguments)
    with reference_backend():
        reference.adamw8bit_step(theirs, g, first, second, *arguments)
    assert_as_exact([ours], [theirs], truths[:1])
    for (codes, absmax), value, signed in zip(moments, truths[1:], (True, False), strict=True):
        assert_encoded(codes, absmax, value, signed)
    for tensor in (ours, moments[0][1], moments[1][1]):
        assert tensor._base.isnan().sum() == tensor._base.numel() - tensor.numel()  # the frame is still NaN
    assert all((room[:ROOM] == 171).all() and (room[-ROOM:] == 171).all() for _, room in rooms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, 256, 1024, 3000])
@pytest.mark.parametrize("start", [0, 2])
def test_one_step(dtype, n, start):
    check(adamw8bit, n, dtype, start)


def test_a_matrix_and_a_gradient_of_another_dtype():
    parameter, first, second = state(400)
    shaped = [(codes.view(20, 20).clone(), absmax.clone()) for codes, absmax in (first, second)]
    g = gradient(400, 9, torch.float16)
    flat = parameter.clone()
    adamw8bit.adamw8bit_step(flat, g, first, second, 3, RATE, BETAS, EPS, DECAY)
    whole = parameter.view(20, 20).clone()
    adamw8bit.adamw8bit_step(whole, g.view(20, 20), *shaped, 3, RATE, BETAS, EPS, DECAY)
    assert torch.equal(whole.view(-1), flat) and torch.equal(shaped[0][0].view(-1), first[0])


def test_a_bad_gradient_shows():
    for bad in (math.nan, math.inf):
        parameter, first, second = state(600)
        g = gradient(600, 9, torch.float32)
        g[300] = bad
        adamw8bit.adamw8bit_step(parameter, g, first, second, 3, RATE, BETAS, EPS, DECAY)
        assert parameter.isnan().nonzero().flatten().tolist() == [300]
        assert (~first[1].isfinite()).tolist() == (~second[1].isfinite()).tolist() == [False, True, False]


def check_stochastic(module):
    """In bf16 each weight lands on a neighbour of the result, which is the mean of many seeds.

    No bf16 arithmetic is needed for it, so the interpreter is right here too.
    """
    start, g = draw(512, dtype=torch.bfloat16), draw(512, seed=1)
    exact = start.float()
    module.adamw8bit_step(exact, g, zero_moment(exact), zero_moment(exact), 1, 1e-4, BETAS, EPS, 0.0)
    runs = []
    for seed in range(60):
        runs.append(start.clone())
        module.adamw8bit_step(runs[-1], g, zero_moment(start), zero_moment(start), 1, 1e-4, BETAS, EPS, 0.0, seed=seed)
    runs = torch.stack(runs).double()
    gap = exact.abs().log2().floor().sub(7).exp2().double()  # between bf16 numbers
    assert ((runs - exact).abs() <= gap).all() and (runs.amax(0) > runs.amin(0)).double().mean() > 0.4
    bias = ((runs.mean(0) - exact) / gap).mean()  # the sum of 512 x 60 coins, each with a deviation of at most 1/2
    assert bias.abs() < 5 * 0.5 / math.sqrt(512 * 60)
    assert ((runs.mean(0) - exact).abs() <= 5 * gap / 2 / math.sqrt(60)).all()
    again = start.clone()
    module.adamw8bit_step(again, g, zero_moment(start), zero_moment(start), 1, 1e-4, BETAS, EPS, 0.0, seed=7)
    assert torch.equal(again.double(), runs[7])


def test_stochastic_rounding():
    check_stochastic(adamw8bit)


def test_bad_input():
    parameter, first, second = state(600)
    g = gradient(600, 9, torch.float32)
    short = (first[0], first[1][:-1])
    cases = [
        ((parameter.double(), g, first, second), {}, "parameter is float64"),
        ((parameter.view(20, 30).T, g, first, second), {}, "parameter has the strides (1, 30)"),
        ((parameter, g[:-1], first, second), {}, "gradient has the shape (599,)"),
        ((parameter, g, short, second), {}, "first's absmax has the shape (2,)"),
        ((parameter, g, first, (second[1], second[1])), {}, "second's codes is float32"),
        ((parameter, g.to("meta"), first, second), {}, "gradient is on meta"),
        ((parameter, g, first, second), {"seed": 1}, "only bfloat16 is rounded stochastically"),
    ]
    for tensors, more, text in cases:
        with pytest.raises(ConfigError) as caught:
            adamw8bit.adamw8bit_step(*tensors, 1, RATE, BETAS, EPS, DECAY, **more)
        assert text in str(caught.value) and "\n" not in str(caught.value)


MUTANTS = [
    ("g * g * rest2", "g * rest2"),
    (".to(tl.float32) * scale", ".to(tl.float32)"),
    ("tl.div_rn(tl.sqrt_rn(v), root) + eps", "tl.sqrt_rn(v) + eps"),
    ("tl.load(absmax + block, mask=held", "tl.load(absmax + block + 1, mask=held"),
    ("scaled > tl.load", "scaled < tl.load"),
    ("tl.static_range(8)", "tl.static_range(7)"),
    ("_encode(v, second, second_absmax, plain_middle", "_encode(v, second, second_absmax, signed_middle"),
    ("inside, held = place < n", "inside, held = place < n + 1"),
    ("tl.maximum(code, LOWEST)", "code"),
    ("inside, held = place < n, block * BLOCK_SIZE < n", "inside, held = place < n, block * BLOCK_SIZE < n + 256"),
    ("* decay", "* decay * decay"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(adamw8bit, tmp_path, old, new)
    with pytest.raises(AssertionError):
        for start in (2, 0):
            check(wrong, 700, torch.float32, start)


@pytest.mark.parametrize("old,new", [("& 0xFFFF", "& 0x7FFF"), ("+ noise)", "+ 0x8000)"), ("+ noise)", ")")])
def test_a_mutant_of_the_rounding_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_stochastic(mutant(adamw8bit, tmp_path, old, new))
