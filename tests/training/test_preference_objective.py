"""Every objective against transformers and PEFT, document by document; its invariances; the mutants this catches."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.load import load_model
from minitune.data import batching
from minitune.data.preferences import Pair
from minitune.losses import preference as losses
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.training import preference
from minitune.training.objectives import mean_metrics
from tests.kernels.proof import mutant
from tests.training.preferences import PAD, RAGGED, batch_of, config_of, document, judged, pairs, prepared, trained
from tests.training.test_loop import relative

JUDGED = ((3, 5, 1), (1, 30, 0), (12, 7, 0), (25, 16, 1), (8, 41, 1))


def nll(z):
    """-log s(z), from its definition."""
    return -torch.log(1 / (1 + torch.exp(-z)))


def odds(mean):
    return torch.exp(mean) / (1 - torch.exp(mean))


KTO = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}


def kto(y, z, good):
    gain = 0.3 * (y.r - z)
    return 1.5 * (1 - torch.sigmoid(gain)) if good else 0.5 * (1 - torch.sigmoid(-gain))


# Chosen w and rejected v hold log p, the log-ratio r to the reference and the number of tokens n; z is KTO's baseline.
CASES = {
    "dpo": ("dpo", {"beta": 0.3}, lambda w, v: nll(0.3 * (w.r - v.r))),
    "cdpo+sft": (
        "dpo", {"beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
        lambda w, v: 0.8 * nll(0.3 * (w.r - v.r)) + 0.2 * nll(0.3 * (v.r - w.r)) - 0.5 * w.p / w.n,
    ),
    "dpo-normalized": (
        "dpo", {"beta": 3.0, "length_normalized": True}, lambda w, v: nll(3.0 * (w.r / w.n - v.r / v.n)),
    ),
    "robust": (
        "robust", {"beta": 0.3, "label_smoothing": 0.2},
        lambda w, v: (0.8 * nll(0.3 * (w.r - v.r)) - 0.2 * nll(0.3 * (v.r - w.r))) / 0.6,
    ),
    "ipo": ("ipo", {"beta": 0.2}, lambda w, v: (w.r - v.r - 2.5) ** 2),
    "ipo-normalized": (
        "ipo", {"beta": 0.2, "length_normalized": True}, lambda w, v: (w.r / w.n - v.r / v.n - 2.5) ** 2,
    ),
    "hinge": ("hinge", {"beta": 0.3}, lambda w, v: torch.clamp(1 - 0.3 * (w.r - v.r), min=0)),
    "orpo": (
        "orpo", {"beta": 0.4, "sft_weight": 0.5},
        lambda w, v: 0.4 * nll(torch.log(odds(w.p / w.n) / odds(v.p / v.n))) - 0.5 * w.p / w.n,
    ),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.7}, lambda w, v: nll(2.0 * (w.p / w.n - v.p / v.n) - 0.7)),
    "cpo": ("cpo", {"beta": 0.02}, lambda w, v: nll(0.02 * (w.p - v.p)) - w.p / w.n),
    "kto": ("kto", KTO, kto),
    "kto, z at its floor": ("kto", KTO, lambda y, z, good: kto(y, 0 * z, good)),
}  # fmt: skip


class Answer:
    """What transformers and PEFT make of one document: p () with gradient, r () against the adapter switched off."""

    def __init__(self, model, example):
        ids, start = torch.tensor([example.ids]), len(example.prompt)
        self.n = len(example.ids) - start

        def log_probability():
            steps = F.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].double(), dim=-1)
            return steps.gather(1, ids[0, start:, None]).sum()

        self.p = log_probability()
        with torch.no_grad(), model.disable_adapter():
            reference = log_probability()
        self.r = self.p - reference


def independent(folder, start, items, formula):
    """Return the mean loss and its gradients, named as ours, of all parameters: the base's too, were they trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start).requires_grad_(True)
    if isinstance(items[0], Pair):
        values = [formula(Answer(model, pair.chosen), Answer(model, pair.rejected)) for pair in items]
    else:
        z = torch.stack([Answer(model, item.mismatched).r.detach() for item in items]).mean().clamp(min=0)
        values = [formula(Answer(model, item.example), z, item.desirable) for item in items]
    loss = torch.stack(values).mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default.weight", "")
        gradients[name.replace("lora_A", "lora.A").replace("lora_B", "lora.B")] = parameter.grad
    return loss.item(), gradients


