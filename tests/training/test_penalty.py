"""The price on leaving the start: its gradient by autograd, its place in the loop, what it keeps, what it refuses."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from torch import nn

from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.memory import ledger
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora, linear_modules
from minitune.model.trainable import trainable_parameters
from minitune.reporting.journal import read_metrics
from minitune.safetensors_io import read_tensors
from minitune.training import loop, penalty
from minitune.training.config import LoRAOptions, OptimizerConfig, PenaltyOptions, TrainConfig
from minitune.training.penalty import Penalty, held_weights
from minitune.training.run import choose_parameters, train
from tests.kernels.proof import mutant
from tests.training.conftest import in_child, outcome, resumed, wait
from tests.training.test_loop import RAGGED, collate, window_gradient
from tests.training.test_resume import before_call

PAD = 259


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["ewc", "l2"])
def test_the_gradient_of_plain_weights_is_autograds(kind, monkeypatch):
    monkeypatch.setattr(penalty, "SLICE", 7)
    weights = {"a": nn.Parameter(drawn((4, 6), 0)), "b": nn.Parameter(drawn((5,), 1))}
    importance = {name: drawn(w.shape, 2).square() for name, w in weights.items()} if kind == "ewc" else None
    start = {name: w.detach().clone() for name, w in weights.items()}
    held = Penalty(nn.Module(), weights, 0.3, importance)
    assert held.add(5.0) == 0 and all((w.grad == 0).all() for w in weights.values()), "at the start it is nothing"
    for number, w in enumerate(weights.values()):
        w.data.add_(drawn(w.shape, 10 + number))
        w.grad = drawn(w.shape, 20 + number)
    before = {name: w.grad.clone() for name, w in weights.items()}
    value = held.add(5.0)
    price = sum(
        0.3 / 2 * ((importance[n] if importance else 1) * (w - start[n]) ** 2).sum() for n, w in weights.items()
    )
    assert value == pytest.approx(float(price.detach()), rel=1e-12)
    for (name, w), grad in zip(weights.items(), torch.autograd.grad(price, list(weights.values())), strict=True):
        torch.testing.assert_close(w.grad, before[name] + 5 * grad, rtol=1e-12, atol=1e-14)


ADAPTERS = {
    "fresh": (LoRAConfig(rank=3, alpha=7.0), False),
    "a loaded one": (LoRAConfig(rank=3, alpha=7.0, rslora=True), True),
    "pissa": (LoRAConfig(rank=3, init="pissa"), False),
}


def adapted(folder, config, moved):
    """A model in fp64 with adapters, of which B is not zero where `moved`."""
    model = load_model(folder, dtype=torch.float32)
    add_lora(model, config, seed=0)
    model.double()
    loras = {path: layer.lora for path, layer in linear_modules(model).items()}
    for number, lora in enumerate(loras.values()):
        lora.double()
        lora.B.data.add_(drawn(lora.B.shape, number) * moved)
    return model, loras


def check_adapters(module, folder, adapter, kind):
    """The module's gradient against autograd through D = s (B A - B0 A0), formed whole."""
    module.SLICE = 100
    model, loras = adapted(folder, *ADAPTERS[adapter])
    parameters = trainable_parameters(model)
    held = held_weights(model, parameters)
    assert held.keys() == {f"{path}.weight" for path in loras}
    importance = {n: drawn(w.shape, 3).square() for n, w in held.items()} if kind == "ewc" else None
    start = {path: lora.scaling * (lora.B @ lora.A).detach() for path, lora in loras.items()}
    price = module.Penalty(model, parameters, 0.3, importance)
    assert price.add(2.0) == 0
    for number, lora in enumerate(loras.values()):
        lora.A.data.add_(drawn(lora.A.shape, 30 + number))
        lora.B.data.add_(drawn(lora.B.shape, 60 + number))
    value, total = price.add(2.0), 0.0
    for path, lora in loras.items():
        change = lora.scaling * (lora.B @ lora.A) - start[path]
        total = total + 0.3 / 2 * ((importance[f"{path}.weight"] if importance else 1) * change**2).sum()
    assert value == pytest.approx(float(total.detach()), rel=1e-9)
    for name, grad in zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True):
        torch.testing.assert_close(parameters[name].grad, 2 * grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["ewc", "l2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_gradient_of_adapters_is_that_of_the_change_they_make(tiny_model, adapter, kind, monkeypatch):
    monkeypatch.setattr(penalty, "SLICE", 100)
    check_adapters(penalty, tiny_model, adapter, kind)


MUTANTS = [
    ("part_db.add_(priced @ A.T, alpha=factor * s)", "part_db.add_(priced @ A.T, alpha=factor)", "ewc"),
    ("priced = change * fisher\n", "priced = change\n", "ewc"),
    ("da.add_(part_B.T @ priced", "da.add_(part_b.T[: len(A)] @ priced", "ewc"),
    ("[A, A - self.start[0]]", "[A, -self.start[0]]", "ewc"),
    ("[A, A - self.start[0]]", "[A, -self.start[0]]", "l2"),
    ("None if fresh else start", "None", "l2"),
    ("(b @ (a @ A.T), alpha=factor * s**2)", "(b @ (a @ A.T), alpha=factor * s)", "l2"),
    ("return self.strength / 2 *", "return self.strength *", "l2"),
]


@pytest.mark.parametrize("old,new,kind", MUTANTS)
def test_planted_mistakes_are_caught(tiny_model, tmp_path, old, new, kind):
    with pytest.raises(AssertionError):
        check_adapters(mutant(penalty, tmp_path, old, new), tiny_model, "a loaded one", kind)


def test_a_small_change_of_a_large_start_is_not_lost_to_cancellation(tiny_model):
    """In fp32, where B A and B0 A0 are equal in 6 digits, the price of their difference has 3 at least."""
    model = load_model(tiny_model, dtype=torch.float32)
    add_lora(model, LoRAConfig(rank=3, init="pissa"), seed=0)
    price, exact = Penalty(model, trainable_parameters(model), 1.0), 0.0
    for number, layer in enumerate(linear_modules(model).values()):
        (A, B), scaling = (factor.data for factor in (layer.lora.A, layer.lora.B)), layer.lora.scaling
        start = B.double() @ A.double()
        A.add_((1e-6 * drawn(A.shape, number)).float())
        exact += float((scaling * (B.double() @ A.double() - start)).square().sum()) / 2
    assert price.add(1.0) == pytest.approx(exact, rel=1e-3)


def test_bf16_weights_are_priced_in_fp32_from_an_exact_start():
    """A bf16 step of a weight near 1 is 2^-7: the price of 1,000 of them is 1000 / 2 * 2^-14, which bf16 can't sum."""
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    price = Penalty(nn.Module(), {"w": weight}, 1.0)
    weight.data.add_(2**-7)
    weight.grad = torch.full_like(weight, 0.5)
    assert price.add(3.0) == 1000 / 2 * 2**-14
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[0].float(), torch.tensor(0.5 + 3 * 2**-7), rtol=2**-9, atol=0)


def drifted(model, parameters):
    """A penalty whose start is elsewhere, so that its gradient is there from the first step on."""
    price = Penalty(model, parameters, 0.25)
    for part in price.parts:
        part.start.add_(0.125)
    return price


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_window_pays_once(tiny_model, tmp_path, monkeypatch, micro_batches):
    """However many micro-batches and targets it has: 0.25 x -0.125 on each averaged gradient; the loss is unchanged."""
    size = len(RAGGED) // micro_batches
    batches = [collate([[e] for e in RAGGED[i : i + size]], PAD) for i in range(0, len(RAGGED), size)]
    plain = window_gradient(tiny_model, tmp_path / "plain", batches)
    original = loop.Job.__init__

    def with_penalty(self, **given):
        original(self, **given, penalty=drifted(given["model"], given["parameters"]))

    monkeypatch.setattr(loop.Job, "__init__", with_penalty)
    (tmp_path / "priced").mkdir()
    priced = window_gradient(tiny_model, tmp_path / "priced", batches)
    for name, gradient in priced.items():
        torch.testing.assert_close(
            gradient - plain[name], torch.full_like(gradient, -0.25 * 0.125), rtol=1e-4, atol=1e-5
        )
    (one,), (other,) = (read_metrics(tmp_path / name) for name in ("plain", "priced"))
    assert one["loss"] == other["loss"] and "penalty" not in one
    elements = sum(gradient.numel() for gradient in priced.values())
    assert other["penalty"] == pytest.approx(0.25 / 2 * 0.125**2 * elements, rel=1e-5)


@pytest.fixture
def general(tmp_path, monkeypatch):
    """General text, and a folder of this test's own for what is kept of it."""
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path / "weights"))
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the {n} birds sing of {n * n} suns"}) for n in range(40)))
    return str(path)


