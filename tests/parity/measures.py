"""What is compared: each measure maps the twins to the largest relative error that it finds.

The error of a vector is |ours - theirs| / |theirs|. Of logits and hidden states each token's vector counts by itself,
of gradients each parameter's, of a training run each step's loss; the largest is reported.
"""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minitune.data.batching import collate
from minitune.data.examples import Example
from minitune.model.cache import KVCache
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.model.names import checkpoint_name
from minitune.model.single import single_pass
from minitune.training.objectives import supervised
from tests.parity.cases import CONTEXT, LENGTH, VOCABULARY, WINDOW, Case
from tests.parity.twins import Twins, layer_outputs, our_gradients, their_forward, their_layers, token_ids, twins

BAR = 1e-5
STEPS = 20
assert LENGTH > 2 * max(WINDOW, CONTEXT)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest error over the vectors of the last dimension."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def worst(errors: Iterable[float]) -> float:
    """Return the largest; a NaN is larger than any."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


@torch.no_grad()
def logits(pair: Twins) -> float:
    """Compare the logits."""
    ids = token_ids()
    return apart(pair.ours(ids), their_forward(pair.theirs, ids))


@torch.no_grad()
def hidden_states(pair: Twins) -> float:
    """Compare the state after each layer."""
    ids = token_ids()
    ours, _ = layer_outputs(pair.ours.model.layers, pair.ours, ids)
    theirs, _ = layer_outputs(their_layers(pair.theirs), lambda x: their_forward(pair.theirs, x), ids)
    return worst(apart(a, b) for a, b in zip(ours, theirs, strict=True))


def gradients(pair: Twins) -> float:
    """Compare each parameter's gradient of a random projection of the logits."""
    ids = token_ids()
    for model, forward in ((pair.ours, pair.ours), (pair.theirs, lambda x: their_forward(pair.theirs, x))):
        model.zero_grad(set_to_none=True)
        out = forward(ids)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        (out * upstream).sum().backward()
    ours = our_gradients(pair.ours)
    theirs = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    if "embed_out.weight" in ours:  # what GPT-NeoX's files call the head; in memory transformers 5 says lm_head
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert set(ours) == set(theirs), f"parameters differ: {sorted(set(ours) ^ set(theirs))}"
    return worst(apart(ours[name].flatten(), theirs[name].flatten()) for name in theirs)


