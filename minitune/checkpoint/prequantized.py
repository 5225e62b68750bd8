"""Folders whose linear weights are stored in 4 bits, as bitsandbytes and transformers write them.

`config.json` says so in its `quantization_config`; each weight says in its own state of which kind it is, and that is
what counts. Quantising takes as long as loading does, so what was quantised once is kept beside the fetched weights,
under a name made of the files that it came from and of how it was done: when one of them changes, so does the name.
Keeping it in a form of our own was rejected: this one is read by transformers too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.quantized import from_bitsandbytes, read_state, to_bitsandbytes
from minitune.errors import ConfigError
from minitune.model.config import QuantizationConfig
from minitune.ops.nf4 import QuantizedTensor
from minitune.safetensors_io import StoredTensor
from minitune.sources import weights_folder

FORM = 1  # of what is kept; a change of the form makes older copies unused
_SCALE = ".absmax"


@dataclass(frozen=True)
class StoredQuantized:
    """A 4-bit weight in a file: what it will be, and where its parts lie."""

    name: str
    parts: Mapping[str, StoredTensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> QuantizedTensor:
        """Return the weight, on the CPU; CheckpointError where its parts do not fit each other."""
        tensors = {name: part.read() for name, part in self.parts.items()}
        return from_bitsandbytes(self.name, tensors, _file(self.parts))


def _file(parts: Mapping[str, StoredTensor]) -> str:
    """Return the file that a weight is in, as errors name it."""
    return f"{next(iter(parts.values())).file}: "


def group(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | StoredQuantized]:
    """Return the tensors with the parts of each 4-bit weight as one; CheckpointError for a damaged state."""
    grouped: dict[str, StoredTensor | StoredQuantized] = dict(tensors)
    for name in [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]:
        parts = {key: grouped.pop(key) for key in tensors if key == name or key.startswith(f"{name}.")}
        state = {key[len(name) + 1 :]: part.read() for key, part in parts.items() if ".quant_state." in key}
        _, fields = read_state(_file(parts) + name, state)
        grouped[name] = StoredQuantized(name, parts, tuple(fields["shape"]), getattr(torch, fields["dtype"]))
    return grouped


def check_settings(settings: Any, where: Path) -> None:
    """Raise ConfigError unless a `quantization_config` is bitsandbytes' in 4 bits."""
    fields = settings if isinstance(settings, dict) else {}
    method = fields.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not fields.get("load_in_4bit", fields.get("_load_in_4bit")):
        bits = "8 bits" if fields.get("load_in_8bit") else "another kind"
        raise ConfigError(
            f"{where}: weights are quantised by {method} in {bits}, which can't be read here; "
            "use the model's 16-bit folder, or one in bitsandbytes' 4 bits"
        )


def settings_of(tensors: Iterable[QuantizedTensor], dtype: torch.dtype) -> dict[str, Any]:
    """Return the `quantization_config` that tells transformers how to read these weights."""
    first = next(iter(tensors))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": first.absmax is None,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def configuration(weight: QuantizedTensor) -> QuantizationConfig:
    """Return how a weight is quantised; of int8, whose blocks are rows, no more than that."""
    if weight.kind == "int8":
        return QuantizationConfig("int8")
    return QuantizationConfig(weight.kind, weight.block_size, weight.absmax is None)


def expand(tensors: Mapping[str, torch.Tensor | QuantizedTensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with each quantised one as its parts; ConfigError for int8."""
    flat: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        flat |= to_bitsandbytes(name, tensor) if isinstance(tensor, QuantizedTensor) else {name: tensor}
    return flat


def kept_folder(path: Path, quantization: QuantizationConfig, dtype: torch.dtype) -> Path:
    """Return where the model at `path` is kept once it is quantised; the folder need not be there."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    key = [FORM, str(path.resolve()), facts, dataclasses.asdict(quantization), str(dtype)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return weights_folder() / "quantized" / f"{path.name}-{quantization.kind}-{digest}"