def measured(model, items, objective, collate=batch_of, **layout):
    """Return the mean loss, the gradients of the mean and the metrics of one batch."""
    model.zero_grad(set_to_none=True)
    loss_sum, weight, metrics = objective(model, collate(items, **layout))
    (loss_sum / weight).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss_sum) / weight, gradients, mean_metrics(metrics)


def check(folder, tmp_path, name, module=preference, collate=batch_of, **layout):
    """Compare with the independent computation: loss and all gradients to 1e-5 of their size."""
    kind, options, formula = CASES[name]
    items = judged(JUDGED, seed=0 if "floor" in name else 7) if kind == "kto" else pairs()  # mean log-ratio -0.8, 0.7
    config = config_of(kind, **options)
    model, _ = prepared(folder, config)
    save_adapter(model, tmp_path / "start", str(folder))
    model.requires_grad_(True)
    loss, gradients, _ = measured(model, items, module.preference_objective(kind, config.preference), collate, **layout)
    their_loss, their_gradients = independent(folder, tmp_path / "start", items, formula)
    assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
    assert gradients.keys() == their_gradients.keys()
    assert relative(gradients, their_gradients) < 1e-5


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_against_transformers_and_peft(tiny_model, tmp_path, name, packing):
    pytest.importorskip("peft")
    check(tiny_model, tmp_path, name, packing=packing)


