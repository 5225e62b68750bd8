"""Each family by other paths: generation in batches, gradient checkpointing, weights in 4 bits, reward heads."""

import copy
import dataclasses

import pytest
import torch

import minitune
from minitune.data.batching import collate
from minitune.decoding import generate_ids
from minitune.model.lora import linear_modules, quantized_weights
from minitune.training.objectives import supervised
from tests.parity.cases import CONTEXT, ROPES, main_cases
from tests.parity.measures import apart, packed_documents
from tests.parity.twins import draw, quiet, their_forward, token_ids, twins

_SEEN: dict[str, None] = {}
# One model of each config class, and of the kinds of rope that read a text again when it grows.
CASES = [
    case
    for case in [*main_cases(), *ROPES]
    if case.name in ("Phi-3.5 8/2, untied", "rope: dynamic Llama") or case.kind not in _SEEN
    if _SEEN.setdefault(case.kind) is None
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_generation_checkpointing_and_quantised_weights(case, tmp_path):
    pair = twins(case, tmp_path)
    greedy(pair)
    checkpointed(pair.ours)
    model = minitune.load_model(tmp_path, dtype="float32", quantize="nf4", keep_quantized=False)
    decoded, stored = copy.deepcopy(pair.ours), quantized_weights(model)
    assert set(stored) == set(linear_modules(model))
    with torch.no_grad():
        for path, weight in stored.items():
            decoded.get_submodule(path).weight.copy_(weight.dequantize())
        assert apart(model(token_ids()), decoded(token_ids())) < 1e-5


def upstream_gradients(model, forward, ids):
    """Return the gradients of a random projection of the logits, all in one vector."""
    model.zero_grad(set_to_none=True)
    logits = forward(ids).float()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return torch.cat([parameter.grad.float().flatten() for _, parameter in sorted(model.named_parameters())])


@pytest.mark.parametrize("name", ["Gemma 2 8/2, tied", "Mistral 8/2, untied"])
@pytest.mark.parametrize("window", [7, 150])
def test_texts_of_many_blocks_in_fp32_and_bf16(name, window, tmp_path):
    """Attention is made in blocks of 128 queries where there is a cap, and in the backward pass in bf16."""
    case = next(case for case in CASES if case.name == name)
    fields = case.fields | {"sliding_window": window, "max_position_embeddings": 512}
    pair = twins(dataclasses.replace(case, fields=fields), tmp_path)
    ids = token_ids(2, 300, 7)
    expected = upstream_gradients(pair.theirs, lambda given: their_forward(pair.theirs, given), ids)
    assert apart(upstream_gradients(pair.ours, pair.ours, ids), expected) < 1e-5
    ours, theirs = pair.ours.bfloat16(), pair.theirs.bfloat16()
    their_error = apart(upstream_gradients(theirs, lambda given: their_forward(theirs, given), ids), expected)
    assert apart(upstream_gradients(ours, ours, ids), expected) < 1.5 * their_error


@torch.no_grad()
def greedy(pair):
    """Two prompts in one batch, each beyond window and context, against transformers' passes over each text alone."""
    prompts = [token_ids(1, CONTEXT - 7, 5)[0].tolist(), token_ids(1, CONTEXT - 2, 6)[0].tolist()]
    for prompt, answer in zip(prompts, generate_ids(pair.ours, prompts, max_new_tokens=12), strict=True):
        assert len(answer) == 12
        for token in answer:
            best = their_forward(pair.theirs, torch.tensor([prompt]))[0, -1].topk(2)
            assert token == best.indices[0] or best.values[0] - best.values[1] < 1e-4
            prompt.append(token)


def checkpointed(model):
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.requires_grad_(True).zero_grad()
        supervised(model, collate(packed_documents(0), 0))[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_reward_heads(case, tmp_path):
    from transformers import AutoModelForSequenceClassification

    if case.kind == "Granite":
        pytest.skip("transformers has no reward model of this family")
    with quiet():
        config = case.config(num_labels=1, pad_token_id=0)
        theirs = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
        draw(theirs, 3)
        theirs.save_pretrained(tmp_path)
    ours, ids = minitune.load_model(tmp_path, dtype="float32"), token_ids(2, CONTEXT + 4)
    with torch.no_grad():
        rewards, expected = ours.rewards(ours.hidden(ids)[:, -1]), theirs(input_ids=ids).logits[:, 0]
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