def _alone(pair: Twins, ids: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Return transformers' answer (B, V) after so many of the tokens ids (B, T), by a pass without a cache.

    Where rope does not depend on the length of a text, one pass over all tokens has every answer.
    """
    if pair.config.by_length:
        return lambda end: their_forward(pair.theirs, ids[:, :end])[:, -1]
    whole = their_forward(pair.theirs, ids)
    return lambda end: whole[:, end - 1]


@torch.no_grad()
def cached(pair: Twins) -> float:
    """Read a prompt in two parts, then token by token; each answer against transformers' pass over all until there."""
    ids = token_ids()
    expected = _alone(pair, ids)
    cache, errors, start = KVCache(pair.config, 2, LENGTH), [], 0
    for end in (5, CONTEXT - 3, *range(CONTEXT - 2, LENGTH + 1)):
        answer = pair.ours(ids[:, start:end], cache=cache)[:, -1]
        errors.append(apart(answer, expected(end)))
        start = end
    return worst(errors)


@torch.no_grad()
def alone(pair: Twins) -> float:
    """The same for one text, whose new tokens take the pass for one row where there is a plan of it."""
    ids = token_ids(rows=1)
    expected, cache = _alone(pair, ids), KVCache(pair.config, 1, LENGTH)
    hidden = pair.ours.eval().hidden(ids[:, : CONTEXT - 2], cache=cache)
    step = single_pass(pair.ours, cache)
    assert (step is None) == pair.config.by_length
    step, errors = step or (lambda token: pair.ours.hidden(token, cache=cache)), []
    for end in range(CONTEXT - 2, LENGTH):
        errors.append(apart(pair.ours.logits(hidden[:, -1]), expected(end)))
        hidden = step(ids[:, end : end + 1])
    return worst([*errors, apart(pair.ours.logits(hidden[:, -1]), expected(LENGTH))])


@torch.no_grad()
def left_padded(pair: Twins) -> float:
    """The same for two rows of unequal length in one batch, each against transformers' pass over it alone."""
    ids, pads = token_ids(seed=2), torch.tensor([0, 9])
    place = torch.arange(LENGTH) - pads[:, None]
    ids[place < 0] = 0
    expected = [_alone(pair, ids[row : row + 1, pad:]) for row, pad in enumerate(pads.tolist())]
    positions, cache = place.clamp(min=0), KVCache(pair.config, 2, LENGTH)
    errors, start = [], 0
    for end in range(CONTEXT - 2, LENGTH + 1):
        answer = pair.ours(ids[:, start:end], positions=positions[:, start:end], cache=cache)[:, -1]
        for row, pad in enumerate(pads.tolist()):
            errors.append(apart(answer[row : row + 1], expected[row](end - pad)))
        start = end
    return worst(errors)


def packed_documents(step: int) -> list[list[Example]]:
    """Two documents packed into one row, and one alone; every token but each document's first is a target."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = (9 + step % 5, 22 + 3 * step % 8, 30 - step % 7)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    a, b, c = (Example(tuple(ids), (False, *[True] * (len(ids) - 1)), "drawn") for ids in drawn)
    return [[a, b], [c]]


def _train(model: nn.Module, loss_of_step: Callable[[int], torch.Tensor], rate: float) -> list[float]:
    """Take STEPS steps of AdamW; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _our_loss(model: nn.Module, step: int) -> torch.Tensor:
    """The engine's own: packed rows, and a cross-entropy that never has all logits."""
    loss, count, _ = supervised(model, collate(packed_documents(step), pad_id=0))
    return loss / count


def _their_loss(model: nn.Module, step: int) -> torch.Tensor:
    """Document by document, with all logits."""
    documents = [list(example.ids) for row in packed_documents(step) for example in row]
    loss = sum(
        F.cross_entropy(their_forward(model, torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        for ids in documents
    )
    return loss / sum(len(ids) - 1 for ids in documents)


def _steps_apart(ours: nn.Module, theirs: nn.Module, rate: float) -> float:
    our_losses = torch.tensor(_train(ours, lambda step: _our_loss(ours, step), rate), dtype=torch.float64)
    their_losses = torch.tensor(_train(theirs, lambda step: _their_loss(theirs, step), rate), dtype=torch.float64)
    return float(((our_losses - their_losses) / their_losses).abs().max())


def gradients_in_fp64(pair: Twins) -> float:
    """Compare gradients in fp64 on both sides: what is left is not rounding but the arithmetic."""
    return gradients(Twins(copy.deepcopy(pair.ours).double(), copy.deepcopy(pair.theirs).double(), pair.folder))


def full_training(pair: Twins) -> float:
    """Compare the losses of 20 steps that train every parameter."""
    ours, theirs = copy.deepcopy(pair.ours), copy.deepcopy(pair.theirs)
    ours.requires_grad_(True)
    return _steps_apart(ours, theirs, rate=5e-4)


def lora_training(pair: Twins) -> float:
    """Compare the losses of 20 steps of adapters on every linear layer; PEFT's start from our draw."""
    from peft import LoraConfig, get_peft_model

    ours, theirs = copy.deepcopy(pair.ours), copy.deepcopy(pair.theirs)
    added = {checkpoint_name(ours.config, path): lora for path, lora in add_lora(ours, LoRAConfig(4, 8.0)).items()}
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(added), fan_in_fan_out=pair.config.family == "gpt2")
    wrapped = get_peft_model(theirs, settings)
    for path, lora in added.items():
        module = wrapped.base_model.model.get_submodule(path)
        module.lora_A["default"].weight.data.copy_(lora.A.data)
        module.lora_B["default"].weight.data.copy_(lora.B.data)
    return _steps_apart(ours, wrapped, rate=2e-3)


QUICK = {"logits": logits, "hidden states": hidden_states, "gradients": gradients, "cached": cached,
         "one text": alone, "left padding": left_padded}  # fmt: skip
MEASURES = QUICK | {
    "gradients, fp64": gradients_in_fp64,
    "20 full steps": full_training,
    "20 LoRA steps": lora_training,
}


def certify(case: Case, folder: Path, measures=MEASURES) -> dict[str, float]:
    """Return each measure's largest error for a case."""
    pair = twins(case, folder)
    return {name: measure(pair) for name, measure in measures.items()}
