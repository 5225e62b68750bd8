"""SGD, 8-bit AdamW and updates in the backward pass: by independent implementations, through the loop, and resumed."""

import os
import signal
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from minitune.checkpoint.load import load_model
from minitune.cli import parse
from minitune.data.batching import collate
from minitune.errors import ConfigError, TrainingError
from minitune.ops import adamw8bit
from minitune.reporting import report
from minitune.reporting.journal import Journal, read_metrics
from minitune.safetensors_io import read_tensors
from minitune.training import loop, optimizer, state
from minitune.training.config import LoRAOptions, OptimizerConfig, ScheduleConfig, TrainConfig
from minitune.training.objectives import supervised
from minitune.training.optimizer import Optimizer
from minitune.training.run import choose_parameters, train
from tests.ops.test_adamw8bit import nearest
from tests.training.conftest import in_child, outcome, resumed, wait
from tests.training.test_loop import examples
from tests.training.test_resume import before_call

RATE, BETAS = 0.05, (0.9, 0.99)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps(optimizer, gradients, weight=1, rate=RATE):
    """Update with each dictionary of summed gradients."""
    for each in gradients:
        for name, gradient in each.items():
            optimizer.parameters[name].grad = gradient.clone()
        optimizer.clip(optimizer.average(weight))
        optimizer.step(rate)


# SGD: w - a (g + d w) is torch's rule, in which decay is a part of the gradient; without momentum the two are one.


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_that_of_torch(decay):
    ours = {"w": nn.Parameter(draw(40, 7)), "norm": nn.Parameter(draw(9, seed=1))}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    gradients = [{"w": draw(40, 7, seed=10 + i) * 5, "norm": draw(9, seed=20 + i)} for i in range(5)]
    config = OptimizerConfig("sgd", RATE, weight_decay=decay, max_grad_norm=0.5)
    steps(Optimizer(ours, config), gradients, weight=3)
    judge = torch.optim.SGD([{"params": [theirs["w"]], "weight_decay": decay}, {"params": [theirs["norm"]]}], lr=RATE)
    for each in gradients:
        for name, gradient in each.items():
            theirs[name].grad = gradient / 3
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        judge.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)
    assert (theirs["w"] - draw(40, 7)).abs().max() > 5e-3


def test_sgd_has_no_state_and_small_steps_in_bf16_are_not_lost():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4000, 1, dtype=torch.bfloat16))
    sgd = Optimizer({"w": weight}, OptimizerConfig("sgd", 1e-4, max_grad_norm=None))
    steps(sgd, [{"w": torch.full((4000, 1), 2.0, dtype=torch.bfloat16)}] * 100, weight=2, rate=1e-4)
    assert weight.float().mean().item() == pytest.approx(0.99, abs=5e-4)  # 1 - 1e-4 rounds to 1 in bf16
    assert sgd.state().keys() == {"step"} and sgd.steps == 100


def test_options_that_sgd_ignores_are_refused_and_a_rate_is_needed():
    for options in ({"betas": BETAS}, {"eps": 1e-8}):
        with pytest.raises(ConfigError, match=f"optimizer.{next(iter(options))} is .*left out: sgd has no moments"):
            OptimizerConfig("sgd", 0.1, **options)
    with pytest.raises(ConfigError, match="optimizer.learning_rate is missing; sgd needs one of its own"):
        TrainConfig(data="x", optimizer=OptimizerConfig("sgd")).resolved()
    assert TrainConfig(data="x", optimizer=OptimizerConfig("sgd", 0.1)).resolved().optimizer.betas is None
    resolved = TrainConfig(data="x", optimizer=OptimizerConfig("adamw8bit")).resolved().optimizer
    assert (resolved.betas, resolved.eps, resolved.learning_rate) == ((0.9, 0.999), 1e-8, 5e-4)


