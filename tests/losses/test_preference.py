"""The losses over preferences against arithmetic in Python's floats, limits, and autograd in fp64."""

import math

import pytest
import torch

from minitune.losses import preference as P
from tests.kernels.proof import mutant

D = [0.7, -1.3, 0.0]  # margins in nats
W, L = [-0.4, -1.2, -2.5], [-0.9, -0.3, -2.5]  # log-probabilities per token


def t(values, **more):
    return torch.tensor(values, dtype=torch.float64, **more)


def s(x):
    return 1 / (1 + math.exp(-x))


def odds(u):
    return math.exp(u) / (1 - math.exp(u))


BY_HAND = {  # function of tensors, its arguments, the same by hand with the slope in the first argument
    "dpo": (lambda d: P.dpo_loss(d, 0.5), (D,), lambda d: -math.log(s(0.5 * d)), lambda d: -0.5 * s(-0.5 * d)),
    "cdpo": (
        lambda d: P.dpo_loss(d, 0.5, 0.2),
        (D,),
        lambda d: -0.8 * math.log(s(0.5 * d)) - 0.2 * math.log(s(-0.5 * d)),
        lambda d: 0.5 * (s(0.5 * d) - 0.8),
    ),
    "robust": (
        lambda d: P.robust_dpo_loss(d, 0.5, 0.2),
        (D,),
        lambda d: (-0.8 * math.log(s(0.5 * d)) + 0.2 * math.log(s(-0.5 * d))) / 0.6,
        lambda d: 0.5 * (-0.8 * s(-0.5 * d) - 0.2 * s(0.5 * d)) / 0.6,
    ),
    "ipo": (lambda d: P.ipo_loss(d, 0.5), (D,), lambda d: (d - 1) ** 2, lambda d: 2 * (d - 1)),
    "hinge": (lambda d: P.hinge_loss(d, 0.5), (D,), lambda d: max(0, 1 - 0.5 * d), lambda d: -0.5),
    "orpo": (
        P.odds_ratio_loss,
        (W, L),
        lambda w, r: -math.log(s(math.log(odds(w) / odds(r)))),
        lambda w, r: -s(-math.log(odds(w) / odds(r))) * (1 + odds(w)),  # d log odds / du = 1 / (1 - e^u)
    ),
    "simpo": (
        lambda w, r: P.simpo_loss(w, r, 2.0, 0.5),
        (W, L),
        lambda w, r: -math.log(s(2 * (w - r) - 0.5)),
        lambda w, r: -2 * s(0.5 - 2 * (w - r)),
    ),
    "reward": (
        lambda w, r: P.bradley_terry_loss(w, r, t([0.3, 0.3, 0.3])),
        (W, L),
        lambda w, r: -math.log(s(w - r - 0.3)),
        lambda w, r: -s(0.3 - w + r),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_and_gradient_by_hand(name):
    function, columns, value, slope = BY_HAND[name]
    first, *rest = (t(column, requires_grad=True) for column in columns)
    loss = function(first, *rest)
    loss.sum().backward()
    for i, row in enumerate(zip(*columns, strict=True)):
        assert loss[i].item() == pytest.approx(value(*row), rel=1e-12)
        assert first.grad[i].item() == pytest.approx(slope(*row), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "hinge"])  # it has a kink
def test_gradcheck(name):
    function, columns, *_ = BY_HAND[name]
    assert torch.autograd.gradcheck(function, tuple(t(column, requires_grad=True) for column in columns))


def test_kto_by_hand():
    ratio, good, z = t([0.4, -0.2, 1.5], requires_grad=True), torch.tensor([True, False, True]), t(0.3)
    loss = P.kto_loss(ratio, good, z, 0.5, 1.5, 2.0)
    loss.sum().backward()
    u = [0.5 * 0.1, 0.5 * -0.5, 0.5 * 1.2]
    truth = [1.5 * (1 - s(u[0])), 2.0 * (1 - s(-u[1])), 1.5 * (1 - s(u[2]))]
    slopes = [-0.75 * s(u[0]) * s(-u[0]), 1.0 * s(u[1]) * s(-u[1]), -0.75 * s(u[2]) * s(-u[2])]
    assert loss.tolist() == pytest.approx(truth, rel=1e-12)
    assert ratio.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert torch.autograd.gradcheck(lambda r: P.kto_loss(r, good, z, 0.5, 1.5, 2.0), (ratio,))


def test_kto_baseline_is_a_mean_not_below_zero_and_has_no_gradient():
    assert P.kto_baseline(t([0.5, -0.1, 0.2])).item() == pytest.approx(0.2)
    assert P.kto_baseline(t([-0.5, 0.1])).item() == 0
    assert not P.kto_baseline(t([0.5], requires_grad=True)).requires_grad


def test_an_equal_pair():
    zero = t([0.0])
    for loss in (P.dpo_loss(zero, 0.1), P.dpo_loss(zero, 0.1, 0.3), P.robust_dpo_loss(zero, 0.1, 0.3)):
        assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert P.odds_ratio_loss(t([-0.7]), t([-0.7])).item() == pytest.approx(math.log(2), rel=1e-15)
    assert P.bradley_terry_loss(t([1.2]), t([1.2])).item() == pytest.approx(math.log(2), rel=1e-15)
    assert P.ipo_loss(zero, 0.1).item() == pytest.approx(25) and P.hinge_loss(zero, 0.1).item() == 1
    assert P.kto_loss(zero, torch.tensor([True]), t(0.0), 0.1).item() == 0.5


def test_as_beta_goes_to_zero_dpo_forgets_the_margin():
    assert P.dpo_loss(t(D), 1e-9).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-8)


