"""A model's shape from its config alone: no weight is read, and none has to be there."""

from pathlib import Path

from minitune.checkpoint.gguf import open_gguf
from minitune.checkpoint.huggingface import read_config
from minitune.errors import CheckpointError
from minitune.files import read_json
from minitune.model.config import ModelConfig
from minitune.sources import resolve


def read_shape(name_or_path: str | Path) -> tuple[ModelConfig, bool]:
    """Return a model's config, and whether its weights are stored in 4 bits, which method qlora alone can train.

    Args:
        name_or_path: a fetched model's name, a folder that holds a config.json, that file, or a GGUF file.

    Raises:
        CheckpointError: there is nothing, or nothing of these kinds. ConfigError: a family or field not known here.
    """
    path = resolve(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path} has no config.json and {len(found)} GGUF files; name a model's folder or file"
            )
        (path,) = found
    if path.suffix == ".gguf":
        fields = open_gguf(path, whole=False)[0]
    elif path.is_dir():
        fields = read_config(path)
    elif path.suffix == ".json":
        fields = read_json(path)
    else:
        raise CheckpointError(f"{path} is neither a folder with config.json, such a file, nor a .gguf file")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no object; a config.json has fields such as model_type")
    stored = fields.get("quantization_config")
    return ModelConfig.from_hf({**fields, "quantization_config": None}, where=str(path)), bool(stored)
