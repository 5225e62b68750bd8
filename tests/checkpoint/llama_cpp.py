"""llama.cpp itself as a judge: built once from the source archive that is pinned in the manifest, kept beside weights.

`convert` runs its own converter, from the same archive, on Hugging Face folders.
"""

import functools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from minitune.files import atomic_folder
from minitune.sources import read_manifest, weights_folder

# Off: what is not needed, and instructions beyond AVX2, which some virtual machines promise but do not have.
_OPTIONS = ("LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER",
            "GGML_OPENMP", "GGML_NATIVE")  # fmt: skip
_WANTED = ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py")
_CONVERT = """
import json, pathlib, sys
root, *folders = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion, convert_hf_to_gguf
from conversion import base
def config(folder, *_, **__):  # the file itself: transformers 5 gives other names to fields than it reads
    return json.loads(pathlib.Path(folder, "config.json").read_text())
base.ModelBase.load_hparams = staticmethod(config)
for folder in folders:
    architecture = config(folder)["architectures"][0]
    for part in conversion.get_model_class(architecture).__mro__:  # a tiny model's vocabulary is not one it knows
        if "set_vocab" in vars(part):
            part.set_vocab = lambda self: None
    for kind in ("f32", "bf16", "q8_0"):
        sys.argv = ["convert", folder, "--outfile", f"{folder}/{kind}.gguf", "--outtype", kind]
        convert_hf_to_gguf.main()
"""


@functools.cache
def home() -> Path:
    """Return the folder of the built library and the converter; skip the test where it cannot be built."""
    entry = read_manifest()["llama-cpp-vocab"]
    folder = weights_folder() / "llama-cpp"
    if not (folder / "site").is_dir():
        missing = [tool for tool in ("c++", "cmake") if not shutil.which(tool)]
        if missing:
            pytest.skip(f"llama.cpp cannot be built: there is no {' and no '.join(missing)}")
        with atomic_folder(folder, overwrite=True) as temporary:
            _build(entry, temporary)
    return folder


def _build(entry, folder: Path) -> None:
    """Download the archive, compile it (ten minutes of one core) and unpack the converter."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{entry.requirement} --hash=sha256:{entry.archive_sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    name = entry.requirement.partition("==")[0]
    _run([*pip, "download", "--no-deps", "--no-binary", name, "--require-hashes", "-r", wanted, "-d", folder])
    (archive,) = folder.glob("*.tar.gz")
    options = " ".join(f"-D{option}=OFF" for option in _OPTIONS)
    _run([*pip, "install", "--no-deps", "--target", folder / "site", archive], CMAKE_ARGS=options)
    _run([*pip, "install", "--no-deps", "--target", folder / "site", "diskcache==5.6.3"])
    with tarfile.open(archive) as container:
        for member in container:
            inside = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and inside.startswith(_WANTED):
                member.name = inside
                container.extract(member, folder / "converter", filter="data")
    archive.unlink()


def _run(command: list, **environment: str) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]


def convert(folders: list[Path]) -> None:
    """Let llama.cpp's converter write f32.gguf, bf16.gguf and q8_0.gguf into each folder, without tokenizers."""
    _run([sys.executable, "-c", _CONVERT, home() / "converter", *folders])


class LlamaCpp:
    """A GGUF file opened by llama.cpp, with a cache in fp32 and on one thread."""

    def __init__(self, path: Path, length: int = 256):
        """Load the model for texts of at most `length` tokens."""
        sys.path.insert(0, str(home() / "site"))
        import llama_cpp

        options = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
        self._model = llama_cpp.Llama(str(path), n_ctx=length, logits_all=True, verbose=False, **options)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text."""
        return self._model.tokenize(text.encode(), special=special)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return (T, V)."""
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return the `count` ids that follow."""
        for _ in range(count):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[-count:]
