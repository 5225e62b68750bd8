"""Configs with another value, or one less: what we load of them has the logits of transformers."""

import json
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitune.checkpoint.load import load_model
from minitune.errors import MinituneError
from tests.parity.cases import main_cases
from tests.parity.twins import quiet, their_forward, token_ids, write

ODD = (None, True, False, 0, 1, 2, 3, 5, 0.5, 1.5, 40, "default", "linear")


def changed(fields: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return a config that lacks a value, or has another one, of the same kind or not."""
    fields = json.loads(json.dumps(fields))
    inner = [(value, name) for value in fields.values() if isinstance(value, dict) for name in value]
    holder, name = draw.choice([*((fields, name) for name in fields), *inner])
    old = holder.pop(name)
    kind = draw.choice(["gone", "odd", "near", "near"])
    if kind == "near" and isinstance(old, float):
        holder[name] = old * draw.choice([0.5, 2, 3])
    elif kind == "near" and type(old) is int:
        holder[name] = max(1, old * draw.choice([1, 2, 3]) // draw.choice([1, 2]))
    elif kind != "gone":
        holder[name] = draw.choice(ODD)
    return fields


def their_logits(folder, ids: torch.Tensor) -> torch.Tensor | None:
    """Return transformers' logits, None where it refuses the config."""
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        return their_forward(model, ids)
    except Exception:  # its refusals share no type
        return None


@pytest.mark.real
@pytest.mark.parametrize("case", main_cases(), ids=lambda case: case.family)
@torch.no_grad()
def test_what_loads_has_the_logits_of_transformers(case, tmp_path):
    write(case, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    draw, ids, compared = random.Random(case.name), token_ids(1), 0
    for _ in range(60):
        config = changed(fields, draw)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            ours = load_model(tmp_path)(ids)
        except MinituneError:
            continue
        expected = their_logits(tmp_path, ids)
        if expected is not None:
            compared += 1
            change = {name: value for name, value in config.items() if fields.get(name, "?") != value}
            assert (ours - expected).norm() <= 1e-5 * expected.norm(), change or fields.keys() - config.keys()
    assert compared > 10