# 8-bit AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_moments_are_in_8_bits(dtype):
    shapes = {"model.layers.0.q.weight": (64, 64), "lm_head.weight": (128, 64), "norm.weight": (64,), "a": (64, 63),
              "model.embed_tokens.weight": (260, 64), "model.layers.0.q_proj.lora.A": (16, 576)}  # fmt: skip
    parameters = {name: nn.Parameter(draw(*shape, dtype=dtype)) for name, shape in shapes.items()}
    state = Optimizer(parameters, OptimizerConfig("adamw8bit")).state()
    eight = {name for name in shapes if state[f"{name}.exp_avg"].dtype == torch.uint8}
    assert eight == {"model.layers.0.q.weight", "lm_head.weight", "model.layers.0.q_proj.lora.A"}
    for name, parameter in parameters.items():
        for field in ("exp_avg", "exp_avg_sq"):
            assert state[f"{name}.{field}"].shape == parameter.shape
            if name in eight:
                absmax = state[f"{name}.{field}_absmax"]
                assert absmax.dtype == torch.float32 and absmax.numel() == -(-parameter.numel() // 256)
            else:
                assert state[f"{name}.{field}"].dtype == torch.float32
                assert f"{name}.{field}_absmax" not in state


def test_adamw8bit_is_that_of_bitsandbytes(monkeypatch):
    """Bit for bit, with the encoder of its CPU library replaced by the definition; small tensors to an ulp or two."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.optim import AdamW8bit

    def encode(x, values, absmax, codes, block):
        for target, value in zip((codes, absmax), nearest(x.flatten(), bool(values[0] < 0), block), strict=True):
            target.view(-1).copy_(value)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", encode)
    monkeypatch.setattr(adamw8bit, "LOWEST", 0)
    ours = {"w": nn.Parameter(draw(70, 64)), "small": nn.Parameter(draw(8, 8, seed=1))}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    gradients = [{"w": draw(70, 64, seed=10 + i), "small": draw(8, 8, seed=20 + i)} for i in range(6)]
    config = OptimizerConfig("adamw8bit", RATE, BETAS, 1e-6, weight_decay=0.1, max_grad_norm=None)
    steps(Optimizer(ours, config), gradients, weight=4)  # a power of two: the division is exact
    judge = AdamW8bit(theirs.values(), lr=RATE, betas=BETAS, eps=1e-6, weight_decay=0.1, min_8bit_size=4096)
    for each in gradients:
        for name, gradient in each.items():
            theirs[name].grad = gradient / 4
        judge.step()
    assert judge.state[theirs["w"]]["state1"].dtype == torch.uint8
    assert judge.state[theirs["small"]]["state1"].dtype == torch.float32
    assert torch.equal(ours["w"], theirs["w"])
    torch.testing.assert_close(ours["small"], theirs["small"], rtol=3e-6, atol=1e-7)


@pytest.fixture(scope="module")
def model_folder(tiny_folder, tmp_path_factory):
    """A model whose matrices are large enough for 8-bit moments."""
    return tiny_folder(tmp_path_factory.mktemp("model") / "model", hidden_size=64, intermediate_size=128,
                       initializer_range=0.1)  # fmt: skip


def batches(count, seed=0):
    """Micro-batches of ragged rows, packed and not."""
    made = []
    for number in range(count):
        a, b, c, d = examples([5 + (7 * number + 11 * i) % 30 for i in range(4)], seed=seed + number)
        made.append(collate([[a, b], [c], [d]], 0))
    return made


def fit(folder, where, given, options, *, dtype=torch.float32, method="full", prepare=lambda model: None, **changes):
    """Train through the loop on the batches given; returns the model, the optimiser and the losses."""
    lora = LoRAOptions(rank=4) if method == "lora" else LoRAOptions()
    config = TrainConfig(data="x", method=method, lora=lora, max_steps=len(given), accumulation_steps=1,
                         optimizer=options, schedule=ScheduleConfig(warmup=0.1), **changes).resolved()  # fmt: skip
    model = load_model(folder, dtype=dtype)
    model.gradient_checkpointing = config.gradient_checkpointing
    torch.manual_seed(1)
    parameters = choose_parameters(model, config)
    prepare(model)
    update = Optimizer(parameters, config.optimizer, fused_backward=config.fused_backward)
    with Journal(where, len(given)) as journal:
        loop.fit(loop.Job(
            config=config, model=model, parameters=parameters, optimizer=update, objective=supervised,
            stream=lambda start: given[start:], total_batches=len(given), validation=None, sample=list,
            checkpoints=where / "checkpoints", fingerprint={}, progress=state.Progress(), journal=journal,
        ))  # fmt: skip
    return model, update, [line for line in read_metrics(where) if "loss" in line]


def test_a_hundred_steps_in_8_bits_learn_what_adamw_learns(model_folder, tmp_path):
    given, ends = batches(10) * 10, {}
    for kind in ("adamw", "adamw8bit", "sgd"):
        options = OptimizerConfig(kind, 2e-3)
        _, _, lines = fit(model_folder, tmp_path / kind, given, options)
        ends[kind] = sum(line["loss"] for line in lines[-10:]) / 10
        first = sum(line["loss"] for line in lines[:10]) / 10
    assert ends["adamw"] < 0.5 * first, "there was something to learn"
    assert ends["adamw8bit"] == pytest.approx(ends["adamw"], rel=0.03)
    assert ends["sgd"] > 1.3 * ends["adamw"], "another rule ends elsewhere"


def in_a_run(make_config, model_folder, name="run", **changes):
    plain = {"method": "full", "lora": LoRAOptions(), "model": str(model_folder)}
    return make_config(name, **{**plain, **changes})


ONE = {"accumulation_steps": 1, "fused_backward": True}
RUNS = {
    "adamw8bit in bf16": {"optimizer": OptimizerConfig("adamw8bit", 1e-3), "dtype": "bfloat16"},
    "adamw8bit, adapters": {"optimizer": OptimizerConfig("adamw8bit", 1e-3), "method": "lora",
                            "lora": LoRAOptions(rank=64, dropout=0.1)},
    "sgd in bf16": {"optimizer": OptimizerConfig("sgd", 0.05), "dtype": "bfloat16"},
    "fused, adamw in bf16": {"optimizer": OptimizerConfig("adamw", 1e-3, max_grad_norm=None), "dtype": "bfloat16",
                             **ONE},
    "fused, adamw8bit": {"optimizer": OptimizerConfig("adamw8bit", 1e-3, max_grad_norm=None), **ONE},
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(make_config, model_folder, monkeypatch, kind):
    monkeypatch.setattr(report, "plot_losses", lambda *_: False)
    straight = train(in_a_run(make_config, model_folder, "straight", **RUNS[kind])).folder
    expected = outcome(straight)
    config = in_a_run(make_config, model_folder, **RUNS[kind])
    stop = before_call(loop, "_accumulate", 9, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert wait(in_child(config, stop)) == 143
    assert outcome(train(resumed(config)).folder) == expected
    saved = read_tensors(straight / "checkpoints" / "step-0000012" / "optimizer.safetensors")
    codes = [name for name, tensor in saved.items() if tensor.dtype == torch.uint8]
    assert bool(codes) == ("8bit" in kind)
    assert len(saved) == 1 or "sgd" not in kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "sgd"])
def test_state_goes_round_bit_for_bit(kind, dtype):
    def fresh():
        parameters = {"w": nn.Parameter(draw(70, 64, dtype=dtype)), "b": nn.Parameter(draw(9, dtype=dtype))}
        return Optimizer(parameters, OptimizerConfig(kind, RATE, max_grad_norm=None))

    gradients = [{"w": draw(70, 64, seed=i, dtype=dtype), "b": draw(9, seed=i, dtype=dtype)} for i in range(6)]
    one, two = fresh(), fresh()
    torch.manual_seed(7)
    steps(one, gradients[:3])
    with torch.no_grad():
        for name, parameter in one.parameters.items():
            two.parameters[name].copy_(parameter)
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    for each in (one, two):
        torch.manual_seed(8)
        steps(each, gradients[3:])
    assert all(torch.equal(p, two.parameters[name]) for name, p in one.parameters.items())
    assert one.state().keys() == two.state().keys()
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    with pytest.raises(KeyError) if kind != "sgd" else pytest.raises(KeyError, match="step"):
        two.load({})


# Paged moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_paged_moments_give_the_same_bits(kind, dtype, monkeypatch):
    """Also over the borders of slices; the moments that are kept are those that were updated, in place."""
    monkeypatch.setattr(optimizer, "SLICE", 1000)
    made = {}
    for paged in (False, True):
        parameters = {"w": nn.Parameter(draw(70, 64, dtype=dtype)), "b": nn.Parameter(draw(9, dtype=dtype))}
        one = made[paged] = Optimizer(parameters, OptimizerConfig(kind, RATE, max_grad_norm=None, paged=paged))
        places = {name: tensor.data_ptr() for name, tensor in one.state().items() if name != "step"}
        torch.manual_seed(7)
        steps(one, [{"w": draw(70, 64, seed=i, dtype=dtype), "b": draw(9, seed=i, dtype=dtype)} for i in range(4)])
        assert places == {name: tensor.data_ptr() for name, tensor in one.state().items() if name != "step"}
    assert all(torch.equal(p, made[False].parameters[name]) for name, p in made[True].parameters.items())
    assert all(torch.equal(tensor, made[False].state()[name]) for name, tensor in made[True].state().items())


def test_moments_that_do_not_come_back_are_noticed(monkeypatch):
    """The mutant: what was fetched is updated, and dropped."""

    @contextmanager
    def forgetful(self, name):
        kept = self.moments[name]
        yield {field: tensor.clone() for field, tensor in kept.items()} if self.config.paged else kept

    monkeypatch.setattr(Optimizer, "_fetched", forgetful)
    with pytest.raises(AssertionError):
        test_paged_moments_give_the_same_bits("adamw8bit", torch.float32, monkeypatch)


def test_one_parameters_moments_are_fetched_at_a_time(monkeypatch):
    there, most, right = [], [], Optimizer._fetched

    @contextmanager
    def watched(self, name):
        with right(self, name) as moments:
            there.append(name)
            most.append(len(there))
            assert all(tensor is not self.moments[name][field] for field, tensor in moments.items())
            yield moments
            there.remove(name)

    monkeypatch.setattr(Optimizer, "_fetched", watched)
    parameters = {f"w{i}": nn.Parameter(draw(70, 64, seed=i)) for i in range(3)}
    one = Optimizer(parameters, OptimizerConfig("adamw", RATE, max_grad_norm=None, paged=True))
    steps(one, [{name: draw(70, 64, seed=9) for name in parameters}])
    assert most == [1, 1, 1]


def test_moments_are_paged_as_they_are_made(monkeypatch):
    """Else all of them would lie on the GPU first."""
    made, right = [], Optimizer._zero_moments

    def watched(self, name, parameter):
        assert not any(tensor() is not None for tensor in made)
        moments = right(self, name, parameter)
        made.extend(weakref.ref(tensor) for tensor in moments.values())
        return moments

    monkeypatch.setattr(Optimizer, "_zero_moments", watched)
    Optimizer({f"w{i}": nn.Parameter(draw(70, 64)) for i in range(3)}, OptimizerConfig("adamw8bit", RATE, paged=True))
    assert len(made) == 12


def test_paged_moments_are_refused_where_there_are_none_to_page(make_config, model_folder):
    with pytest.raises(ConfigError, match="optimizer.paged is True.*sgd has no moments"):
        OptimizerConfig("sgd", RATE, paged=True)
    config = make_config(model=str(model_folder), device="cpu", optimizer=OptimizerConfig(paged=True))
    with pytest.raises(ConfigError, match="on a CPU they are there already, leave it out"):
        train(config)
    assert not Path(config.output).exists()


# Updates in the backward pass


def rounded_to_nearest(value, noise, place):
    """In place of stochastic rounding: which random numbers a parameter gets depends on the order of updates."""
    place.copy_(value)


FUSED = [("adamw", torch.float32, "full"), ("sgd", torch.float32, "full"), ("adamw8bit", torch.float32, "full"),
         ("adamw", torch.bfloat16, "full"), ("sgd", torch.bfloat16, "full"), ("adamw8bit", torch.bfloat16, "full"),
         ("adamw", torch.float32, "lora")]  # fmt: skip


@pytest.mark.parametrize("kind,dtype,method", FUSED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_in_the_backward_pass_are_those_after_it(
    model_folder, tmp_path, monkeypatch, kind, dtype, method, checkpointing
):
    monkeypatch.setattr(optimizer, "round_stochastically", rounded_to_nearest)
    monkeypatch.setattr(adamw8bit, "round_stochastically", rounded_to_nearest)
    monkeypatch.setattr(optimizer, "SLICE", 1000)  # so that each matrix has several slices, and a short one
    options = OptimizerConfig(kind, 5e-3, weight_decay=0.1, max_grad_norm=None)
    ends = [
        fit(model_folder, tmp_path / str(fused), batches(6), options, dtype=dtype, method=method,
            gradient_checkpointing=checkpointing, fused_backward=fused)
        for fused in (False, True)
    ]  # fmt: skip
    (ours, our_update, our_lines), (theirs, their_update, their_lines) = ends
    start = load_model(model_folder, dtype=dtype)
    changed = [name for name, p in start.named_parameters() if not torch.equal(p, ours.get_parameter(name))]
    assert len(changed) >= (16 if method == "full" else 0), "sgd in bf16, rounded to nearest, leaves norms as they are"
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
        assert parameter.grad is None and theirs.get_parameter(name).grad is None
    first, second = our_update.state(), their_update.state()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert int(second["step"]) == 6
    assert [line["loss"] for line in our_lines] == [line["loss"] for line in their_lines]
    assert [line["grad_norm"] for line in their_lines] == pytest.approx([line["grad_norm"] for line in our_lines], 1e-5)


def test_a_scale_of_the_gradient_forgotten_is_noticed(model_folder, tmp_path, monkeypatch):
    """The mutant of the test above: the fused update uses the sum instead of the mean."""
    original = Optimizer.begin
    options = OptimizerConfig("sgd", 1e-3, max_grad_norm=None)
    right = fit(model_folder, tmp_path / "right", batches(2), options, fused_backward=True)[0]
    monkeypatch.setattr(Optimizer, "begin", lambda self, weight, rate: original(self, 1, rate))
    wrong = fit(model_folder, tmp_path / "wrong", batches(2), options, fused_backward=True)[0]
    assert not torch.equal(right.head_weight, wrong.head_weight)


class Live:
    """Watches gradients: how many, and how many bytes of storage, exist each time that another one is whole."""

    def __init__(self):
        self.references, self.counts, self.bytes = [], [], []

    def watch(self, model):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._seen)

    def _seen(self, parameter):
        self.references.append(weakref.ref(parameter.grad))
        alive = [gradient for gradient in (reference() for reference in self.references) if gradient is not None]
        self.counts.append(len(alive))
        storages = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in alive}
        self.bytes.append(sum(storages.values()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_dropped_as_they_are_used(model_folder, tmp_path, checkpointing):
    peaks, options = {}, OptimizerConfig("sgd", 1e-3, max_grad_norm=None)
    for fused in (False, True):
        live = Live()
        model, _, _ = fit(model_folder, tmp_path / str(fused), batches(1), options, prepare=live.watch,
                          fused_backward=fused, gradient_checkpointing=checkpointing)  # fmt: skip
        assert len(live.counts) == 20, "each parameter's gradient becomes whole once"
        peaks[fused] = max(live.counts), max(live.bytes)
    sizes = sorted((p.nbytes for p in model.parameters()), reverse=True)
    assert peaks[False] == (20, sum(sizes))
    assert peaks[True][0] == 1
    assert peaks[True][1] <= sizes[0], "never more than the largest one, that of the embedding, or of a group"


def test_each_parameter_is_updated_once_also_the_tied_embedding(model_folder, tmp_path, monkeypatch):
    seen, original = [], Optimizer._step_one
    monkeypatch.setattr(
        Optimizer, "_step_one", lambda self, name, *rest: seen.append(name) or original(self, name, *rest)
    )
    model, _, _ = fit(model_folder, tmp_path, batches(1), OptimizerConfig("adamw", 1e-3, max_grad_norm=None),
                      fused_backward=True)  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    assert model.lm_head is None and sorted(seen) == sorted(names)
    assert seen[-1] == "model.embed_tokens.weight", "its gradient is whole only when the first layer is done"


def test_a_backward_pass_after_the_step_updates_nothing():
    weight = nn.Parameter(torch.ones(2, 2))
    config = OptimizerConfig("sgd", 0.5, max_grad_norm=None)
    optimizer = Optimizer({"weight": weight}, config, fused_backward=True)
    for expected in (0.5, 0.0):  # 1 - 0.5 x 1, and once more
        optimizer.begin(1, 0.5)
        weight.sum().backward()
        optimizer.step(0.5)
        assert torch.equal(weight, torch.full((2, 2), expected))
    weight.sum().backward()
    assert torch.equal(weight, torch.zeros(2, 2)) and torch.equal(weight.grad, torch.ones(2, 2))


BAD = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_the_run_by_name(model_folder, tmp_path, dtype, value):
    kept = {}

    def prepare(model):
        kept["model"] = model
        kept["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.get_parameter(BAD).register_hook(lambda gradient: gradient * value)

    options = OptimizerConfig("adamw", 1e-2, max_grad_norm=None)
    with pytest.raises(
        TrainingError, match=f"step 1: the gradient norm is (nan|inf); first bad tensor: gradient of {BAD}"
    ):
        fit(model_folder, tmp_path, batches(3), options, dtype=dtype, prepare=prepare, fused_backward=True)
    now, before = dict(kept["model"].named_parameters()), kept["before"]
    assert torch.equal(now[BAD], before[BAD])
    untouched = {name for name in now if torch.equal(now[name], before[name])}
    assert {name for name in now if "layers.0.self_attn" in name} | {"model.embed_tokens.weight"} <= untouched
    assert not list((tmp_path / "checkpoints").glob("*")), "and nothing is saved"


def test_what_does_not_go_with_fused_backward_is_refused():
    free = OptimizerConfig(max_grad_norm=None)
    with pytest.raises(ConfigError, match="accumulation_steps is 4; it must be 1 with fused_backward"):
        TrainConfig(data="x", optimizer=free, fused_backward=True)
    with pytest.raises(ConfigError, match=r"optimizer.max_grad_norm is 1.0; it must be null with fused_backward"):
        TrainConfig(data="x", accumulation_steps=1, fused_backward=True)
    assert TrainConfig(data="x", optimizer=free, accumulation_steps=1, fused_backward=True).resolved()


# What a user types


def given(*argv):
    return parse(TrainConfig, ["--data", "x", *argv], prog="x", description="d")


@pytest.mark.parametrize(
    "argv,expected",
    [
        (["--optimizer", "adamw8bit"], OptimizerConfig("adamw8bit")),
        (["--optimizer=sgd", "--optimizer.learning_rate", "0.1"], OptimizerConfig("sgd", 0.1)),
        (["--optimizer.learning_rate", "0.1", "--optimizer", "sgd"], OptimizerConfig("sgd", 0.1)),
        (["--optimizer", '{"kind": "sgd", "learning_rate": 0.1}'], OptimizerConfig("sgd", 0.1)),
        (['--optimizer={"kind": "adamw8bit"}'], OptimizerConfig("adamw8bit")),
        (["--optimizer.kind", "adamw8bit"], OptimizerConfig("adamw8bit")),
        (["--optimizer", "adamw"], OptimizerConfig()),
    ],
)
def test_a_kind_of_optimizer_has_a_short_form(argv, expected):
    assert given(*argv).optimizer == expected


def test_so_have_other_parts_that_have_kinds(tmp_path):
    assert given("--schedule", "linear").schedule == ScheduleConfig("linear")
    assert given("--schedule=wsd", "--schedule.decay", "0.5").schedule == ScheduleConfig("wsd", decay=0.5)
    assert given("--method", "qlora", "--quantization", "fp4").quantization.kind == "fp4"
    assert given("--fused-backward", "--accumulation-steps", "1", "--optimizer.max_grad_norm", "null").fused_backward
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: {kind: sgd, learning_rate: 0.1}\n")
    assert given("--config", str(recipe)).optimizer == OptimizerConfig("sgd", 0.1)
    assert given("--config", str(recipe), "--optimizer", "adamw").optimizer == OptimizerConfig("adamw", 0.1)


@pytest.mark.parametrize(
    "argv,words",
    [
        (
            ["--optimizer", "adamw8bti"],
            r"optimizer.kind: expected one of \['adamw', 'adamw8bit', 'sgd'\], got 'adamw8bti'",
        ),
        (["--optimizer=lion"], r"optimizer.kind: expected one of \['adamw', 'adamw8bit', 'sgd'\], got 'lion'"),
        (["--schedule", "cosin"], r"schedule.kind: expected one of .*'cosine'.*, got 'cosin'"),
        (["--optimzer", "sgd"], "unknown option 'optimzer'; did you mean 'optimizer'"),
        (["--optimizer"], "its value is missing"),
        (["--optimizer", '{"kind": "sgd", "rate": 1}'], "unknown option 'optimizer.rate'"),
    ],
)
def test_nonsense_gets_one_line_with_what_there_is(argv, words):
    with pytest.raises(ConfigError, match=words) as caught:
        given(*argv)
    assert "\n" not in str(caught.value)