def ewc(text, strength, **more):
    return PenaltyOptions("ewc", strength=strength, text=text, tokens=300, **more)


def size_of_b(folder):
    """The sum of squares of a run's adapters' B, which starts at zero."""
    tensors = read_tensors(folder / "adapter" / "adapter_model.safetensors")
    return sum(float(tensor.double().square().sum()) for name, tensor in tensors.items() if "lora_B" in name)


def test_a_strength_of_zero_changes_no_bit(make_config, general):
    plain = outcome(train(make_config("plain", max_steps=4)).folder)["result"]
    for number, options in enumerate((ewc(general, 0.0), PenaltyOptions("l2", strength=0.0))):
        assert outcome(train(make_config(f"zero{number}", max_steps=4, penalty=options)).folder)["result"] == plain


def test_a_huge_strength_holds_the_weights_at_the_start(make_config, general):
    """All that is left is of the order of a few learning rates."""
    free = train(make_config("free", max_steps=20)).folder
    for options in (ewc(general, 1e9), PenaltyOptions("l2", strength=1e9)):
        held = train(make_config(options.kind, max_steps=20, penalty=options)).folder
        assert size_of_b(held) < 0.03 * size_of_b(free)
        prices = [line["penalty"] for line in read_metrics(held) if "penalty" in line]
        assert len(prices) == 20 and prices[0] == 0 and prices[1] > 0


