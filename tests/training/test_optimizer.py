"""AdamW, clipping and averaging by hand on a few numbers; stochastic rounding; groups."""

import math

import pytest
import torch
from torch import nn

from minitune.ops.rounding import round_stochastically
from minitune.training.config import OptimizerConfig
from minitune.training.optimizer import Optimizer


def parameter(values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def adamw(weight, gradients, rate, betas, eps, decay):
    """One number through AdamW, from the paper (algorithm 2), in double precision."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
        weight = weight - rate * decay * weight - rate * step
    return weight


def test_two_steps_by_hand_with_averaging_and_clipping():
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    matrix, vector = parameter([[0.5, -1.0]]), parameter([2.0])
    optimizer = Optimizer({"w": matrix, "norm": vector}, config)
    seen = {"w0": [], "w1": [], "n": []}
    for sums, weight in (([6.0, 8.0, 0.0], 2), ([0.2, -0.4, 0.4], 2)):
        matrix.grad, vector.grad = torch.tensor([sums[:2]]), torch.tensor(sums[2:])
        norm = optimizer.average(weight)
        means = [s / weight for s in sums]
        assert norm == pytest.approx(math.sqrt(sum(m * m for m in means)))
        optimizer.clip(norm)
        optimizer.step(0.01)
        scale = min(1.0, 1.0 / (norm + 1e-6))
        for name, mean in zip(seen, means, strict=True):
            seen[name].append(mean * scale)
    expected = [adamw(start, seen[name], 0.01, (0.8, 0.9), 1e-3, decay)
                for name, start, decay in (("w0", 0.5, 0.1), ("w1", -1.0, 0.1), ("n", 2.0, 0.0))]  # fmt: skip
    assert [*matrix[0].tolist(), vector.item()] == pytest.approx(expected, rel=1e-6)
    assert matrix.grad is None and vector.grad is None


def test_clipping_equals_torchs():
    torch.manual_seed(0)
    mine, theirs = parameter(torch.randn(4, 3).tolist()), nn.Parameter(torch.zeros(4, 3))
    mine.grad = torch.randn(4, 3) * 10
    theirs.grad = mine.grad / 7
    torch.nn.utils.clip_grad_norm_([theirs], 0.5)
    optimizer = Optimizer({"w": mine}, OptimizerConfig(max_grad_norm=0.5))
    optimizer.clip(optimizer.average(7))
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)


def test_no_clipping_when_switched_off():
    weight = parameter([1.0])
    optimizer = Optimizer({"w": weight}, OptimizerConfig(max_grad_norm=None))
    weight.grad = torch.tensor([50.0])
    optimizer.clip(optimizer.average(1))
    assert weight.grad.item() == 50.0


def test_lora_plus_gives_b_its_own_rate_and_leaves_the_rest():
    names = ["l.q_proj.lora.A", "l.q_proj.lora.B"]
    parameters = {name: parameter([[1.0]]) for name in names}
    optimizer = Optimizer(parameters, OptimizerConfig(), plus_ratio=16.0)
    for p in parameters.values():
        p.grad = torch.ones(1, 1)
    optimizer.average(1)
    optimizer.step(0.001)
    moved = [1 - parameters[name].item() for name in names]  # Adam's first step is the rate itself
    assert moved == pytest.approx([0.001, 0.016], rel=1e-3)


def test_updates_too_small_for_bf16_are_not_lost():
    torch.manual_seed(0)
    count = 4000
    weight, nearest = parameter([1.0] * count, torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    optimizer = Optimizer({"w": weight}, OptimizerConfig())
    for _ in range(100):
        weight.grad = torch.ones(count, dtype=torch.bfloat16)
        optimizer.average(1)
        optimizer.step(1e-4)
        nearest -= torch.tensor([1e-4], dtype=torch.bfloat16)
    assert nearest.item() == 1.0, "what rounding to nearest does"
    assert weight.float().mean().item() == pytest.approx(0.99, abs=5e-4)


def test_a_second_moment_in_bf16_decays():
    torch.manual_seed(0)
    weight = parameter([0.0] * 4000, torch.bfloat16)
    optimizer = Optimizer({"w": weight}, OptimizerConfig(betas=(0.9, 0.999)))
    optimizer.moments["w"]["exp_avg_sq"].fill_(1.0)
    for _ in range(200):
        weight.grad = torch.zeros(4000, dtype=torch.bfloat16)
        optimizer.average(1)
        optimizer.step(1e-4)
    decayed = 0.999**200
    assert (torch.tensor(1.0, dtype=torch.bfloat16) * 0.999).item() == 1.0, "what rounding to nearest does"
    assert optimizer.moments["w"]["exp_avg_sq"].float().mean().item() == pytest.approx(decayed, rel=0.01)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    x = torch.tensor([1.0, 1.0 + 1 / 512, -3.0078125, 1e-30, 0.0, float("inf")])
    noise = torch.arange(1 << 16, dtype=torch.int32)  # every value once: the exact expectation
    for value in x:
        out = torch.empty(1 << 16, dtype=torch.bfloat16)
        round_stochastically(value.repeat(1 << 16), noise, out)
        assert len(out.unique()) <= 2
        if value.isfinite():
            assert out.double().mean().item() == pytest.approx(value.item(), rel=1e-7)
        else:
            assert out.unique().item() == value


def test_a_bf16_parameter_longer_than_a_slice_moves_as_its_fp32_twin(monkeypatch):
    monkeypatch.setattr("minitune.training.optimizer.SLICE", 1000)
    torch.manual_seed(1)
    start, gradients = torch.randn(3500, 1).bfloat16(), torch.randn(5, 3500, 1).bfloat16()
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(start.to(dtype))
        optimizer = Optimizer({"w": weight}, OptimizerConfig(weight_decay=0.1, max_grad_norm=1.0))
        for gradient in gradients:
            weight.grad = gradient.to(dtype)
            optimizer.clip(optimizer.average(3))
            optimizer.step(1e-2)
        ends.append(weight.detach().float())
    difference = ends[1] - ends[0]
    assert (difference.abs() <= 5 * 2.0**-7 * ends[0].abs() + 1e-3).all()
    assert abs(difference.mean().item()) < 4 * difference.std().item() / 3500**0.5


def test_state_goes_round():
    def fresh():
        return {"a": parameter([[1.0, 2.0]]), "b": parameter([3.0], torch.bfloat16)}

    def step(parameters, optimizer, value):
        for p in parameters.values():
            p.grad = torch.full_like(p, value)
        optimizer.average(1)
        optimizer.step(0.01)

    one, two = fresh(), fresh()
    first, second = Optimizer(one, OptimizerConfig()), Optimizer(two, OptimizerConfig())
    step(one, first, 0.5)
    with torch.no_grad():
        for name in one:
            two[name].copy_(one[name])
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for parameters, optimizer in ((one, first), (two, second)):
        torch.manual_seed(1)  # of the stochastic rounding; a checkpoint holds the generator's state
        step(parameters, optimizer, -0.2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())
