"""What parameters and modules are called in a family's checkpoints, where that differs from our names.

Ours are those of Hugging Face's Llama code, which most families share. GPT-2 and GPT-NeoX have their own.
"""

from minitune.model.config import ModelConfig
from minitune.model.families import FAMILIES


def checkpoint_name(config: ModelConfig, name: str) -> str:
    """Return the checkpoint's name of a parameter or module of ours, such as `model.layers.0.mlp.up_proj.weight`."""
    for ours, theirs in FAMILIES[config.family].names:
        name = _replaced(name, ours, theirs)
    return name


def own_name(config: ModelConfig, name: str) -> str:
    """Return our name of a checkpoint's parameter or module; one that has none is returned as it is.

    Checkpoints of the base model alone, such as the first GPT-2, lack the outermost part of the name.
    """
    names = FAMILIES[config.family].names
    outer = names[0][1].split(".")[0] if names else ""
    bare = [theirs.removeprefix(f"{outer}.") for _, theirs in names if theirs.startswith(f"{outer}.")]
    if any(_replaced(name, part, "") != name and name.startswith(part) for part in bare):
        name = f"{outer}.{name}"
    for ours, theirs in reversed(names):
        name = _replaced(name, theirs, ours)
    return name


def is_transposed(config: ModelConfig, name: str) -> bool:
    """Tell whether checkpoints hold the weight that we call `name` as (in, out), as GPT-2's Conv1D does."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.endswith(FAMILIES[config.family].transposed or (" ",))


def _replaced(name: str, part: str, by: str) -> str:
    """Replace a run of whole dotted parts of a name."""
    return f".{name}.".replace(f".{part}.", f".{by}.").strip(".")
