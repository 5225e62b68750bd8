"""A second real model: Gemma 3 270M in Q4_K_M, against transformers' import, and LoRA on it."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import CheckpointError
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.sources import resolve
from tests.parity.twins import quiet

pytestmark = pytest.mark.real
TEXTS = (
    "The harbour was quiet when the first boats came in. Two of them carried mackerel.",
    "def area(width, height):\n    return width * height\n",
    "La mer était calme; 世界 is 'world', 3.14 is not pi. 🎉",
)


@pytest.fixture(scope="module")
def gemma():
    """The GGUF file; it is never fetched by a test, since its terms have to be accepted."""
    try:
        (path,) = resolve("gemma-3-270m").glob("*.gguf")
    except CheckpointError as error:
        pytest.skip(f"{error} --accept_licence, after reading its terms")
    return path


@torch.no_grad()
def test_logits_equal_transformers_import(gemma):
    ours, tokenizer = load_model(gemma), load_tokenizer(gemma)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(gemma.parent, gguf_file=gemma.name, dtype=torch.float32).eval()
    state = theirs.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.state_dict().items())  # dequantised alike
    assert ours.config.windows.count(None) == 3 and ours.config.windows[0] == 512
    long = tokenizer.encode(" ".join(TEXTS) * 12)  # longer than the window
    for ids in (*map(tokenizer.encode, TEXTS), long[:700]):
        logits, expected = ours(torch.tensor([ids]))[0], theirs(torch.tensor([ids])).logits[0]
        error = ((logits - expected).norm() / expected.norm()).item()
        print(f"{len(ids)} tokens: relative error {error:.1e}")
        assert error < 1e-4 and torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_lora_lowers_the_loss(gemma):
    model, tokenizer = load_model(gemma), load_tokenizer(gemma)
    ids = torch.tensor([tokenizer.encode(TEXTS[0] + " The third had a broken mast and a silent crew.")])
    layers = add_lora(model, LoRAConfig(rank=8))
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    losses = []
    for _ in range(12):
        logits = model(ids)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("loss", " ".join(f"{loss:.3f}" for loss in losses))
    assert losses[-1] < 0.5 * losses[0] and losses[0] < 0.5 * math.log(model.config.vocab_size)
