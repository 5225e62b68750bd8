"""minitune: fine-tune real language models with an engine small enough to read in an afternoon.

The face of the library is lazy, so that `import minitune` costs nothing until a name is used.
"""

import importlib
import sys
import types

_FACE = {
    "load_model": "minitune.checkpoint.load",
    "load_tokenizer": "minitune.checkpoint.load",
    "generate": "minitune.decoding",
}
__all__ = ["generate", "load_model", "load_tokenizer"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'minitune' has no attribute '{name}'")


class _Face(types.ModuleType):
    """Keeps `minitune.generate` the function when the command of that name, a submodule, is imported too."""

    def __setattr__(self, name, value):
        if name not in _FACE:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
