"""AdamW on 8-bit moments, against bitsandbytes' and against the definition in fp64."""

import math

import pytest
import torch

from minitune.codebooks import dynamic_map
from minitune.errors import ConfigError
from minitune.ops import adamw8bit
from minitune.ops.adamw8bit import adamw8bit_step, zero_moment
from tests.kernels.proof import mutant

RATE, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1


def draw(n, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest(x, signed, block=256):
    """Return codes and absmax of x (n,) by the definition: each entry of the map is tried, in fp64."""
    n = len(x)
    blocks = torch.nn.functional.pad(x, (0, -n % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    values = dynamic_map(signed).double()
    codes = torch.cat([(row.double()[:, None] - values).abs().argmin(1) for row in scaled])
    return codes[:n].to(torch.uint8), absmax


def train(module, parameter, steps, decay=DECAY, **more):
    first, second = zero_moment(parameter), zero_moment(parameter)
    for step in range(1, steps + 1):
        gradient = draw(parameter.numel(), step, parameter.dtype).view(parameter.shape) * 0.1**step
        module.adamw8bit_step(parameter, gradient, first, second, step, RATE, BETAS, EPS, decay, **more)
    return parameter, *first, *second


def check_bitsandbytes(module, monkeypatch, dtype, decay):
    """Six steps are bit-equal, v of 0 included; its CPU library's coarse encoder is replaced by the definition."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.optim import AdamW8bit

    def encode(x, values, absmax, codes, block):
        for target, value in zip((codes, absmax), nearest(x, bool(values[0] < 0), block), strict=True):
            target.copy_(value)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", encode)
    monkeypatch.setattr(module, "LOWEST", 0)
    ours = train(module, draw(4096, dtype=dtype), 6, decay)
    theirs = torch.nn.Parameter(draw(4096, dtype=dtype))
    optimizer = AdamW8bit([theirs], lr=RATE, betas=BETAS, eps=EPS, weight_decay=decay)
    for step in range(1, 7):
        theirs.grad = draw(4096, step, dtype) * 0.1**step
        optimizer.step()
    state = optimizer.state[theirs]
    truth = theirs.detach(), state["state1"], state["absmax1"], state["state2"], state["absmax2"]
    names = "parameter", "codes of m", "absmax of m", "codes of v", "absmax of v"
    for name, a, b in zip(names, ours, truth, strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} differ, as {a[a != b][:3]} from {b[a != b][:3]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_as_bitsandbytes(monkeypatch, dtype, decay):
    check_bitsandbytes(adamw8bit, monkeypatch, dtype, decay)


@pytest.mark.parametrize("n", [1, 255, 257, 1000])
def test_the_first_step_is_that_of_adamw(n):
    """Moments of zeros are exact, so that the first update is that of torch in fp64, and the moments are b g, b g^2."""
    parameter, m, m_scale, v, v_scale = train(adamw8bit, draw(n), 1)
    truth = torch.nn.Parameter(draw(n).double())
    truth.grad = draw(n, 1).mul(0.1).double()
    torch.optim.AdamW([truth], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY).step()
    torch.testing.assert_close(parameter.double(), truth.detach(), rtol=3e-7, atol=1e-9)
    g = draw(n, 1) * 0.1
    for moment, scale, value, signed in ((m, m_scale, g * (1 - BETAS[0]), True), (v, v_scale, g * g * 0.01, False)):
        codes, absmax = nearest(value, signed)
        torch.testing.assert_close(scale, absmax, rtol=1e-6, atol=0)
        assert (moment.int() - codes.int()).abs().max() <= 1  # 0.01 is rounded: a number near a boundary may pass it
        assert (moment != codes).float().mean() < 0.01


def bowl(steps=60):
    """Return the largest distance from fp32 AdamW, both down a bowl whose curvatures span two decades."""
    curvature = 10 ** (2 * torch.rand(2048, generator=torch.Generator().manual_seed(3)) - 1)
    ours, theirs = draw(2048), torch.nn.Parameter(draw(2048))
    optimizer = torch.optim.AdamW([theirs], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0)
    first, second = zero_moment(ours), zero_moment(ours)
    for step in range(1, steps + 1):
        adamw8bit_step(ours, curvature * ours, first, second, step, RATE, BETAS, EPS, 0.0)
        theirs.grad = curvature * theirs.detach()
        optimizer.step()
    assert ((draw(2048) - theirs).abs() > 0.3).float().mean() > 0.4  # it went somewhere
    return (ours - theirs.detach()).abs().max()


def test_many_steps_stay_near_adamw():
    assert bowl() < 0.5 * 60 * RATE


def test_a_second_moment_of_zero_blows_up(monkeypatch):
    """Why LOWEST is not 0: one weight of 2,048 is thrown far away, as bitsandbytes would throw it."""
    monkeypatch.setattr(adamw8bit, "LOWEST", 0)
    assert bowl() > 100


def test_a_small_second_moment_is_not_zero():
    g = torch.tensor([1.0, 1e-4, 0.0]).repeat(100)
    parameter = torch.zeros(300)
    first, second = zero_moment(parameter), zero_moment(parameter)
    adamw8bit_step(parameter, g, first, second, 1, RATE, BETAS, EPS, 0.0)
    assert second[0].tolist() == [255, 1, 1] * 100
    parameter = torch.zeros(300)
    adamw8bit_step(parameter, 0 * g, first, second, 2, RATE, BETAS, EPS, 0.0)
    assert parameter.abs().max() < 1.5 * RATE and (parameter[2::3] == 0).all()


def test_parts_of_a_tensor_are_independent(monkeypatch):
    monkeypatch.setattr(adamw8bit, "CHUNK", 512)
    whole = train(adamw8bit, draw(1300), 3)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(whole, train(adamw8bit, draw(1300), 3), strict=True))
    shaped = train(adamw8bit, draw(1300).view(13, 100), 3)
    assert shaped[1].shape == (13, 100)
    assert all(torch.equal(a.view(-1), b) for a, b in zip(shaped, whole, strict=True))


def test_the_scale_multiplies_the_gradient():
    first, second = (zero_moment(draw(600)) for _ in range(2))
    scaled, plain = draw(600), draw(600)
    adamw8bit_step(scaled, draw(600, 1), first, second, 1, RATE, BETAS, EPS, DECAY, scale=0.25)
    again = [zero_moment(plain) for _ in range(2)]
    adamw8bit_step(plain, draw(600, 1) * 0.25, *again, 1, RATE, BETAS, EPS, DECAY)
    assert torch.equal(scaled, plain) and torch.equal(first[1], again[0][1])


def test_stochastic_rounding():
    """Each weight lands on a neighbour in bf16 of the exact result, and on average on the result."""
    start, g = draw(512, dtype=torch.bfloat16), draw(512, 1)
    exact = start.float()
    adamw8bit_step(exact, g, zero_moment(exact), zero_moment(exact), 1, 1e-4, BETAS, EPS, 0.0)
    runs = []
    for seed in range(400):
        runs.append(start.clone())
        adamw8bit_step(runs[-1], g, zero_moment(start), zero_moment(start), 1, 1e-4, BETAS, EPS, 0.0, seed=seed)
    runs = torch.stack(runs).double()
    below, above = runs.amin(0), runs.amax(0)
    gap = exact.abs().log2().floor().sub(7).exp2().double()  # between bf16 numbers
    assert ((below >= exact - gap) & (above <= exact + gap)).all() and (above > below).float().mean() > 0.5
    assert ((runs.mean(0) - exact).abs() <= 5 * gap / 2 / math.sqrt(400)).all()  # a coin's deviation is at most 1/2
    again = start.clone()
    adamw8bit_step(again, g, zero_moment(start), zero_moment(start), 1, 1e-4, BETAS, EPS, 0.0, seed=7)
    assert torch.equal(again.double(), runs[7])
    with pytest.raises(ConfigError, match="only bfloat16 is rounded stochastically"):
        adamw8bit_step(exact, g, zero_moment(exact), zero_moment(exact), 1, RATE, BETAS, EPS, 0.0, seed=1)


def test_a_bad_gradient_shows():
    for bad in (math.nan, math.inf):
        g = draw(600, 1)
        g[300] = bad
        parameter = draw(600)
        first, second = zero_moment(parameter), zero_moment(parameter)
        adamw8bit_step(parameter, g, first, second, 1, RATE, BETAS, EPS, DECAY)
        assert parameter.isnan().nonzero().flatten().tolist() == [300]
        assert (~first[1].isfinite()).tolist() == (~second[1].isfinite()).tolist() == [False, True, False]


MUTANTS = [
    ("_decode(*moments[i::2], signed)", "_decode(*moments[i::2], True)"),
    ("alpha=1 - betas[0]", "alpha=1"),
    ("addcmul_(g, g", "addcmul_(g, g.sign()"),
    (".div_(root)", ""),
    ("learning_rate / (1 - betas[0] ** step)", "learning_rate"),
    (".mul_(1 - learning_rate * weight_decay)", ".mul_(1 - weight_decay)"),
    ("_encode(v, *moments[1::2], False)", "_encode(v, *moments[1::2], True)"),
    ("v.sqrt().div_(root).add_(eps)", "v.add(eps).sqrt().div_(root)"),
]


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, monkeypatch, old, new):
    wrong = mutant(adamw8bit, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_bitsandbytes(wrong, monkeypatch, torch.float32, DECAY)
