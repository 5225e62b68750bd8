"""The Fisher information against autograd, closed forms and the definition, and the mistakes it must not be."""

import math

import pytest
import torch
from torch import nn

from minitune.checkpoint.load import load_model
from minitune.data.examples import Example
from minitune.model.config import LoRAConfig, QuantizationConfig
from minitune.model.linear import QuantizedWeight
from minitune.model.lora import add_lora, linear_modules
from minitune.training.fisher import diagonal_fisher, draw_tokens, summed_squares

PAD = 259


def text(length, seed):
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids), (False, *[True] * (length - 1)), f"text {seed}")


TEXTS = [text(9, 1), text(6, 2), text(12, 3)]


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model, dtype=torch.float32).double().eval()


def plain_log_probabilities(model, example):
    """(T - 1, V), by the model's own logits and torch's softmax."""
    return model(torch.tensor([example.ids[:-1]]))[0].log_softmax(-1)


def drawn(model, examples, seed):
    """The tokens that `diagonal_fisher` draws: the same generator, in the same order."""
    generator, found = torch.Generator().manual_seed(seed), []
    for example in examples:
        probabilities = plain_log_probabilities(model, example).detach().exp()
        found.append(probabilities.multinomial(1, generator=generator).squeeze(1))
    return found


def test_on_logistic_regression_it_is_the_closed_form():
    """F_j = mean of x_j^2 p (1 - p), where p = s(w x); at w = 0 the squared score is x_j^2 / 4 for either label."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=draw, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def losses(times):
        for row in x.repeat(times, 1):
            p = torch.sigmoid(row @ w.detach())
            label = torch.bernoulli(p, generator=draw)
            yield nn.functional.binary_cross_entropy_with_logits(row @ w, label)

    at_zero = summed_squares({"w": w}, losses(1))["w"] / len(x)
    torch.testing.assert_close(at_zero, x.square().mean(0) / 4, rtol=1e-12, atol=0)
    assert w.grad is None
    w.data.copy_(torch.tensor([0.5, -1.0, 0.0, 1.5, 0.2]))
    p = torch.sigmoid(x @ w.detach())
    closed = (x.square() * (p * (1 - p))[:, None]).mean(0)
    many = summed_squares({"w": w}, losses(40))["w"] / (40 * len(x))
    torch.testing.assert_close(many, closed, rtol=0.05, atol=0)  # 8,000 draws


def autograd_fisher(model, weights, examples, targets, *, batch_mean=False):
    """Squared gradients, example by example, or the known mistake: of the whole batch's mean loss."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses = [
        -plain_log_probabilities(model, example).gather(1, t[:, None]).sum()
        for example, t in zip(examples, targets, strict=True)
    ]
    tokens = sum(len(t) for t in targets)
    for loss in [sum(losses) / tokens] if batch_mean else losses:
        for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += grad.square()
    return total if batch_mean else {name: value / tokens for name, value in total.items()}


def test_it_is_the_squares_of_each_windows_gradient(model):
    """Every weight of a tied model, for the same drawn tokens, by plain autograd in fp64."""
    weights = dict(model.named_parameters())
    expected = autograd_fisher(model, weights, TEXTS, drawn(model, TEXTS, seed=5))
    model.requires_grad_(False)
    found = diagonal_fisher(model, weights, TEXTS, PAD, seed=5)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()), "all is put back"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-18)


def test_known_mistakes_are_far_off(model):
    """Squaring a batch's mean, and the text's own next tokens, which the same comparison must tell from F."""
    weights = dict(model.named_parameters())
    right = diagonal_fisher(model, weights, TEXTS, PAD, seed=5)
    own = [torch.tensor(example.ids[1:]) for example in TEXTS]
    for mistake in (
        autograd_fisher(model, weights, TEXTS, drawn(model, TEXTS, seed=5), batch_mean=True),
        autograd_fisher(model, weights, TEXTS, own),
    ):
        away = sum((mistake[n] - right[n]).abs().sum() for n in right) / sum(right[n].sum() for n in right)
        assert away > 0.3


def test_its_mean_over_draws_is_the_definition(model):
    """F = sum over positions, E over all tokens of the vocabulary of the squared score, without a single draw."""
    example, name = text(3, 4), "model.layers.0.self_attn.q_proj.weight"
    weight = dict(model.named_parameters())[name]
    logp = plain_log_probabilities(model, example)
    exact = torch.zeros_like(weight)
    for one in logp.flatten():
        score = torch.autograd.grad(one, weight, retain_graph=True)[0]
        exact += one.exp().detach() * score.square()
    exact /= len(logp)
    draws = 150
    found = (
        sum(diagonal_fisher(model, {name: weight}, [example], PAD, seed=seed)[name] for seed in range(draws)) / draws
    )
    assert float(found.sum() / exact.sum()) == pytest.approx(1, abs=0.15)
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.95


def test_tokens_are_drawn_from_the_models_own_distribution(model):
    hidden = torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2
    p = model.logits(hidden).softmax(-1)[0].detach()
    tokens = draw_tokens(model, hidden.expand(20_000, -1), torch.Generator().manual_seed(1))
    counts = torch.bincount(tokens, minlength=len(p)).double()
    often = p * 20_000 > 5
    chi2 = ((counts - 20_000 * p).square() / (20_000 * p))[often].sum()
    freedom = int(often.sum())
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_it_does_not_touch_the_random_state_of_the_run(model):
    before = torch.get_rng_state()
    diagonal_fisher(model, dict(model.named_parameters()), TEXTS, PAD)
    assert torch.equal(before, torch.get_rng_state())


def test_a_quantised_weight_has_that_of_what_it_decodes_to(tiny_model):
    """QLoRA's base: beside it a model that holds the decoded weights as parameters."""
    quantised = load_model(tiny_model, dtype=torch.float32, quantize=QuantizationConfig())
    decoded = load_model(tiny_model, dtype=torch.float32)
    for path, layer in linear_modules(quantised).items():
        linear_modules(decoded)[path].weight.data.copy_(layer.stored_weight.dequantize(torch.float32))
    for one in (quantised, decoded):
        add_lora(one, LoRAConfig(rank=2), seed=0)
    ours, theirs = (
        diagonal_fisher(m, {path: layer.weight for path, layer in linear_modules(m).items()}, TEXTS, PAD)
        for m in (quantised, decoded)
    )
    assert len(ours) == 14
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-12)
    weights = [layer.weight for layer in linear_modules(quantised).values()]
    assert all(isinstance(w, QuantizedWeight) and w.tensor.on_gradient is None for w in weights)
