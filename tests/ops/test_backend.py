"""Which implementation runs, and what is said where a kernel cannot."""

import importlib.util

import pytest
import torch

from minitune.errors import ConfigError
from minitune.ops import backend


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(backend, "_backend", "auto")


class OnGpu:
    """What the choice looks at, of a tensor on a GPU."""

    def __init__(self, dtype=torch.float32, is_cuda=True):
        self.dtype, self.is_cuda = dtype, is_cuda


def test_triton_without_a_gpu_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        backend.set_backend("triton")
    assert str(caught.value) == "backend is triton, but torch finds no GPU here; use auto or reference"
    assert backend.get_backend() == "auto"


def test_triton_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="not installed"):
        backend.set_backend("triton")
    assert backend.kernel("norm.rms_norm", OnGpu()) is None


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        ConfigError, match="backend is 'tritn'; it must be auto, reference, triton; did you mean 'triton'"
    ):
        backend.set_backend("tritn")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_which_one_runs(monkeypatch):
    from minitune.kernels.norm import rms_norm

    gpu, cpu, wide = OnGpu(), OnGpu(is_cuda=False), OnGpu(torch.float64)
    assert backend.kernel("norm.rms_norm", gpu, gpu) is rms_norm
    assert backend.kernel("norm.rms_norm", gpu, cpu) is None
    assert backend.kernel("norm.rms_norm", gpu, wide) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend.set_backend("triton")
    assert backend.kernel("norm.rms_norm", gpu, wide) is rms_norm  # which refuses it by name
    assert backend.kernel("norm.rms_norm", cpu) is None
    backend.set_backend("reference")
    assert backend.kernel("norm.rms_norm", gpu) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("name", ["norm.rms_norm", "rope.apply_rope", "swiglu.swiglu", "swiglu.geglu"])
def test_every_operation_asks_for_its_kernel(monkeypatch, name):
    """On a tensor that says it is on a GPU, the operation returns what the kernel returns."""
    module = importlib.import_module(f"minitune.ops.{name.split('.')[0]}")
    asked = []
    monkeypatch.setattr(module, "kernel", lambda *request: asked.append(request) or (lambda *arguments: arguments))

    class Tensor(OnGpu):
        shape = (2, 8)

    tensors = [Tensor() for _ in range(3 if "rope" in name else 2)]
    extra = [1e-5, 1.0] if "norm" in name else []
    assert getattr(module, name.split(".")[1])(*tensors, *extra) == (*tensors, *extra)
    assert asked == [(name, *tensors)] and backend._find(name)
