"""Kept log-probabilities of the reference: full fine-tuning against two models of transformers; reuse and refusals."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from minitune.data.corpus import Corpus
from minitune.errors import CheckpointError
from minitune.model.lora import adapter_disabled
from minitune.reporting.journal import read_metrics
from minitune.safetensors_io import read_metadata, read_tensors, write_tensors
from minitune.training import preference, reference
from minitune.training.config import EvaluationConfig, LoRAOptions, PreferenceOptions
from minitune.training.run import train
from tests.kernels.proof import mutant
from tests.training.preferences import PAD, batch_of, config_of, judged, pairs, prepared, trained
from tests.training.test_loop import relative
from tests.training.test_preference_objective import JUDGED, measured

STEPS = 8


def corpus_of(items, held_out=2):
    return Corpus([(items[held_out:], None)], items[:held_out], [])


def kept(model, corpus, path, base="weights", batch_size=3, module=reference):
    return module.with_reference(model, corpus, base, batch_size=batch_size, pad_id=PAD, path=str(path))


def items_of(corpus):
    return [*corpus.validation, *(item for part, _ in corpus.training for item in part)]


def two_models(folder, batches, beta, rate):
    """Train with DPO in a plain loop over a model of transformers and a frozen copy of it; returns losses and model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def log_probability(policy, example):
        start, ids = len(example.prompt), torch.tensor([example.ids])
        steps = F.log_softmax(policy(input_ids=ids).logits[0, start - 1 : -1], dim=-1)
        return steps.gather(1, ids[0, start:, None]).sum()

    losses = []
    for items in batches:
        rows = []
        for pair in items:
            chosen, rejected = (log_probability(model, side) - log_probability(frozen, side) for side in pair.documents)
            rows.append(-F.logsigmoid(beta * (chosen - rejected)))
        loss = torch.stack(rows).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


def test_full_fine_tuning_against_two_models(tiny_model, tmp_path):
    rate, items = 5e-4, pairs(seed=3)
    config = config_of("dpo", method="full", steps=STEPS, rate=rate, beta=0.3)
    model, parameters = prepared(tiny_model, config)
    corpus, _ = kept(model, corpus_of(items), tmp_path / "reference.safetensors")
    chosen = items_of(corpus)
    batches = [chosen[3 * (step % 2) : 3 * (step % 2) + 3] for step in range(STEPS)]
    lines, _ = trained(model, parameters, config, [batch_of(part) for part in batches], tmp_path)
    losses, weights = two_models(tiny_model, batches, 0.3, rate)
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.05
    # AdamW's first steps have the rate's size and the gradient's sign, and that is rounding's where the gradient is
    # all but 0: such numbers may end two rates a step apart.
    for name, parameter in parameters.items():
        difference = (parameter - weights[name]).abs()
        assert difference.max() <= 2.1 * STEPS * rate and (difference > 1e-6).float().mean() < 1e-3


def check_against_switching_off(tiny_model, tmp_path, module=reference):
    for kind in ("dpo", "kto"):
        items = judged(JUDGED) if kind == "kto" else pairs()
        config = config_of(kind)
        model, _ = prepared(tiny_model, config)
        with adapter_disabled(model):
            corpus, _ = kept(model, corpus_of(items), tmp_path / f"{kind}.safetensors", module=module)
        objective = preference.preference_objective(kind, config.preference)
        for packing in (False, True):
            loss, gradients, metrics = measured(model, items, objective, packing=packing)
            again, others, same = measured(model, items_of(corpus), objective, packing=packing)
            assert again == pytest.approx(loss, rel=1e-6) and relative(others, gradients) < 1e-6
            assert same == pytest.approx(metrics, rel=1e-6, abs=1e-6)


def test_kept_and_switched_off_are_the_same_reference(tiny_model, tmp_path):
    check_against_switching_off(tiny_model, tmp_path)


