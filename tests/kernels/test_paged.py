"""Moments in the computer's memory, on a GPU; what needs none is in tests/training/test_optimizer_kinds.py."""

import pytest
import torch
from torch import nn

from minitune.training.config import OptimizerConfig
from minitune.training.optimizer import Optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="moments are paged off a GPU")


def trained(kind: str, dtype: torch.dtype, paged: bool) -> Optimizer:
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(700, 640, generator=draw).to("cuda", dtype))
    one = Optimizer({"w": weight}, OptimizerConfig(kind, max_grad_norm=None, paged=paged))
    torch.manual_seed(1)
    for _ in range(4):
        weight.grad = torch.randn(700, 640, generator=draw).to("cuda", dtype)
        one.average(1)
        one.step(0.05)
    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_they_are_page_locked_and_give_the_same_numbers(kind, dtype):
    plain, paged = trained(kind, dtype, False), trained(kind, dtype, True)
    kept = {name: tensor for name, tensor in paged.state().items() if name != "step"}
    assert kept and all(tensor.is_pinned() and not tensor.is_cuda for tensor in kept.values())
    torch.testing.assert_close(paged.parameters["w"], plain.parameters["w"], rtol=1e-6, atol=1e-7)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, plain.state()[name].cpu(), rtol=1e-6, atol=1e-7)


def test_the_gpu_holds_one_parameters_moments_at_most():
    parameters = {f"w{i}": nn.Parameter(torch.zeros(1024, 1024, device="cuda")) for i in range(8)}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one = Optimizer(parameters, OptimizerConfig("adamw", max_grad_norm=None, paged=True))
    assert torch.cuda.memory_allocated() == before
    one.average(1)
    one.step(0.05)
    moments = 2 * 4 * 1024**2
    assert torch.cuda.max_memory_allocated() - before < 3 * moments  # those of all eight would be 8
