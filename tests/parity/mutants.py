"""Bugs planted on our side, to show that the certificate would see them, and in which rows.

A mutant is a way to read the checkpoint wrongly: our engine loads a copy whose config or tensors are what an engine
with that bug would make of the right ones; transformers keeps the right one. A family to which a mutant does not
apply has no row.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import minitune
from minitune.model import single, transformer
from minitune.model.cache import KVCache
from minitune.model.rope import Rope
from minitune.training import objectives
from tests.parity.cases import FAMILIES, ROPES, Case
from tests.parity.measures import MEASURES, apart, certify
from tests.parity.twins import rewritten, their_forward, token_ids, write

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mutant:
    """A bug: what it makes of config fields or of tensors; None where it cannot happen."""

    name: str
    fields: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    tensors: Callable[[Tensors, dict[str, Any]], Tensors | None] | None = None


def _each_head(tensors: Tensors, fields: dict[str, Any], change: dict[str, Callable]) -> Tensors:
    """Apply `change` to the q, k and v parts, each seen as (heads, d, ...), wherever the family stores them."""
    heads = fields.get("num_attention_heads", fields.get("n_head"))
    counts = {"q": heads, "k": fields.get("num_key_value_heads", heads), "v": fields.get("num_key_value_heads", heads)}

    def part(key: str, rows: torch.Tensor) -> torch.Tensor:
        shaped = rows.unflatten(0, (counts[key], -1))
        return change[key](shaped).flatten(0, 1) if key in change else rows

    def stacked(rows: torch.Tensor) -> torch.Tensor:
        width = len(rows) // sum(counts.values())
        pieces = rows.split([width * count for count in counts.values()])
        return torch.cat([part(key, piece) for key, piece in zip(counts, pieces, strict=True)])

    found = {}
    for name, tensor in tensors.items():
        for key in counts:
            if f".{key}_proj." in name:
                tensor = part(key, tensor)
        if ".qkv_proj." in name:
            tensor = stacked(tensor)
        if ".c_attn." in name:
            tensor = stacked(tensor.T).T if tensor.dim() == 2 else stacked(tensor)
        if ".query_key_value." in name:
            each = tensor.unflatten(0, (heads, 3, -1))
            pieces = [part(key, each[:, i].flatten(0, 1)).unflatten(0, (heads, -1)) for i, key in enumerate(counts)]
            tensor = torch.stack(pieces, 1).flatten(0, 2)
        found[name] = tensor.contiguous()
    return found


def _rotary_width(fields: dict[str, Any], rows: torch.Tensor) -> int:
    rope = fields.get("rope_parameters") or {}
    return int(rows.shape[1] * rope.get("partial_rotary_factor", 1.0))


def _in_turned_part(order: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Reorder the elements of each q and k head that rope turns."""

    def change(tensors: Tensors, fields: dict[str, Any]) -> Tensors | None:
        if "rope_parameters" not in fields:
            return None

        def head(rows: torch.Tensor) -> torch.Tensor:
            width = _rotary_width(fields, rows)
            places = torch.cat((order(torch.arange(width)), torch.arange(width, rows.shape[1])))
            return rows[:, places]

        return _each_head(tensors, fields, {"q": head, "k": head})

    return change


def _reversed_groups(tensors: Tensors, fields: dict[str, Any]) -> Tensors | None:
    if fields.get("num_key_value_heads") == 1:
        return None
    return _each_head(tensors, fields, {"k": lambda rows: rows.flip(0), "v": lambda rows: rows.flip(0)})


def _without_offset(tensors: Tensors, fields: dict[str, Any]) -> Tensors | None:
    if not fields["model_type"].startswith("gemma"):
        return None
    return {name: tensor - 1 if "norm" in name else tensor for name, tensor in tensors.items()}


