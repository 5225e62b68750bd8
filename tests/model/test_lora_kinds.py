"""DoRA and PiSSA against PEFT, and against what their papers derive."""

import peft
import pytest
import torch
import torch.nn.functional as F

from minitune.errors import ConfigError
from minitune.model.adapters import LoRA, principal_factors
from minitune.model.linear import Linear
from minitune.model.lora import adapter_disabled, add_lora, hold_scales
from minitune.model.lora_config import LoRAConfig
from minitune.ops.nf4 import quantize
from tests.model.test_parity import relative, twins

IDS = torch.arange(2 * 11).view(2, 11) * 7 % 101
OURS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}


def paired(ours, theirs, config, **options):
    """Both models with adapters of the same values; returns PEFT's model and the pairs of parameters by name."""
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=config.rank, lora_alpha=config.alpha,
                                target_modules="all-linear", use_dora=config.dora, **options))  # fmt: skip
    added, pairs = add_lora(ours, config), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
            pairs[name] = getattr(added[path], OURS["lora_" + kind.split(".")[0]]), parameter
    assert len(pairs) == sum(1 for lora in added.values() for _ in lora.parameters())
    return model, pairs


def backward(logits):
    generator = torch.Generator().manual_seed(3)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()


def train_both(ours, model, pairs):
    """Twelve steps of AdamW; the losses have to be the same, and to fall."""
    optimizers = [torch.optim.AdamW([pair[side] for pair in pairs.values()], lr=1e-2) for side in (0, 1)]
    first = None
    for _ in range(12):
        losses = []
        for optimizer, logits in zip(optimizers, (lambda: ours(IDS), lambda: model(IDS).logits), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        first = first or losses[0]
    assert losses[0] < first - 1


def test_dora_equals_peft_in_logits_gradients_and_training():
    ours, theirs = twins(kv_heads=2)
    plain = ours(IDS)
    model, pairs = paired(ours, theirs, LoRAConfig(rank=4, alpha=6, dora=True))
    assert relative(ours(IDS), plain) < 1e-6, "a fresh DoRA is nothing"
    for mine, parameter in pairs.values():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            mine.copy_(parameter)
    a, b = ours(IDS), model(IDS).logits
    assert relative(a, b) < 1e-5 and relative(a, plain) > 1e-2
    backward(a), backward(b)
    for name, (mine, parameter) in pairs.items():
        assert relative(mine.grad, parameter.grad) < 1e-5, name
    with adapter_disabled(ours):
        assert torch.equal(ours(IDS), plain)
    with torch.no_grad(), hold_scales(ours):
        assert relative(ours(IDS), b) < 1e-5
    assert torch.equal(ours(IDS), a)
    train_both(ours, model, pairs)


MISTAKES = {
    "the length takes part in the gradient": lambda lora, weight: lora.magnitude / torch.linalg.vector_norm(
        weight + lora.scaling * lora.B @ lora.A, dim=1),
    "the length of W alone": lambda lora, weight: lora.magnitude / weight.norm(dim=1),
    "scaling forgotten in the length": lambda lora, weight: lora.magnitude / (weight + lora.B @ lora.A).norm(
        dim=1).detach(),
    "no length": lambda lora, weight: lora.magnitude,
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_in_dora_are_noticed(mistake, monkeypatch):
    monkeypatch.setattr(LoRA, "row_scales", lambda lora, weight: MISTAKES[mistake](lora, weight))
    with pytest.raises(AssertionError):
        test_dora_equals_peft_in_logits_gradients_and_training()


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_falls_where_pefts_falls(dora, init, bias):
    """One layer, the same mask: torch's dropout draws it from the same seed."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 20, bias=bias)
    ours = Linear(linear.weight.detach().clone(), linear.bias.detach().clone() if bias else None)
    config = LoRAConfig(rank=3, alpha=5, dropout=0.4, dora=dora, init=init)
    options = {"init_lora_weights": True if init == "kaiming" else init}
    settings = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4, use_dora=dora, target_modules=["0"], **options)
    theirs = peft.get_peft_model(torch.nn.Sequential(linear), settings)
    layer = theirs.base_model.model[0]
    ours.lora = LoRA(config, 24, 20, torch.device("cpu"))
    ours.lora.reset(torch.Generator(), ours.weight)
    with torch.no_grad():
        for mine, part in ((ours.lora.A, layer.lora_A), (ours.lora.B, layer.lora_B)):
            if init == "pissa":
                assert relative(mine.abs(), part["default"].weight.abs()) < 1e-5  # singular vectors have no sign
            part["default"].weight.add_(torch.randn_like(mine) * 0.1)
            mine.copy_(part["default"].weight)
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert relative(ours.lora.magnitude, magnitude) < 1e-6
            magnitude.mul_(1.2)
            ours.lora.magnitude.copy_(magnitude)
    x = torch.randn(5, 24)
    for seed in (1, 2):
        results = []
        for call in (lambda: ours(x), lambda: theirs(x)):
            torch.manual_seed(seed)
            results.append(call())
        if init == "kaiming" and not dora:
            continue  # plain LoRA draws its own mask, for several layers at once
        assert relative(*results) < 1e-5
    ours.eval(), theirs.eval()
    assert relative(ours(x), theirs(x)) < 1e-5


def test_dora_over_nf4_is_dora_over_the_decoded_weight():
    torch.manual_seed(1)
    weight = torch.randn(32, 64)
    packed = quantize(weight, kind="nf4", block_size=64, double_quant=True)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data.copy_(packed.dequantize(torch.float32))
    theirs = peft.get_peft_model(
        torch.nn.Sequential(linear), peft.LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    )
    layer = theirs.base_model.model[0]
    ours = Linear(weight)
    ours.replace_weight(packed)
    ours.lora = LoRA(LoRAConfig(rank=4, alpha=8, dora=True), 64, 32, torch.device("cpu"))
    ours.lora.reset(torch.Generator(), packed)
    assert relative(ours.lora.magnitude, linear.weight.norm(dim=1)) < 1e-6
    with torch.no_grad():
        ours.lora.A.copy_(layer.lora_A["default"].weight)
        ours.lora.B.copy_(layer.lora_B["default"].weight)
        ours.lora.magnitude.copy_(layer.lora_magnitude_vector["default"].weight)
    x = torch.randn(3, 64)
    for a, b in ((ours(x), theirs(x)), (ours.lora.merged(packed), theirs.merge_and_unload()[0].weight)):
        assert relative(a, b) < 1e-5


def test_pissa_starts_at_the_best_approximation_and_changes_nothing():
    """Eckart and Young: no matrix of rank R is closer to W than the one left over by s B A."""
    ours, _ = twins(kv_heads=2)
    plain = ours(IDS)
    added = add_lora(ours, LoRAConfig(rank=4, alpha=6, init="pissa"))
    assert relative(ours(IDS), plain) < 1e-5
    with adapter_disabled(ours):
        assert torch.equal(ours(IDS), plain)
    for path, lora in added.items():
        weight = ours.get_submodule(path).weight
        left = torch.linalg.matrix_norm(weight - lora.scaling * lora.B @ lora.A)
        assert left.item() == pytest.approx(torch.linalg.svdvals(weight)[4:].norm().item(), rel=1e-4)


def test_pissa_trains_as_pefts_does_from_its_start():
    ours, theirs = twins(kv_heads=2)
    model, pairs = paired(ours, theirs, LoRAConfig(rank=4, alpha=6, init="pissa"), init_lora_weights="pissa")
    train_both(ours, model, pairs)


def test_pissa_equals_peft_in_logits_gradients_and_merge():
    ours, theirs = twins(kv_heads=2)
    model, pairs = paired(ours, theirs, LoRAConfig(rank=4, alpha=6, init="pissa"), init_lora_weights="pissa")
    for name, (mine, parameter) in pairs.items():
        change = torch.randn_like(parameter) * 0.05
        with torch.no_grad():  # a pair of singular vectors may have the other sign
            signs = torch.sign((mine * parameter).sum(1 if "lora_A" in name else 0))
            parameter.add_(change)
            mine.add_(change * (signs[:, None] if "lora_A" in name else signs))
    a, b = ours(IDS), model(IDS).logits
    assert relative(a, b) < 1e-5
    backward(a), backward(b)
    for name, (mine, parameter) in pairs.items():
        assert relative(mine.grad.abs(), parameter.grad.abs()) < 2e-5, name
    merged = model.merge_and_unload()
    for path, lora in ((n, m) for n, m in ours.named_modules() if isinstance(m, LoRA)):
        layer = path.removesuffix(".lora")
        assert relative(lora.merged(ours.get_submodule(layer).weight), merged.get_submodule(layer).weight) < 1e-5


@pytest.mark.parametrize("rounds", [4, 16])
def test_fast_pissa_finds_the_same_components(rounds):
    """A weight with a clear gap after rank 4: the subspace has to converge to the exact one."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20)).Q for n in (40, 30))
    values = torch.tensor([9.0, 8, 7, 6] + [1.0] * 16)
    weight = left * values @ right.T
    config = LoRAConfig(rank=4, alpha=6, init=f"pissa_niter_{rounds}")
    a, b = principal_factors(weight, config, torch.Generator().manual_seed(5))
    assert relative(config.scaling * b @ a, left[:, :4] * values[:4] @ right[:, :4].T) < 1e-4
    again, _ = principal_factors(weight, config, torch.Generator().manual_seed(5))
    assert torch.equal(a, again)


def test_what_pissa_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="lora.init is 'pissa_niter_0'"):
        LoRAConfig(init="pissa_niter_0")
    ours, _ = twins(kv_heads=2)
    with pytest.raises(ConfigError, match="has 16 components"):
        add_lora(ours, LoRAConfig(rank=17, init="pissa"))
    assert all(parameter.requires_grad for parameter in ours.parameters())