def test_a_swapped_pair():
    d = t(D)
    assert torch.allclose(P.dpo_loss(-d, 0.5) - P.dpo_loss(d, 0.5), 0.5 * d, atol=1e-14)  # log s(z) - log s(-z) = z
    assert torch.allclose(P.dpo_loss(-d, 0.5, 0.2), P.dpo_loss(d, 0.5, 0.8), rtol=1e-15)
    assert torch.allclose(P.robust_dpo_loss(d, 0.5, 0.0), P.dpo_loss(d, 0.5))


def test_robust_loss_is_unbiased_under_flips():
    """Over labels flipped with probability e its mean is DPO's loss on the true labels; cDPO's is not."""
    d, e = t(D), 0.2
    mean = (1 - e) * P.robust_dpo_loss(d, 0.5, e) + e * P.robust_dpo_loss(-d, 0.5, e)
    assert torch.allclose(mean, P.dpo_loss(d, 0.5), rtol=1e-12)
    mean = (1 - e) * P.dpo_loss(d, 0.5, e) + e * P.dpo_loss(-d, 0.5, e)
    assert not torch.allclose(mean, P.dpo_loss(d, 0.5), rtol=1e-2)


@pytest.mark.parametrize("u", [-80.0, -1.0, -math.log(2), -0.5, -1e-6])
def test_log_odds_in_fp32_against_fp64(u):
    exact = torch.tensor(u)  # what fp32 holds
    truth = u64 = exact.double()
    truth = u64 - torch.log(-torch.expm1(u64))
    value = exact.clone().requires_grad_()
    result = P.log_odds(value)
    result.backward()
    assert result.item() == pytest.approx(truth.item(), rel=2e-6, abs=1e-7)
    assert value.grad.item() == pytest.approx((1 / -torch.expm1(u64)).item(), rel=1e-5)


def test_certainty_is_finite():
    value = torch.zeros(1, requires_grad=True)
    P.odds_ratio_loss(value, value - 1).sum().backward()
    assert torch.isfinite(value.grad).all()


def test_extreme_margins_do_not_overflow():
    d = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = P.dpo_loss(d, 1.0, 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and d.grad.tolist() == pytest.approx([-0.9, 0.1])


MUTANTS = {  # the row of BY_HAND that catches it, what stands there, what a mistake would write
    "dpo": ("beta * margin\n    return -(1", "margin\n    return -(1"),
    "cdpo": ("label_smoothing * F.logsigmoid(-z)\n\n", "label_smoothing * F.logsigmoid(z)\n\n"),
    "robust": ("(1 - 2 * label_smoothing)", "(1 - label_smoothing)"),
    "ipo": ("1 / (2 * beta)) **", "1 / beta) **"),
    "hinge": ("1 - beta * margin", "beta - margin"),
    "orpo": ("return u - torch", "return -torch"),
    "simpo": ("- gamma)", "+ gamma)"),
    "reward": ("lead - margins)", "lead)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(tmp_path, monkeypatch, name):
    monkeypatch.setitem(globals(), "P", mutant(P, tmp_path, *MUTANTS[name]))
    if name == "orpo":  # that row holds the function itself
        monkeypatch.setitem(BY_HAND, name, (P.odds_ratio_loss, *BY_HAND[name][1:]))
    with pytest.raises(AssertionError):
        test_value_and_gradient_by_hand(name)


@pytest.mark.parametrize(
    "old,new", [("log_ratio - baseline", "log_ratio"), ("(desirable, good, bad)", "(desirable, bad, good)")]
)
def test_mutants_of_kto_are_caught(tmp_path, monkeypatch, old, new):
    monkeypatch.setitem(globals(), "P", mutant(P, tmp_path, old, new))
    with pytest.raises(AssertionError):
        test_kto_by_hand()
