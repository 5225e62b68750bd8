"""A name or a path in, a model out: weights stream tensor by tensor into a model allocated once.

What the file holds is compared with what the model needs before anything is allocated, and every misfit is
listed in one error. Then each tensor is read, dequantised or converted straight into its place, on a few
threads. Building a state dict first was rejected: it would hold the model twice. With `quantize`, a linear weight has
no place of its own: each is read, quantised and dropped, so that the full-precision model is never held.
"""

import dataclasses
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from minitune.checkpoint.adapter import (
    adapter_quantization,
    all_finite,
    fail_listing,
    load_adapter,
    load_adapters,
    misfits,
)
from minitune.checkpoint.huggingface import open_folder, refuse_pickle, save_model
from minitune.checkpoint.prequantized import StoredQuantized, check_settings, configuration, group, kept_folder
from minitune.device import as_dtype
from minitune.errors import CheckpointError, ConfigError
from minitune.files import read_json
from minitune.model.config import ModelConfig, QuantizationConfig
from minitune.model.linear import Linear
from minitune.model.names import checkpoint_name, is_transposed, own_name
from minitune.model.transformer import Transformer
from minitune.ops.nf4 import quantize as quantize_weight
from minitune.sources import resolve

_THREADS = 4
# Tables and masks that old checkpoints store; they follow from the config.
_IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


