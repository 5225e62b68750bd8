"""The loop's arithmetic against transformers, its invariances, the mutants it must catch, and when it stops."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minitune.checkpoint.load import load_model
from minitune.data.batching import Batch, collate
from minitune.data.examples import Example
from minitune.errors import TrainingError
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.reporting.journal import Journal, read_metrics
from minitune.training import loop, state
from minitune.training.config import EvaluationConfig, LoRAOptions, OptimizerConfig, ScheduleConfig, TrainConfig
from minitune.training.evaluate import validation_loss
from minitune.training.objectives import supervised
from minitune.training.optimizer import Optimizer
from minitune.training.run import choose_parameters, train

BAR = 1e-6  # relative


def examples(lengths, seed=0):
    """Random documents; about half of their tokens are targets, the number differing from row to row."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length,), generator=draw).tolist()
        start = 1 + int(torch.randint(0, length - 1, (1,), generator=draw))
        made.append(Example(tuple(ids), tuple(i >= start for i in range(length)), f"row {number}"))
    return made


RAGGED = examples([3, 40, 7, 25, 60, 5, 18, 33])


class Recorder(Optimizer):
    """Keeps the averaged gradients of each step."""

    def step(self, learning_rate):
        self.seen = {name: p.grad.clone() for name, p in self.parameters.items()}
        super().step(learning_rate)


def window_gradient(folder, tmp_path, batches, objective=supervised, method="full"):
    """The gradient of one optimiser step over `batches`, through the loop."""
    model = load_model(folder, dtype=torch.float32)
    lora = LoRAOptions(rank=4) if method == "lora" else LoRAOptions()
    config = TrainConfig(
        data="x", method=method, lora=lora, accumulation_steps=len(batches), max_steps=1,
        optimizer=OptimizerConfig(max_grad_norm=None),
    ).resolved()  # fmt: skip
    parameters = choose_parameters(model, config)
    if method == "lora":
        for index, (name, parameter) in enumerate(parameters.items()):  # B is zero at first, and A's gradient with it
            if name.endswith("B"):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    optimizer = Recorder(parameters, config.optimizer)
    progress = state.Progress()
    with Journal(tmp_path, 1) as journal:
        job = loop.Job(
            config=config, model=model, parameters=parameters, optimizer=optimizer, objective=objective,
            stream=lambda start: batches[start:], total_batches=len(batches), validation=None, sample=list,
            checkpoints=tmp_path / "checkpoints", fingerprint={}, progress=progress, journal=journal,
        )  # fmt: skip
        assert loop.fit(job) == "finished"
    return optimizer.seen


def relative(ours, theirs):
    difference = math.sqrt(sum(float((ours[n] - theirs[n]).double().square().sum()) for n in theirs))
    return difference / math.sqrt(sum(float(theirs[n].double().square().sum()) for n in theirs))


def one_by_eight():
    return [collate([[example]], 259) for example in RAGGED]


def eight_by_one():
    return [collate([[example] for example in RAGGED], 259)]


