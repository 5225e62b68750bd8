"""The house: imports go down only, and importing anything does nothing."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sizes import ROOT, sources

FLOORS = [
    {"codebooks", "errors", "strict_json"},
    {"files", "gguf_io", "kernels", "safetensors_io"},
    {"cli", "device", "endpoint", "sampling", "sources", "ops", "text"},
    {"model", "data", "losses"},
    {"checkpoint", "curation", "decoding", "memory", "reporting"},
    {"evaluation", "loading", "planning"},
    {"training", "responder"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
DOORS = {path.stem for path in (ROOT / "minitune").glob("*.py")} - FLOOR.keys() - {"__init__"}
HEAVY = {"transformers", "peft", "trl", "accelerate", "bitsandbytes", "lightning"}


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "minitune"


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "minitune":
                found += [(node.lineno, f"minitune.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def violations(path: Path, own: str) -> list[str]:
    floor = FLOOR.get(own, len(FLOORS))
    found = []
    for line, module in imports(path):
        if module.split(".")[0] in HEAVY:
            found.append(f"{path}:{line}: {module} must not be underneath")
        if not module.startswith("minitune."):
            continue
        other = room(module)
        if other != own and FLOOR.get(other, len(FLOORS)) >= floor and other != "__version__":
            found.append(f"{path}:{line}: {own} (floor {floor}) imports {module}, which is not below it")
    return found


def test_imports_go_down_only():
    problems = []
    for path in sources():
        parts = path.relative_to(ROOT).parts
        own = "kernels" if parts[0] == "kernels" else Path(parts[1]).stem
        if own != "__init__":
            problems += violations(path, own)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "own,line",
    [
        ("ops", "from minitune.model.config import ModelConfig"),
        ("text", "import minitune.ops.norm"),
        ("data", "from minitune.losses import sft"),
        ("train", "from minitune.evaluate import main"),
        ("model", "from minitune import checkpoint"),
        ("sources", "from minitune.data.reading import read_rows"),
        ("reporting", "from minitune.training.state import Progress"),
        ("training", "import peft"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, own, line):
    (tmp_path / "module.py").write_text(line + "\n")
    assert violations(tmp_path / "module.py", own)


def modules() -> list[str]:
    """Return the import name of every file; the folder kernels/ is imported as minitune.kernels."""
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources())
    return [("minitune." + name if name.startswith("kernels") else name).removesuffix(".__init__") for name in names]


def test_importing_prints_nothing_and_changes_no_environment():
    code = (
        "import os, sys, importlib\nbefore = dict(os.environ)\nsys.argv = ['x', '--nonsense']\n"
        f"for name in {modules()!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before)\n"
        "import torch\nassert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("door", sorted(DOORS))
def test_help_is_quick_and_loads_no_torch(door):
    code = (
        "import sys, runpy\nsys.argv = ['minitune', '--help']\n"
        f"try: runpy.run_module('minitune.{door}', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert seconds < 5, f"{seconds:.1f} s even on a loaded machine"


def test_no_file_or_function_is_too_long():
    done = subprocess.run([sys.executable, "-m", "tests.sizes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