def test_ewc_keeps_more_of_the_first_task_than_l2_at_the_same_second():
    """Two quadratic tasks with known curvature. Minimising L_B + lambda L_A, EWC is on the frontier: nothing that is as
    good at B is better at A. L2 is not, where A's curvature differs between directions."""
    curvature = {"a": torch.tensor([9.0, 0.5, 0.1, 3.0]).double(), "b": torch.tensor([1.0, 2.0, 0.7, 0.4]).double()}
    goal = {"a": torch.zeros(4).double(), "b": torch.tensor([1.0, -1.0, 2.0, 1.5]).double()}

    def loss(task, w):
        return 0.5 * (curvature[task] * (w - goal[task]) ** 2).sum()

    def tuned(strength, importance):
        w = nn.Parameter(goal["a"].clone())  # task A was learned perfectly
        price = Penalty(nn.Module(), {"w": w}, strength, importance)
        for _ in range(500):
            (w.grad,) = torch.autograd.grad(loss("b", w), w)
            price.add(1.0)
            w.data.sub_(w.grad, alpha=0.1)
        return w.detach()

    def minimum(strength, importance):
        return curvature["b"] * goal["b"] / (curvature["b"] + strength * importance)

    kept = tuned(0.4, {"w": curvature["a"]})
    torch.testing.assert_close(kept, minimum(0.4, curvature["a"]))
    low, high = 1e-3, 10.0
    for _ in range(60):  # l2 of the strength that is as good at task B
        middle = (low + high) / 2
        low, high = (middle, high) if loss("b", minimum(middle, 1.0)) < loss("b", kept) else (low, middle)
    other = tuned(low, None)
    assert float(loss("b", other)) == pytest.approx(float(loss("b", kept)), rel=1e-6)
    assert loss("a", kept) < 0.6 * loss("a", other)