def transformers_gradient(folder):
    """The same by transformers: summed cross-entropy over all targets, divided by their number, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    count = 0
    for example in RAGGED:
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor([i if t else -100 for i, t in zip(example.ids, example.targets, strict=True)][1:])
        F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).backward()
        count += int((labels >= 0).sum())
    return {name: parameter.grad / count for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def judge(tiny_model):
    return transformers_gradient(tiny_model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_eight_rows_once_equal_one_row_eight_times(tiny_model, tmp_path, method):
    together = window_gradient(tiny_model, tmp_path / "a", eight_by_one(), method=method)
    apart = window_gradient(tiny_model, tmp_path / "b", one_by_eight(), method=method)
    assert relative(apart, together) < BAR
    packed = [collate([RAGGED[:3], RAGGED[3:5]], 259), collate([RAGGED[5:]], 259)]
    assert relative(window_gradient(tiny_model, tmp_path / "c", packed, method=method), together) < BAR


def test_the_gradient_is_that_of_transformers(tiny_model, tmp_path, judge):
    ours = window_gradient(tiny_model, tmp_path, one_by_eight())
    assert set(ours) == set(judge)
    assert relative(ours, judge) < 1e-5


def mean_per_micro_batch(model, batch):
    loss_sum, weight, metrics = supervised(model, batch)
    return loss_sum / weight, 1, metrics


def on_other_targets(change):
    def objective(model, batch):
        changed = Batch(batch.ids, change(batch), batch.positions, batch.target_count, batch.document_count)
        return supervised(model, changed)

    return objective


def labels_shifted(batch):
    return torch.where(batch.targets >= 0, batch.ids, -100)  # predicts the token itself, not the next


def mask_off_by_one(batch):
    following = torch.cat([batch.ids[:, 1:], torch.full_like(batch.ids[:, :1], -100)], dim=1)
    learned = torch.cat([batch.targets[:, 1:] >= 0, batch.targets[:, :1] > 1000], dim=1)
    return torch.where(learned, following, -100)  # leaves out the first target


MUTANTS = {
    "1/accumulation dropped": mean_per_micro_batch,
    "labels shifted": on_other_targets(labels_shifted),
    "mask off by one": on_other_targets(mask_off_by_one),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(tiny_model, tmp_path, judge, mutant):
    assert relative(window_gradient(tiny_model, tmp_path, one_by_eight(), MUTANTS[mutant]), judge) > 1e-2


def test_the_mean_of_means_is_caught_by_comparing_8x1_with_1x8(tiny_model, tmp_path):
    together = window_gradient(tiny_model, tmp_path / "a", eight_by_one(), mean_per_micro_batch)
    apart = window_gradient(tiny_model, tmp_path / "b", one_by_eight(), mean_per_micro_batch)
    assert relative(apart, together) > 1e-2


def test_the_last_window_of_a_run_may_be_short(make_config):
    folder = train(make_config(max_steps=None, epochs=1.0, packing=False, batch_size=3, accumulation_steps=4)).folder
    steps = [line for line in read_metrics(folder) if "loss" in line]
    data = json.loads((folder / "data.json").read_text())
    batches = math.ceil(data[0]["training_examples"] / 3)
    assert batches % 4, "the case this test is for"
    assert len(steps) == math.ceil(batches / 4)
    assert steps[-1]["target_tokens"] == data[0]["target_tokens"], "every target once in an epoch"


def test_validation_loss_does_not_depend_on_batching_and_draws_nothing(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32)
    before = torch.get_rng_state()
    losses = [
        validation_loss(model, batches, supervised, lambda: False)[0]
        for batches in (one_by_eight(), eight_by_one(), [collate([RAGGED[:5]], 259), collate([RAGGED[5:]], 259)])
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert torch.equal(before, torch.get_rng_state())


def test_validation_is_without_dropout(tiny_model):
    losses = []
    for dropout in (0.0, 0.5):
        model = load_model(tiny_model, dtype=torch.float32)
        for lora in add_lora(model, LoRAConfig(rank=4, dropout=dropout)).values():
            torch.nn.init.normal_(lora.B, std=0.5, generator=torch.Generator().manual_seed(1))
        model.train()
        losses.append(validation_loss(model, eight_by_one(), supervised, lambda: False))
        assert model.training, "and training goes on with it"
    assert losses[0] == losses[1]


def test_more_evaluations_do_not_change_the_run(make_config, straight):
    often = EvaluationConfig(every_steps=1, samples=2, sample_tokens=4)
    folder = train(make_config(evaluation=often)).folder
    losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    assert losses == [line["loss"] for line in straight["metrics"] if "loss" in line]


def fails(config):
    with pytest.raises(TrainingError) as caught:
        train(config)
    return str(caught.value)


def test_a_nan_weight_stops_the_run_by_name(make_config, monkeypatch):
    from minitune.training import run

    original = run.choose_parameters

    def poisoned(model, *options):
        parameters = original(model, *options)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        return parameters

    monkeypatch.setattr(run, "choose_parameters", poisoned)
    config = make_config(validation_fraction=0.0, evaluation=EvaluationConfig())
    message = fails(config)
    assert "step 1: the loss is nan" in message and "model.layers.1.mlp.up_proj.weight" in message


def broken_at(call, where):
    """An objective that goes wrong at its `call`-th micro-batch: in the loss, or in the gradient alone."""
    calls = [0]

    def objective(model, batch):
        loss_sum, weight, metrics = supervised(model, batch)
        calls[0] += model.training
        if calls[0] == call and model.training and where == "loss":
            loss_sum = loss_sum * float("inf")
        if calls[0] == call and model.training and where == "gradient":
            loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return loss_sum, weight, metrics

    return objective


@pytest.mark.parametrize("where,what", [("loss", "the loss is inf"), ("gradient", "the gradient norm is")])
def test_not_finite_names_step_and_tensor_and_keeps_the_checkpoint(make_config, monkeypatch, where, what):
    from minitune.training import run

    monkeypatch.setattr(run, "supervised", broken_at(11, where))
    config = make_config()
    message = fails(config)
    assert f"step 6: {what}" in message and "step-0000003" in message and "\n" not in message
    if where == "gradient":
        assert "gradient of model.layers.1.mlp.down_proj.lora" in message
    folder, _ = state.latest_checkpoint(Path(config.output) / "checkpoints", pytest.fail)
    assert folder.name == "step-0000003"


def test_a_bad_activation_is_found_where_it_arises(tiny_model):
    from minitune.reporting.watch import bad_activation

    model = load_model(tiny_model, dtype=torch.float32)
    model.model.layers[1].self_attn.o_proj.weight.data.fill_(1e38)
    assert bad_activation(model, eight_by_one()[0]).startswith("output of model.layers.1.self_attn")


def test_a_diverging_rate_stops_the_run_and_says_so(make_config):
    message = fails(make_config(
        method="full", lora=LoRAOptions(), max_steps=60,
        optimizer=OptimizerConfig(learning_rate=3.0, max_grad_norm=None), schedule=ScheduleConfig(kind="constant"),
    ))  # fmt: skip
    assert "diverged" in message and "optimizer.learning_rate (3)" in message


def overfitted(make_config, capfd, **evaluation):
    """A run that learns its few rows by heart, whose held-out rows it cannot know."""
    return train(make_config(
        method="full", lora=LoRAOptions(), max_steps=40, optimizer=OptimizerConfig(learning_rate=0.01),
        schedule=ScheduleConfig(kind="constant", warmup=0.0),
        evaluation=EvaluationConfig(every_steps=2, samples=1, sample_tokens=2, **evaluation),
    ))  # fmt: skip


def test_overfitting_is_called_out_and_the_best_weights_are_the_result(make_config, capfd):
    from minitune.safetensors_io import read_tensors

    result = overfitted(make_config, capfd)
    assert "over-fitting: since step" in capfd.readouterr().err
    assert "Over-fitting" in (result.folder / "report.md").read_text()
    evaluations = [line for line in read_metrics(result.folder) if "validation_loss" in line]
    best = min(evaluations, key=lambda line: line["validation_loss"])
    assert (result.best_step, result.best_loss) == (best["step"], best["validation_loss"]) and best["step"] < 40
    kept = read_tensors(result.folder / "checkpoints" / f"best-{best['step']:07d}" / "weights.safetensors")
    given = read_tensors(result.folder / "model" / "model.safetensors")
    assert set(kept) == set(given) and all(torch.equal(kept[name], given[name]) for name in kept)


def test_patience_ends_the_run(make_config, capfd):
    result = overfitted(make_config, capfd, patience=3)
    assert result.status == "no improvement" and result.steps == result.best_step + 6 < 40
    assert "evaluation.patience" in capfd.readouterr().err
