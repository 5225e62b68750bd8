"""What an installation gets: a wheel with every module, recipe and the manifest, which works anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from minitune.sources import read_manifest
from tests.sizes import ROOT, sources


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel of a copy of the sources, unpacked as an installation has it."""
    home = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home)
    for name in ("minitune", "kernels"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    (home / "weights").mkdir()
    shutil.copy(ROOT / "weights/manifest.toml", home / "weights")
    (home / "weights" / "model.gguf").write_bytes(b"what was fetched stays at home")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(home), str(home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = home.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home / "site")
    return home / "site"


def test_the_wheel_holds_every_module_recipe_and_the_manifest(site):
    names = (path.relative_to(ROOT).as_posix() for path in sources())
    modules = {f"minitune/{name}" if name.startswith("kernels/") else name for name in names}
    recipes = {f"minitune/recipes/{path.name}" for path in (ROOT / "minitune/recipes").iterdir()}
    files = {path.relative_to(site).as_posix() for path in (site / "minitune").rglob("*") if path.is_file()}
    assert files == modules | recipes | {"minitune/weights/manifest.toml", "minitune/evaluation/rubric.yaml"}


def test_names_are_known_outside_the_repository(site, tmp_path):
    own = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}
    own.pop("MINITUNE_WEIGHTS", None)
    where = "import minitune.sources as s; print(s.__file__, s.weights_folder(), *s.read_manifest(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=own)
    file, weights, *names = done.stdout.splitlines()
    assert file == str(site / "minitune/sources.py") and weights == str(tmp_path / "minitune"), done.stderr
    assert names == list(read_manifest(ROOT / "weights/manifest.toml")) and "smollm2-135m-instruct" in names