@pytest.mark.parametrize(
    "old,new",
    [
        ("values[part] =", "values[start : start + len(part)] ="),  # in the order of their lengths
        ("        for item in items:\n", "        for item in reversed(items):\n"),  # not in the order of filling in
    ],
)
def test_documents_that_are_mixed_up_are_caught(tiny_model, tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_against_switching_off(tiny_model, tmp_path, mutant(reference, tmp_path, old, new))


def test_a_second_call_reads_the_file(tiny_model, tmp_path, monkeypatch):
    model, _ = prepared(tiny_model, config_of("dpo"))
    corpus, place = kept(model, corpus_of(pairs()), tmp_path / "r.safetensors")
    assert place == tmp_path / "r.safetensors" and [path.name for path in tmp_path.iterdir()] == [place.name]
    monkeypatch.setattr(type(model), "hidden", None)  # a forward pass would fail
    again, _ = kept(model, corpus_of(pairs()), place, batch_size=1)
    assert again == corpus and all(len(pair.reference) == 2 for pair in items_of(again))


def test_sums_do_not_depend_on_how_many_are_scored_at_a_time(tiny_model, tmp_path):
    model, _ = prepared(tiny_model, config_of("kto"))
    one, _ = kept(model, corpus_of(judged(JUDGED)), tmp_path / "1", batch_size=1)
    four, _ = kept(model, corpus_of(judged(JUDGED)), tmp_path / "4", batch_size=4)
    for a, b in zip(items_of(one), items_of(four), strict=True):
        assert a.reference == pytest.approx(b.reference, rel=1e-6)


def test_without_a_path_the_place_is_by_what_it_holds(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path))
    model, _ = prepared(tiny_model, config_of("dpo"))
    places = set()
    for base, items in (("a", pairs()), ("b", pairs()), ("a", pairs(seed=1)), ("a", pairs())):
        places.add(reference.with_reference(model, corpus_of(items), base, batch_size=4, pad_id=PAD)[1])
    assert len(places) == 3 and {place.parent for place in places} == {tmp_path / "reference"}


def test_the_file_of_something_else_is_refused_by_name(tiny_model, tmp_path):
    model, _ = prepared(tiny_model, config_of("dpo"))
    path = tmp_path / "r.safetensors"
    kept(model, corpus_of(pairs()), path)
    moved = pairs()
    first = moved[2].chosen
    fewer = dataclasses.replace(first, targets=(*first.targets[:-1], False))  # the same ids
    moved[2] = dataclasses.replace(moved[2], chosen=fewer)
    for items, base, what in (
        (pairs(), "other weights", "another model"),
        (pairs(seed=1), "weights", "other data"),
        (pairs()[::-1], "weights", "other data"),
        (moved, "weights", "other data"),
    ):
        with pytest.raises(CheckpointError, match=what) as refusal:
            kept(model, corpus_of(items), path, base=base)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="another dtype"):
        kept(model.bfloat16(), corpus_of(pairs()), path)


def test_a_damaged_file_is_refused(tiny_model, tmp_path):
    model, _ = prepared(tiny_model, config_of("dpo"))
    path = tmp_path / "r.safetensors"
    kept(model, corpus_of(pairs()), path)
    whole, key = path.read_bytes(), read_metadata(path)
    values = read_tensors(path)["log_probabilities"]
    bad = values.clone()
    bad[3] = float("nan")

    def refused(what):
        with pytest.raises(CheckpointError, match=what) as refusal:
            kept(model, corpus_of(pairs()), path)
        assert "\n" not in str(refusal.value) and path.name in str(refusal.value)

    for tensors in ({"log_probabilities": bad}, {"log_probabilities": values[:-1]}, {"other": values}):
        write_tensors(path, tensors, key)
        refused("delete it")
    for damaged in (whole[:-3], whole[:20], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        refused("")


@pytest.fixture
def rows_of_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "yes " * (1 + i % 5), "rejected": "no " * (1 + i % 3)} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_second_run_of_full_fine_tuning_scores_nothing_and_ends_the_same(
    make_config, rows_of_pairs, tmp_path, monkeypatch
):
    options = {"data": rows_of_pairs, "objective": "dpo", "method": "full", "lora": LoRAOptions(), "max_steps": 3,
               "preference": PreferenceOptions(reference_cache=str(tmp_path / "r.safetensors")),
               "evaluation": EvaluationConfig(samples=0)}  # fmt: skip
    train(make_config("first", **options))
    monkeypatch.setattr(reference, "score", None)  # a call would fail
    train(make_config("second", **options))
    first, second = ([line.get("loss") for line in read_metrics(tmp_path / name)] for name in ("first", "second"))
    assert first == second and len(first) >= 3
    with pytest.raises(CheckpointError, match="other data"):
        train(make_config("third", **options, validation_fraction=0.5))
    assert not (tmp_path / "third").exists()