def _window(by: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def change(fields: dict[str, Any]) -> dict[str, Any] | None:
        used = fields.get("sliding_window") and fields.get("use_sliding_window", True)
        return {"sliding_window": fields["sliding_window"] + by} if used else None

    return change


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    return lambda fields: {name: value} if fields.get(name) not in (None, value) else None


def _plain_rope(fields: dict[str, Any]) -> dict[str, Any] | None:
    def plain(rope: dict[str, Any]) -> dict[str, Any]:
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        return {"rope_type": "default", **kept}

    rope = fields.get("rope_parameters")
    if rope is None:
        return None
    made = {name: plain(inner) for name, inner in rope.items()} if "full_attention" in rope else plain(rope)
    return {"rope_parameters": made} if made != rope else None


def _head_width_scale(fields: dict[str, Any]) -> dict[str, Any] | None:
    if "attention_multiplier" in fields:
        width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        return {"attention_multiplier": width**-0.5}
    return {"query_pre_attn_scalar": fields["head_dim"]} if "query_pre_attn_scalar" in fields else None


def _one_theta(fields: dict[str, Any]) -> dict[str, Any] | None:
    rope = fields.get("rope_parameters") or {}
    if "full_attention" not in rope:
        return None
    return {"rope_parameters": rope | {"sliding_attention": rope["full_attention"]}}


def _halves(places: torch.Tensor) -> torch.Tensor:
    return places.roll(len(places) // 2)


def _interleaved(places: torch.Tensor) -> torch.Tensor:
    return places.unflatten(0, (2, -1)).T.flatten()


MUTANTS = [
    Mutant("rope halves swapped", tensors=_in_turned_part(_halves)),
    Mutant("q/k permuted (interleaved pairs)", tensors=_in_turned_part(_interleaved)),
    Mutant("k/v head order reversed", tensors=_reversed_groups),
    Mutant("norm offset forgotten", tensors=_without_offset),
    Mutant("window one too long", fields=_window(1)),
    Mutant("window one too short", fields=_window(-1)),
    Mutant("soft-cap of scores dropped", fields=_set("attn_logit_softcapping", None)),
    Mutant("soft-cap of logits dropped", fields=_set("final_logit_softcapping", None)),
    Mutant("rope scaling ignored", fields=_plain_rope),
    Mutant("query scale ignored", fields=_head_width_scale),
    Mutant("embedding multiplier ignored", fields=_set("embedding_multiplier", 1.0)),
    Mutant("residual multiplier ignored", fields=_set("residual_multiplier", 1.0)),
    Mutant("logits scaling ignored", fields=_set("logits_scaling", 1.0)),
    Mutant("one theta for local and global layers", fields=_one_theta),
    Mutant("rope in layers that have none", fields=_set("no_rope_layers", [1, 1, 1, 1])),
    Mutant("parallel residual ignored", fields=_set("use_parallel_residual", False)),
]


@torch.no_grad()
def caught(case: Case, folder: Path) -> dict[str, float]:
    """Return the error of the logits under each mutant that applies to a case."""
    theirs = write(case, folder / "right")
    expected = their_forward(theirs, token_ids())
    fields = json.loads((folder / "right" / "config.json").read_text())
    fields = json.loads(json.dumps(theirs.config.to_dict())) | fields
    errors = {}
    for index, mutant in enumerate(MUTANTS):
        changed = mutant.fields(fields) if mutant.fields else {}
        if changed is None:
            continue
        target = folder / str(index)
        if mutant.tensors:
            if mutant.tensors(_stored(folder / "right"), fields) is None:
                continue
            rewritten(folder / "right", target, lambda found, plant=mutant.tensors: plant(found, fields))
        else:
            rewritten(folder / "right", target, **changed)
        errors[mutant.name] = apart(minitune.load_model(target, dtype="float32")(token_ids()), expected)
    return errors


def _stored(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@dataclass(frozen=True)
class Patch:
    """A bug of the engine's own code that only some measure of a case can see."""

    name: str
    case: str
    measure: str
    place: Any
    attribute: str
    wrong: Callable[..., Any]
    """Called with the right function first."""


PATCHES = [
    Patch("window one too long in the cache alone", "Mistral 8/2, untied", "cached", transformer, "visibility",
          lambda right, p, offset, window: right(p, offset, window + bool(offset))),
    Patch("rope turned back in the pass for one row", "Llama 3 8/2, untied", "one text", single, "_turn",
          lambda right, x, cos, sin: right(x, cos, -sin)),
    Patch("window one too long in the pass for one row", "Mistral 8/2, untied", "one text", single, "_rooms",
          lambda right, config, reach, *rest: right(config, [(rope, window + 1) for rope, window in reach], *rest)),
    Patch("keys of a shorter text kept", "rope: dynamic Llama", "cached", KVCache, "remember",
          lambda right, cache, ids, positions: False),
    Patch("keys of a shorter text kept", "Phi-3.5 8/2, untied", "cached", KVCache, "remember",
          lambda right, cache, ids, positions: False),
    Patch("padding is seen", "Llama 2 8/2, untied", "left padding", transformer, "visibility",
          lambda right, p, *rest: right(p + (p > 0) * 9, *rest)),
    Patch("positions go on in packed rows", "Qwen3 8/2, tied", "20 full steps", Rope, "tables",
          lambda right, rope, p, *rest: right(rope, p.cumsum(-1), *rest)),
    Patch("soft-cap missing in the loss", "Gemma 2 8/2, tied", "20 full steps", objectives, "sft_loss",
          lambda right, hidden, head, targets, *cap: right(hidden, head, targets)),
]  # fmt: skip


def patched(patch: Patch, folder: Path) -> float:
    """Return the error of the patch's measure with the bug in the code."""
    case = next(case for case in FAMILIES + ROPES if case.name == patch.case)
    right = getattr(patch.place, patch.attribute)
    with mock.patch.object(patch.place, patch.attribute, lambda *given: patch.wrong(right, *given)):
        return certify(case, folder, {patch.measure: MEASURES[patch.measure]})[patch.measure]