REFERENCE = "with torch.no_grad(), adapter_disabled(model):"
# Prompts cancel in d, so no loss over sums of pairs can tell whether they are counted; those over means can.
MUTANTS = {  # name: (case that catches it, module, what stands there, what a mistake would write)
    "average instead of sum": ("dpo", preference, "-part.sum()", "-part.mean()"),
    "sum instead of average": ("simpo", preference, "means = sums / counts", "means = sums"),
    "reference not detached": ("dpo", preference, REFERENCE, "with adapter_disabled(model):"),
    "reference with adapter": ("dpo", preference, REFERENCE, "with torch.no_grad():"),
    "policy detached": ("cdpo+sft", preference, "ratios = sums -", "ratios = sums.detach() -"),
    "sides swapped": ("dpo", preference, "measured[::2], measured[1::2]", "measured[1::2], measured[::2]"),
    "odds of swapped sides": ("orpo", preference, "means[::2], means[1::2]", "means[1::2], means[::2]"),
    "beta twice in dpo": ("dpo", preference, "dpo_loss(margin, beta", "dpo_loss(beta * margin, beta"),
    "beta twice in hinge": ("hinge", preference, "hinge_loss(margin, beta", "hinge_loss(beta * margin, beta"),
    "beta in ipo's margin": ("ipo", preference, "ipo_loss(margin, beta", "ipo_loss(beta * margin, beta"),
    "no beta in orpo": ("orpo", preference, "beta * losses.odds_ratio_loss(means", "losses.odds_ratio_loss(means"),
    "mean of the losses": ("dpo", preference, "return loss.sum(), len(loss)", "return loss.mean(), len(loss)"),
    "rejected answer learned": ("cpo", preference, "sft_weight * means[::2]", "sft_weight * means[1::2]"),
    "smoothing ignored": ("cdpo+sft", preference, "beta, options.label_smoothing", "beta, 0.0"),
    "labels of kto swapped": ("kto", preference, "ratios, batch.desirable", "ratios, ~batch.desirable"),
    "own answers for kl": ("kto", preference, "batch.mismatched)[0]", "batch)[0]"),
    "no reference for kl": ("kto", preference, "others -= ", "0 * "),
    "z below its floor": ("kto, z at its floor", losses, ".clamp(min=0)", ""),
    "prompt counted": ("dpo-normalized", batching, "token if learned else IGNORED", "token"),
    "labels not shifted": ("dpo", batching, "zip(example.ids[1:]", "zip(example.ids[:-1]"),
    "first target lost": ("dpo", batching, "example.targets[1:], strict", "example.targets[:-1], strict"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(tiny_model, tmp_path, monkeypatch, name):
    pytest.importorskip("peft")
    case, module, old, new = MUTANTS[name]
    other = mutant(module, tmp_path, old, new)
    changed = {"module": other} if module is preference else {}
    if module is losses:
        monkeypatch.setattr(preference, "losses", other)
    if module is batching:
        changed = {"collate": lambda items: other.collate_preferences([[item] for item in items], PAD, packing=False)}
    with pytest.raises(AssertionError):
        check(tiny_model, tmp_path, case, **changed)


UNDECIDED = {
    "dpo": math.log(2), "robust": math.log(2), "ipo": 1 / (4 * 0.1**2), "hinge": 1.0, "kto": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", UNDECIDED)
def test_a_fresh_adapter_is_the_reference_dropout_or_not(tiny_model, kind, packing):
    config = config_of(kind, dropout=0.5)
    model, _ = prepared(tiny_model, config, drawn=0)
    model.train()
    items = judged(JUDGED) if kind == "kto" else pairs()
    objective = preference.preference_objective(kind, config.preference)
    loss, gradients, metrics = measured(model, items, objective, packing=packing)
    assert loss == pytest.approx(UNDECIDED[kind], rel=1e-6)
    zeros = {"chosen_reward", "rejected_reward", "kl"} | ({"margin"} if kind != "kto" else set())
    assert {name: metrics[name] for name in zeros} == pytest.approx(dict.fromkeys(zeros, 0.0), abs=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


@pytest.mark.real
def test_a_fresh_adapter_on_smollm2_is_the_reference(smollm2_path):
    config = config_of("dpo", dropout=0.1)
    model = load_model(smollm2_path, dtype=torch.float32)
    add_lora(model, LoRAConfig(rank=16, dropout=0.1), seed=0)
    model.train()
    objective = preference.preference_objective("dpo", config.preference)
    for packing in (False, True):
        loss, _, metrics = measured(model, pairs(), objective, packing=packing)
        assert loss == pytest.approx(math.log(2), abs=1e-6)
        assert metrics["margin"] == pytest.approx(0, abs=1e-6) and metrics["kl"] == pytest.approx(0, abs=1e-6)


def widened(batch, extra, pad_id):
    """Return the batch with so many columns more of padding on the right, all padding of that id."""
    filler = {"ids": pad_id, "targets": batching.IGNORED, "positions": 0, "owners": -1}
    changes = {name: F.pad(getattr(batch, name), (0, extra), value=value) for name, value in filler.items()}
    changes["ids"] = torch.where(changes["owners"] < 0, pad_id, changes["ids"])
    others = None if batch.mismatched is None else widened(batch.mismatched, extra, pad_id)
    return dataclasses.replace(batch, **changes, mismatched=others)


def moved_right(batch, by):
    """Return a packed batch with so many columns of padding more, on the left; padding sees itself alone."""
    filler = {"ids": PAD, "targets": batching.IGNORED, "positions": 0, "owners": -1}
    changes = {name: F.pad(getattr(batch, name), (by, 0), value=value) for name, value in filler.items()}
    others = None if batch.mismatched is None else moved_right(batch.mismatched, by)
    return dataclasses.replace(batch, **changes, ends=batch.ends + torch.tensor([0, by]), mismatched=others)


LAYOUTS = {
    "more padding": lambda items: widened(batch_of(items), 37, PAD),
    "another pad id": lambda items: widened(batch_of(items), 5, 3),
    "an answer's own token as padding": lambda items: widened(batch_of(items), 5, items[0].documents[0].ids[-1]),
    "other order": lambda items: batch_of(items[::-1]),
    "packed": lambda items: batch_of(items, packing=True),
    "packed, padded on the left": lambda items: moved_right(batch_of(items, packing=True), 19),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto", "orpo", "reward"])
def test_the_layout_of_a_batch_changes_nothing(tiny_model, kind, layout):
    config = config_of(kind)
    model, _ = prepared(tiny_model, config)
    items = judged(JUDGED) if kind == "kto" else pairs(margins=[0.5, 1.0, -0.5])
    objective = preference.preference_objective(kind, config.preference)
    loss, gradients, metrics = measured(model, items, objective)
    other_loss, other_gradients, other_metrics = measured(model, items, objective, LAYOUTS[layout])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative(other_gradients, gradients) < 1e-6
    assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("changed", [0, 4, 7])
def test_another_pair_changes_no_bit(tiny_model, packing, changed):
    model, _ = prepared(tiny_model, config_of("dpo"))
    items, others = pairs(), pairs(seed=1)
    perturbed = [others[i] if i == changed else pair for i, pair in enumerate(items)]
    with torch.no_grad():
        before, _ = preference.answer_log_probabilities(model, batch_of(items, packing))
        after, _ = preference.answer_log_probabilities(model, batch_of(perturbed, packing))
    same = (before == after).view(-1, 2).all(1)
    assert same.tolist() == [i != changed for i in range(len(items))]


@pytest.mark.parametrize("kind", ["dpo", "orpo", "reward"])
@pytest.mark.parametrize("sizes", [[1] * 8, [5, 3], [2, 1, 4, 1]])
def test_accumulation_divides_by_the_pairs_of_the_window(tiny_model, tmp_path, kind, sizes):
    items = pairs(margins=[0.5, 1.0, -0.5])
    runs = []
    for number, counts in enumerate(([8], sizes)):
        config = config_of(kind, accumulation=len(counts))
        model, parameters = prepared(tiny_model, config)
        rest, batches = list(items), []
        for count in counts:
            batches.append(batch_of(rest[:count]))
            rest = rest[count:]
        (line,), gradients = trained(model, parameters, config, batches, tmp_path / str(number))
        runs.append((line, gradients))
    (whole, gradient), (parts, others) = runs
    assert relative(others, gradient) < 1e-6
    names = [name for name in whole if name in ("loss", "margin", "accuracy", "kl") or name.startswith("chosen")]
    assert {name: parts[name] for name in names} == pytest.approx({n: whole[n] for n in names}, rel=1e-6, abs=1e-6)


def test_metrics_by_hand(tiny_model):
    """Two pairs: the longer answer is chosen in one, the shorter in the other; rewards come from log-probabilities."""
    config = config_of("dpo", beta=0.3)
    model, _ = prepared(tiny_model, config)
    items = pairs([(4, 9, 2), (6, 3, 8)])
    with torch.no_grad():
        p, _ = preference.answer_log_probabilities(model, batch_of(items))
        q = preference.reference_log_probabilities(model, batch_of(items))
    r = (0.3 * (p - q)).tolist()
    p = p.tolist()
    _, _, metrics = measured(model, items, preference.preference_objective("dpo", config.preference))
    right = [float(r[0] > r[1]), float(r[2] > r[3])]
    assert metrics == pytest.approx({
        "chosen_reward": (r[0] + r[2]) / 2, "rejected_reward": (r[1] + r[3]) / 2, "chosen_length": 6,
        "rejected_length": 5,
        "chosen_log_probability": (p[0] + p[2]) / 2, "rejected_log_probability": (p[1] + p[3]) / 2,
        "margin": (r[0] - r[1] + r[2] - r[3]) / 2, "accuracy": sum(right) / 2, "accuracy_chosen_longer": right[0],
        "accuracy_chosen_shorter": right[1], "prefers_chosen": ((p[0] > p[1]) + (p[2] > p[3])) / 2,
        "kl": sum(r) / 0.3 / 4,
    }, rel=1e-5, abs=1e-6)  # fmt: skip


def test_an_answer_of_one_token_and_a_prompt_of_one(tiny_model):
    """The shortest there is: p is the first token's own log-probability after the prompt."""
    model, _ = prepared(tiny_model, config_of("dpo"))
    pair = Pair(document([7], [9]), document([7], [11, 12]))
    with torch.no_grad():
        sums, counts = preference.answer_log_probabilities(model, batch_of([pair]))
        expected = torch.log_softmax(model(torch.tensor([[7]]))[0, 0], dim=-1)[9]
    assert counts.tolist() == [1, 2] and sums[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_case_is_ragged():
    assert len({prompt + chosen for prompt, chosen, _ in RAGGED}) > 5
    assert {chosen > rejected for _, chosen, rejected in RAGGED} == {True, False}