RUNS = {
    "ewc, lora": {"kind": "ewc"},
    "ewc, full, bf16, 8-bit Adam": {
        "kind": "ewc", "method": "full", "dtype": "bfloat16", "lora": LoRAOptions(),
        "optimizer": OptimizerConfig(kind="adamw8bit"),
    },
    "ewc, qlora": {"kind": "ewc", "method": "qlora"},
    "l2, last layers": {"kind": "l2", "method": "last_layers", "lora": LoRAOptions()},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_inside_a_window_ends_with_the_same_bits(make_config, general, name):
    """The start is the base again, not the weights of the checkpoint; F is read or made again with the same bits."""
    changes = {"max_steps": 6, **RUNS[name]}
    kind = changes.pop("kind")
    changes["penalty"] = ewc(general, 3.0) if kind == "ewc" else PenaltyOptions("l2", strength=3.0)
    expected = outcome(train(make_config("straight", **changes)).folder)
    assert expected["metrics"][-2]["penalty"] > 0
    config = make_config(**changes)
    stop = before_call(loop, "_accumulate", 9, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert wait(in_child(config, stop)) == 143
    assert outcome(train(resumed(config)).folder) == expected


def test_the_information_is_made_once_and_kept(make_config, general, tmp_path, monkeypatch):
    first = outcome(train(make_config("first", max_steps=3, penalty=ewc(general, 3.0))).folder)["result"]
    (kept,) = (tmp_path / "weights" / "fisher").iterdir()
    monkeypatch.setattr(penalty, "diagonal_fisher", None)  # a call would fail
    assert outcome(train(make_config("second", max_steps=3, penalty=ewc(general, 3.0))).folder)["result"] == first
    assert (
        outcome(train(make_config("third", max_steps=3, penalty=ewc(general, 3.0), seed=3)).folder)["result"] != first
    )
    own = str(tmp_path / "own.safetensors")
    (tmp_path / "own.safetensors").write_bytes(kept.read_bytes())
    again = train(make_config("fourth", max_steps=3, penalty=ewc(general, 3.0, fisher_cache=own))).folder
    assert outcome(again)["result"] == first
    with pytest.raises(CheckpointError, match="own.safetensors: .*another choice of weights; .*penalty.fisher_cache"):
        train(
            make_config("fifth", penalty=ewc(general, 3.0, fisher_cache=own), lora=LoRAOptions(target_modules="v_proj"))
        )
    assert not (tmp_path / "fifth").exists()


def test_a_run_does_not_go_on_with_another_text(make_config, general):
    config = make_config(max_steps=3, penalty=ewc(general, 3.0))
    train(config)
    with open(general, "a") as file:
        file.write('\n{"text": "and one more"}')
    with pytest.raises(CheckpointError, match="penalty.text is another one"):
        train(resumed(config))


def test_it_holds_what_trains_beside_adapters_but_nothing_new(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32)
    add_lora(model, LoRAConfig(rank=2, target_modules="q_proj"))
    model.model.norm.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(True).trained_rows = (259,)
    names = {"model.norm.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2))}
    assert held_weights(model, trainable_parameters(model)).keys() == names


TEXT = {"kind": "ewc", "text": "x.txt"}
BAD = [
    ({"strength": 1.0}, {}, "penalty.strength is 1.0; it must be left out without penalty.kind"),
    ({"kind": "l2", "text": "x.txt"}, {}, "penalty.text is x.txt; it must be left out: l2 reads no text"),
    ({"kind": "l2", "tokens": 5}, {}, "penalty.tokens is 5; it must be left out: l2"),
    ({"kind": "l2", "strength": -1.0}, {}, "penalty.strength is -1.0; it must be 0 or more"),
    ({"kind": "l2", "strength": float("nan")}, {}, "penalty.strength is nan"),
    ({"kind": "ewc"}, {}, "penalty.text is missing"),
    ({**TEXT, "tokens": 0}, {}, "penalty.tokens is 0"),
    (TEXT, {"objective": "reward"}, "penalty.kind is ewc; it must be l2"),
    (TEXT, {"fused_backward": True, "accumulation_steps": 1, "optimizer": OptimizerConfig(max_grad_norm=None)},
     "fused_backward is True; it must be false with penalty"),
    ({}, {"freeze_layers": 1, "method": "last_layers"}, "freeze_layers is set but method is last_layers"),
    ({}, {"freeze_layers": 0}, "freeze_layers is 0; it must be above 0"),
    ({}, {"freeze_layers": 1, "lora": LoRAOptions(modules_to_save="norm")}, "lora.modules_to_save is norm"),
    ({}, {"rehearsal_share": 0.1}, "rehearsal_share is 0.1; it must be left out without rehearsal"),
    ({}, {"rehearsal": "x.jsonl", "rehearsal_share": 1.0}, "rehearsal_share is 1.0; it must be above 0 and below 1"),
]  # fmt: skip


@pytest.mark.parametrize("options,changes,said", BAD)
def test_what_would_be_ignored_is_refused(options, changes, said):
    with pytest.raises(ConfigError) as refusal:
        TrainConfig(data="rows.jsonl", penalty=PenaltyOptions(**options), **changes)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_bad_texts_and_dora_are_refused_before_the_folder_is_made(make_config, general, tmp_path):
    short = dataclasses.replace(ewc(general, 1.0), tokens=10**6)
    for options, more, error, said in (
        (short, {}, DataError, "general.jsonl has [0-9,]+ tokens of general text, not the 1,000,000 of penalty.tokens"),
        (ewc(str(tmp_path / "none.txt"), 1.0), {}, DataError, "none.txt"),
        (PenaltyOptions("l2"), {"lora": LoRAOptions(dora=True)}, ConfigError, "a DoRA adapter"),
    ):
        with pytest.raises(error, match=said):
            train(make_config(penalty=options, **more))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["ewc", "l2"])
@pytest.mark.parametrize("options", [
    {"method": "full"}, {"method": "last_layers", "last_layers": 1}, {"method": "lora"}, {"method": "qlora"},
    {"method": "lora", "lora": LoRAOptions(init="pissa")},
])  # fmt: skip
def test_the_ledger_counts_what_a_penalty_keeps(tiny_model, options, kind):
    """The tensors of a penalty as training makes it: starts, and F in bf16."""
    config = TrainConfig(data="x", **options).resolved()
    quantize = config.quantization.config() if config.method == "qlora" else None
    model = load_model(tiny_model, dtype=torch.float32, quantize=quantize)
    parameters = choose_parameters(model, config)
    fisher = {n: torch.ones(w.shape, dtype=torch.bfloat16) for n, w in held_weights(model, parameters).items()}
    made = Penalty(model, parameters, 1.0, fisher if kind == "ewc" else None)
    kept = [part.fisher for part in made.parts if part.fisher is not None]
    for part in made.parts:
        kept += list(part.start) if isinstance(part.start, tuple) else [] if part.start is None else [part.start]
    known = {"lora": config.lora.adapter()} if "lora" in config.method else {"last_layers": 1}
    counted = ledger(model.config, config.method, 1, 8, dtype=torch.float32, penalty=kind, **known)
    assert counted.penalty == sum(tensor.nbytes for tensor in kept)
    assert (
        counted.held - ledger(model.config, config.method, 1, 8, dtype=torch.float32, **known).held == counted.penalty
    )