class Stored(Protocol):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read_into(self, destination: torch.Tensor) -> None:
        """Fill `destination`, of the same shape."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    quantize: QuantizationConfig | str | None = None,
    keep_quantized: bool = True,
) -> Transformer:
    """Load a model from a Hugging Face folder or a GGUF file; a tokenizer need not be there.

    Args:
        name_or_path: a name in weights/manifest.toml that was fetched, a folder, or a .gguf file.
        dtype: "float32", "bfloat16", "float16" or the torch dtype. None: as stored (where dtypes are mixed, that of
            most elements); fp32 for a quantised GGUF.
        device: where the weights go, each as it arrives; the CPU by default.
        adapter: a folder in PEFT's format, added on top (see `load_adapter`), or several by name (`load_adapters`).
        quantize: "nf4", "fp4", "int8" or a QuantizationConfig: keep the linear layers' weights in that; `dtype` is then
            that of the rest and of the arithmetic. "auto": as the base of `adapter` was in its training. A folder in
            bitsandbytes' 4 bits is read as it is.
        keep_quantized: keep what was quantised to 4 bits beside the fetched weights, and use it the next time.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: nothing there, damaged, of a kind not supported, tensors that do not fit, or numbers that are
            not finite.
        ConfigError: an architecture or a field of config.json that is not implemented, or an unknown dtype.
    """
    path = resolve(name_or_path)
    if quantize == "auto":
        folders = () if adapter is None else adapter.values() if isinstance(adapter, Mapping) else (adapter,)
        quantize = _one_quantization([resolve(folder) for folder in folders])
    elif isinstance(quantize, str):
        quantize = None if quantize == "none" else QuantizationConfig(quantize)
    fields, tensors = open_model(path)
    dtype, device = as_dtype(dtype) or _stored_dtype(tensors), device or "cpu"
    kept = None
    if keep_quantized and quantize and quantize.kind != "int8" and not fields.get("quantization_config"):
        kept = kept_folder(_gguf_file(path), quantize, dtype)
    model = kept and _load_kept(kept, dtype, device, quantize)
    if model is None:
        model = _build(path, fields, tensors, dtype, device, quantize)
        if kept:
            _keep(model, kept)
    if isinstance(adapter, Mapping):
        load_adapters(model, {name: resolve(folder) for name, folder in adapter.items()}, str(name_or_path))
    elif adapter is not None:
        load_adapter(model, resolve(adapter), str(name_or_path))
    return model.eval()


def _one_quantization(adapters: list[Path]) -> QuantizationConfig | None:
    """Return how the base of all these adapters was quantised; ConfigError where it was not the same for all."""
    found = [adapter_quantization(folder) for folder in adapters]
    if any(one != found[0] for one in found):
        raise ConfigError("the adapters were trained on a base quantised in different ways; say which with quantize")
    return found[0] if found else None


def _load_kept(kept: Path, dtype: torch.dtype, device, quantize: QuantizationConfig) -> Transformer | None:
    """Return the model that an earlier load kept; None where there is none, or, saying so, where it is damaged."""
    try:
        return _build(kept, *open_model(kept), dtype, device, quantize) if kept.is_dir() else None
    except (CheckpointError, ConfigError) as error:
        print(f"{error}; it was kept from an earlier load and is made anew", file=sys.stderr)
        return None


def _keep(model: Transformer, kept: Path) -> None:
    """Save a quantised model for the next load; where that fails, say that it will take as long."""
    try:
        save_model(model, None, kept, overwrite=True)  # another process may have been faster
    except OSError as error:
        print(f"the quantised model cannot be kept ({error}); the next load quantises again", file=sys.stderr)


def _build(path, fields, tensors, dtype, device, quantize: QuantizationConfig | None) -> Transformer:
    """Return the model with all its weights read, in `dtype`, quantised where that is asked for."""
    in_four_bits = fields.pop("quantization_config", None)
    config = ModelConfig.from_hf(fields, where=str(path))
    tensors = own_tensors(config, tensors)
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    fail_listing(f"{path} does not fit its own config", tensor_problems(config, tensors, path))
    sparse = bool(quantize or in_four_bits)  # then each weight gets its memory when it is read
    model = Transformer(config, dtype=dtype, device="meta" if sparse else device, init=False)
    places = model.state_dict()

    def fill(name: str) -> None:
        where = f"{path}: {name}"
        if sparse:
            _put(model, name, tensors[name], dtype, device, quantize, where)
        else:
            _fill(tensors[name], places[name], where)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, places):
            pass
    if head is not None:
        _check_tied(head, model.head_weight, path)
    return model


def _put(model, name: str, stored, dtype, device, quantize: QuantizationConfig | None, where: str) -> None:
    """Give a parameter of a model without memory its weight, quantised if it is a linear layer's."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    inner = isinstance(module, Linear) and leaf == "weight" and module is not model.lm_head
    if isinstance(stored, StoredQuantized):
        if not inner:
            raise CheckpointError(f"{where} is quantised, which is supported for the layers' linear weights only")
        weight = stored.read().apply(lambda part: part.to(device))
    else:
        read_as = stored.dtype if inner and quantize else getattr(module, leaf).dtype  # of a reward head it is fp32
        weight = torch.empty(stored.shape, dtype=read_as, device=device)
        _fill(stored, weight, where)
        if not (inner and quantize):
            setattr(module, leaf, torch.nn.Parameter(weight))
            return
        weight = quantize_weight(weight, **dataclasses.asdict(quantize), name=where)
    if quantize and configuration(weight) != quantize:
        raise ConfigError(
            f"{where} is stored as {configuration(weight)}, not {quantize}; ask for that, or leave it out"
        )
    module.replace_weight(dataclasses.replace(weight, dtype=dtype))


def load_tokenizer(name_or_path: str | Path, *, adapter: str | Path | Mapping | None = None) -> Any:
    """Return the tokenizer of a fetched name, a folder or a .gguf file; errors as `minitune.text` raises them.

    That of `adapter` takes its place where it has more tokens: they were added in its training.
    """
    from minitune.text.tokenizer import load_tokenizer as load  # jinja2 and tokenizers: not needed for weights

    tokenizer = load(_gguf_file(resolve(name_or_path)))
    if isinstance(adapter, str | Path) and has_tokenizer(adapter):  # several bring no tokens
        theirs = load(resolve(adapter))
        return theirs if theirs.vocab_size > tokenizer.vocab_size else tokenizer
    return tokenizer


