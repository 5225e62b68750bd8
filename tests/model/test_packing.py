"""A packed row equals its documents run apart; one document cannot touch another."""

import pytest
import torch

from minitune.losses.sft import sft_loss
from minitune.model.config import LoRAConfig, ModelConfig
from minitune.model.lora import add_lora
from minitune.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    tie_embeddings=True, initializer_range=0.2,
)  # fmt: skip
LENGTHS = (5, 1, 9, 3)


def packed():
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]
    ids = torch.cat([*documents, torch.zeros(2, dtype=torch.int64)])[None]  # two tokens of padding
    positions = torch.cat([torch.arange(length) for length in LENGTHS] + [torch.zeros(2, dtype=torch.int64)])[None]
    return documents, ids, positions


def test_packed_equals_separate():
    model = Transformer(CONFIG)
    documents, ids, positions = packed()
    whole = model(ids, positions=positions)[0]
    start = 0
    for document in documents:
        alone = model(document[None])[0]
        part = whole[start : start + len(document)]
        assert ((part - alone).norm() / alone.norm()).item() < 1e-6
        start += len(document)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_document_leaves_the_others_bit_equal(dtype, changed):
    model = Transformer(CONFIG, dtype=dtype)
    _, ids, positions = packed()
    before = model(ids, positions=positions)[0]
    start, end = sum(LENGTHS[:changed]), sum(LENGTHS[: changed + 1])
    ids[0, start:end] = (ids[0, start:end] + 7) % 61
    after = model(ids, positions=positions)[0]
    outside = torch.ones(ids.shape[1], dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])


def gradients(model, rows):
    model.zero_grad()
    weight = 0
    for ids, positions, targets in rows:
        loss, count = sft_loss(model.hidden(ids, positions=positions), model.head_weight, targets)
        loss.backward()
        weight += count
    return {name: p.grad / weight for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_a_packed_row_equal_those_of_its_documents(lora):
    """In fp64, where a wrong mask cannot hide behind rounding."""
    model = Transformer(CONFIG, dtype=torch.float64)
    if lora:
        for adapter in add_lora(model, LoRAConfig(rank=2)).values():
            adapter.B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
        model.double()
    documents, ids, positions = packed()
    targets = torch.full_like(ids, -100)
    separate, start = [], 0
    for document in documents:
        if len(document) > 1:
            targets[0, start : start + len(document) - 1] = document[1:]
        own = torch.full((1, len(document)), -100)
        own[0, : len(document) - 1] = document[1:]
        separate.append((document[None], None, own))
        start += len(document)
    together = gradients(model, [(ids, positions, targets)])
    apart = gradients(model, [row for row in separate if (row[2] >= 0).any()])
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert ((gradient - apart[name]).norm() / apart[name].norm()).item() < 1e-12, name


def test_a_mask_that_is_off_by_one_is_caught(monkeypatch):
    import minitune.model.transformer as module
    from minitune.ops.attention import visibility

    model = Transformer(CONFIG)
    documents, ids, positions = packed()
    monkeypatch.setattr(module, "visibility", lambda p, offset, window: visibility(p + 1, offset, window))
    whole = model(ids, positions=positions)[0][5:6]
    alone = model(documents[1][None])[0]
    assert ((whole - alone).norm() / alone.norm()).item() > 1e-3
