"""No kernel without its proofs; and the proofs' own tools: checks of tensors, margins, error bounds, the table."""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from minitune.errors import ConfigError
from minitune.kernels import checks
from tests.kernels import compiled, proof
from tests.sizes import ROOT


def kernels() -> list[tuple[str, str]]:
    """Return module and name of every function of kernels/ that is launched, not called by one that is.

    A @triton.jit function that returns a value, or whose name begins with an underscore, is called.
    """
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"minitune.kernels.{path.stem}".removesuffix(".__init__"))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            compiled_one = type(getattr(module, function.name)).__name__ in ("JITFunction", "InterpretedFunction")
            gives = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
            if compiled_one and not gives and not function.name.startswith("_"):
                found.append((path.stem, function.name))
    return found


def test_there_are_kernels():
    assert ("norm", "rms_norm_forward") in kernels() and len({name for _, name in kernels()}) == len(kernels())


@pytest.mark.parametrize("module,name", kernels())
def test_every_kernel_has_its_proofs(module, name):
    tests = importlib.import_module(f"tests.kernels.test_{module}")
    assert name in tests.KERNELS, f"tests/kernels/test_{module}.py does not name {name} in KERNELS"
    table = compiled.read_table()["kernels"]
    assert any(spec.name.startswith(f"{module}.{name} ") for spec in compiled.specs()), f"{name} is in no SPECS"
    assert any(row.startswith(f"{module}.{name} ") for row in table), f"{name} is not in compiled.json"
    if importlib.util.find_spec("bench.kernels"):
        assert name in importlib.import_module("bench.kernels").BENCHED, f"bench/kernels.py does not measure {name}"


def test_every_kernel_compiles_without_spills_as_the_table_says():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def use(registers=40, spilled=0, shared=0) -> dict:
    one = {"registers": registers, "spilled": spilled, "shared": shared}
    return {"sm_80": one, "sm_90": one}


@pytest.mark.parametrize(
    "found,version,text",
    [
        ({"a": use()}, "1", None),
        ({"a": use(registers=41)}, "1", "but compiled.json has"),
        ({"a": use(registers=41)}, "2", None),
        ({"a": use(spilled=8)}, "2", "spills 8 bytes"),
        ({"a": use(shared=170_000)}, "2", "a: sm_80 has 166912 bytes of shared memory"),
        ({"a": use(), "b": use()}, "1", "b: not in compiled.json"),
        ({}, "1", "a: in compiled.json, but no such spec"),
    ],
)
def test_the_table_is_held(found, version, text):
    lines = list(compiled.problems(found, {"triton": "1", "kernels": {"a": use()}}, version))
    assert any(text in line for line in lines) if text else not lines


def test_a_spec_must_name_every_argument():
    spec = next(spec for spec in compiled.specs() if spec.name.startswith("norm.rms_norm_forward"))
    short = compiled.Spec(spec.kernel, "short", {"x": "*bf16"}, spec.constants)
    with pytest.raises(AssertionError, match="differ in"):
        compiled.build(short, 90)


@pytest.mark.parametrize(
    "tensor,wanted,text",
    [
        (torch.zeros(2, 3), {"shape": (2, 3)}, None),
        (torch.zeros(2, 3), {"shape": (None, 3)}, None),
        (torch.zeros(2, 3), {"shape": (..., 3)}, None),
        (torch.zeros(3), {"shape": (..., 3)}, None),
        (torch.zeros(()), {"shape": (..., None)}, "x has the shape (), but the kernel needs (..., any)"),
        (torch.zeros(2, 3), {"shape": (3,)}, "x has the shape (2, 3), but the kernel needs (3)"),
        (torch.zeros(2, 3), {"shape": (..., 2)}, "needs (..., 2)"),
        (torch.zeros(2), {"dtypes": (torch.uint8,)}, "x is float32, but the kernel takes uint8; convert it"),
        (torch.zeros(2, 3).T, {"contiguous": True}, "x has the strides (1, 3)"),
        (torch.zeros(2), {"device": torch.device("cuda:1")}, "x is on cpu, but the others are on cuda:1; move it"),
        (torch.zeros(2), {"device": None}, "x is on cpu, but a Triton kernel needs a GPU; move it to one"),
    ],
)
def test_require(monkeypatch, tensor, wanted, text):
    monkeypatch.setattr(checks, "INTERPRETED", wanted != {"device": None})
    if text is None:
        checks.require("x", tensor, **wanted)
        return
    with pytest.raises(ConfigError) as caught:
        checks.require("x", tensor, **wanted)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_as_rows_copies_only_where_columns_are_apart():
    x = torch.zeros(2, 3, 8)
    assert checks.as_rows(x).data_ptr() == x.data_ptr() and checks.as_rows(x[..., :5]).stride() == (8, 1)
    assert checks.as_rows(x.transpose(1, 2)).stride() == (3, 1)
    assert checks.as_rows(torch.zeros(1).expand(4, 8)).stride() == (8, 1)


def test_the_error_bound_has_two_sides():
    truth = torch.ones(100, dtype=torch.float64)
    near, far = (truth.float() + step for step in (1e-5, 3e-5))
    proof.assert_as_exact([near], [near], [truth])
    for ours in (far, near.double(), near[:99], truth.float() * float("nan")):
        with pytest.raises(AssertionError):
            proof.assert_as_exact([ours], [near], [truth])


def test_margins():
    x = proof.framed(torch.ones(2, 3), pitch=1)
    assert x.equal(torch.ones(2, 3).to(x.device)) and x.stride() == (4, 1)
    around = x.as_strided((2 * 4 + 2 * proof.MARGIN,), (1,), x.storage_offset() - proof.MARGIN)
    assert around.isnan().sum() == 2 * proof.MARGIN + 2
    with proof.guarded_outputs():
        assert torch.empty(2, 3).isnan().all() and torch.empty_like(x).shape == (2, 3)
    for place in (-1, 6):
        with pytest.raises(AssertionError, match="outside"), proof.guarded_outputs():
            out = torch.empty(2, 3)
            out.as_strided((1,), (1,), out.storage_offset() + place).fill_(float("nan"))