def has_tokenizer(name_or_path: str | Path) -> bool:
    """Tell whether there are tokenizer files to load."""
    path = _gguf_file(resolve(name_or_path))
    return path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def stored_positions(path: Path) -> int | None:
    """Return how many positions the model at `path` has, None where only a tokenizer is there; reads no weights."""
    path = _gguf_file(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return None
    fields = read_json(path / "config.json") if path.is_dir() else open_model(path)[0]
    return ModelConfig.from_hf({**fields, "quantization_config": None}, where=str(path)).longest


def open_model(path: Path) -> tuple[dict[str, Any], Mapping[str, Stored]]:
    """Return the content of `config.json`, or what amounts to it, and the stored tensors by name; reads no weights.

    Raises CheckpointError or ConfigError where there is nothing that can be read.
    """
    path = _gguf_file(path)
    if path.suffix == ".gguf":
        from minitune.checkpoint.gguf import open_gguf  # the gguf package takes 0.2 s to import

        return open_gguf(path)
    if path.is_dir():
        fields, tensors = open_folder(path)
        if settings := fields.get("quantization_config"):
            check_settings(settings, path)
            tensors = group(tensors)
        return fields, tensors
    refuse_pickle(path)
    raise CheckpointError(f"{path} is neither a folder with config.json nor a .gguf file")


def _gguf_file(path: Path) -> Path:
    """Return the one GGUF file of a folder that holds no `config.json`, else the path itself."""
    found = [] if not path.is_dir() or (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GGUF files; name one, such as {found[0].name}")
    return found[0] if found else path


def _stored_dtype(tensors: Mapping[str, Stored]) -> torch.dtype:
    """Return the dtype of most elements."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    return as_dtype(counts.most_common(1)[0][0])


def own_tensors(config: ModelConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return a file's tensors by our names and as (out, in), without those that follow from the config."""
    own = {}
    for theirs, tensor in tensors.items():
        name = own_name(config, theirs)
        # A GGUF file has our names and our orientation, and what is quantised always has the latter.
        turned = name != theirs and is_transposed(config, name) and not isinstance(tensor, StoredQuantized)
        if not theirs.endswith(_IGNORED):
            if name in own:
                raise CheckpointError(f"{theirs} and another tensor are both {name} of this model; one must go")
            own[name] = Transposed(tensor) if turned else tensor
    return own


def tensor_problems(config: ModelConfig, tensors: Mapping[str, Stored], path: Path) -> list[str]:
    """Return a line for each misfit between what a model needs and `tensors` (as `own_tensors`), by the file's names.

    CheckpointError for sizes of the config that cannot be those of any tensors.
    """
    if config.num_layers > len(tensors):  # before a model of that many layers is built
        raise CheckpointError(f"{path}: {config.num_layers:,} layers are claimed, but there are {len(tensors)} tensors")
    try:
        model = Transformer(config, device="meta", init=False)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, for sizes that overflow
        raise CheckpointError(f"{path}: the config's sizes are impossible ({str(error).splitlines()[0]})") from None
    expected = {checkpoint_name(config, name): parameter.shape for name, parameter in model.state_dict().items()}
    return misfits(expected, {checkpoint_name(config, name): tensor for name, tensor in tensors.items()})


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A matrix that its file holds the other way round."""

    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read_into` fills."""
        return tuple(self.stored.shape[::-1])

    def read_into(self, destination: torch.Tensor) -> None:
        """Fill `destination`, of `shape`."""
        room = torch.empty(self.stored.shape, dtype=destination.dtype, device=destination.device)
        self.stored.read_into(room)
        destination.detach().copy_(room.mT)


def _fill(stored: Stored, place: torch.Tensor, where: str) -> None:
    """Read a tensor into its place; CheckpointError where it holds a NaN or infinity, which would answer in silence."""
    stored.read_into(place)
    if not all_finite(place):
        remedy = "" if place.dtype == stored.dtype else f" as {str(place.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{where} holds a NaN or infinity{remedy}; fetch it again, or use another dtype")


def _check_tied(stored: Stored, embedding: torch.Tensor, path: Path) -> None:
    """Raise CheckpointError where a stored head differs from the embedding that the config ties it to."""
    head = torch.empty_like(embedding)
    if tuple(stored.shape) == tuple(head.shape):
        stored.read_into(head)
        if torch.equal(head, embedding):
            return
    raise CheckpointError(
        f"{path}: tie_word_embeddings is true, but lm_head.weight is not the embedding; set it to false"
    )
