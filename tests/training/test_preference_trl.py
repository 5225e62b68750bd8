"""Twenty steps of every objective against TRL's own trainers: same base, same adapter, same batches, same optimiser.

TRL's trainers run whole (`trainer.train()`), each on token ids of ours in the order given, in fp32, with AdamW at a
constant rate and without clipping, which would hide a scale. Losses are compared as the trainers log them. Where TRL
and the paper disagree, the test makes batches on which both say the same, or computes the difference by hand:

- `sigmoid` ignores label_smoothing;
- `ipo` divides log-ratios by the answers' lengths (our length_normalized); equation 17 has none of it;
- CPO's and ORPO's term of the chosen answer is a mean over all tokens of the micro-batch, ORPO's over prompts too; ours
  is per answer, over its own tokens (Hong et al. 2024, equation 6). CPO's paper sums, its authors' code takes means;
- KTO's mismatched answers are turned by one within a batch; ours are turned by one within the data.
"""

import math

import pytest
import torch

from minitune.checkpoint.adapter import save_adapter
from minitune.safetensors_io import read_tensors
from tests.training.preferences import batch_of, config_of, judged, pairs, prepared, trained

pytest.importorskip("trl")
STEPS, RATE = 20, 1e-3


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TQDM_DISABLE", "1")
        yield


def shapes(step, count, prompt=None):
    """Ragged lengths of (prompt, chosen, rejected)."""
    return [
        (prompt or 1 + (3 * step + 5 * i) % 17, 1 + (7 * step + 11 * i) % 23, 1 + (5 * step + 9 * i) % 19)
        for i in range(count)
    ]


def our_run(folder, tmp_path, kind, micro_batches, accumulation, **options):
    """Train through our loop; leaves the adapter before and after in `start` and `end`, returns the steps' lines."""
    config = config_of(kind, accumulation=accumulation, steps=STEPS, rate=RATE, **options)
    model, parameters = prepared(folder, config)
    save_adapter(model, tmp_path / "start", str(folder))
    lines, _ = trained(model, parameters, config, [batch_of(items) for items in micro_batches], tmp_path)
    save_adapter(model, tmp_path / "end", str(folder))
    return lines


def their_run(folder, tmp_path, trainer_class, config_class, rows, batch, accumulation, model=None, **options):
    """Train with a trainer of TRL on rows of token ids; returns what it logged at each step, and its adapter."""
    from datasets import Dataset
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = config_class(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
        optim="adamw_torch", train_sampling_strategy="sequential", bf16=False, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    adapter = PeftConfig.from_pretrained(tmp_path / "start")
    adapter.inference_mode = False
    text = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "label": True}
    trainer = trainer_class(
        model=model, args=settings, train_dataset=Dataset.from_list([text]), peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train_dataset = Dataset.from_list(rows)  # token ids from here on: they are ours, and none is added
    set_peft_model_state_dict(trainer.model, read_tensors(tmp_path / "start" / "adapter_model.safetensors"))
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return logged, get_peft_model_state_dict(trainer.model)


def row_of(pair):
    """Return a pair as TRL's DPOTrainer keeps it."""
    prompt = pair.chosen.prompt
    sides = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    return {"prompt_ids": list(prompt)} | {k: list(side.ids[len(prompt) :]) for k, side in sides.items()}


def labelled_row(pair):
    """Return a pair as TRL's CPOTrainer and ORPOTrainer keep it."""
    row = {"prompt_input_ids": list(pair.chosen.prompt), "prompt_attention_mask": [1] * len(pair.chosen.prompt)}
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        row[f"{name}_input_ids"] = list(side.ids)
        row[f"{name}_attention_mask"] = [1] * len(side.ids)
        row[f"{name}_labels"] = [i if t else -100 for i, t in zip(side.ids, side.targets, strict=True)]
    return row


def assert_same(lines, logged, tmp_path, tensors, same):
    """Losses within 1e-5, what `same` names (ours: theirs) within 1e-4, every number of the adapters within 1e-4."""
    assert len(lines) == len(logged) == STEPS
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in logged], abs=1e-5)
    for our, their in same.items():
        assert [line[our] for line in lines] == pytest.approx([line[their] for line in logged], abs=1e-4), our
    start = read_tensors(tmp_path / "start" / "adapter_model.safetensors")
    end = read_tensors(tmp_path / "end" / "adapter_model.safetensors")
    assert set(end) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(end[name], tensor, atol=1e-4, rtol=0)
        assert (end[name] - start[name]).abs().max() > 3 * RATE, f"{name} has hardly moved"


REWARDS = {
    "margin": "rewards/margins", "accuracy": "rewards/accuracies", "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}  # fmt: skip
SUMS = {"chosen_log_probability": "logps/chosen", "rejected_log_probability": "logps/rejected"}
DPO = {  # name: (our objective and options, TRL's options, what its logs have in common with ours)
    "dpo": ("dpo", {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}, REWARDS | SUMS),
    "dpo-normalized": (
        "dpo", {"beta": 3.0, "length_normalized": True}, {"loss_type": "sigmoid_norm", "beta": 3.0}, SUMS,
    ),
    "ipo-normalized": ("ipo", {"beta": 0.2, "length_normalized": True}, {"loss_type": "ipo", "beta": 0.2}, SUMS),
    "hinge": ("hinge", {"beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}, REWARDS | SUMS),
    "robust": (
        "robust", {"beta": 0.3, "label_smoothing": 0.2}, {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
        REWARDS | SUMS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo_trainer(tiny_model, tmp_path, name):
    """Two micro-batches of two ragged pairs a step; TRL's rewards are never normalised, so those are left out there."""
    from trl import DPOConfig, DPOTrainer

    kind, ours, theirs, same = DPO[name]
    micro = [pairs(shapes(i, 2), seed=i) for i in range(2 * STEPS)]
    lines = our_run(tiny_model, tmp_path, kind, micro, 2, **ours)
    rows = [row_of(pair) for items in micro for pair in items]
    logged, tensors = their_run(tiny_model, tmp_path, DPOTrainer, DPOConfig, rows, 2, 2, **theirs)
    assert_same(lines, logged, tmp_path, tensors, same)


def test_reward_trainer(tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    micro = [pairs(shapes(i, 2), seed=i, margins=[0.5, -0.25, 2.0]) for i in range(2 * STEPS)]
    lines = our_run(tiny_model, tmp_path, "reward", micro, 2)
    rows = [
        {"chosen_ids": list(p.chosen.ids), "rejected_ids": list(p.rejected.ids), "margin": p.margin}
        for items in micro
        for p in items
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, dtype=torch.float32, num_labels=1)
    logged, tensors = their_run(tiny_model, tmp_path, RewardTrainer, RewardConfig, rows, 2, 2, model=model)
    assert_same(lines, logged, tmp_path, tensors, {"margin": "margin", "accuracy": "accuracy"})


KINDS = {  # the same for CPOTrainer and ORPOTrainer; the last number is the prompts' length, None for ragged ones
    "simpo": (
        "CPO", {"beta": 2.0, "gamma": 0.7}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        REWARDS, 2, None,
    ),
    "cpo": ("CPO", {"beta": 0.2}, {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 1.0}, REWARDS | SUMS, 1, None),
    "cpo-smoothed": (
        "CPO", {"beta": 0.2, "label_smoothing": 0.2, "sft_weight": 0.5},
        {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.2, "cpo_alpha": 0.5}, REWARDS | SUMS, 1, None,
    ),
    "orpo": ("ORPO", {"beta": 0.3}, {"beta": 0.3}, REWARDS, 1, 1),
}  # fmt: skip


def trl_reference_free(name):
    """Return the trainer and the config class of CPO or ORPO."""
    from trl.experimental import cpo, orpo

    return (cpo.CPOTrainer, cpo.CPOConfig) if name == "CPO" else (orpo.ORPOTrainer, orpo.ORPOConfig)


@pytest.mark.parametrize("name", KINDS)
def test_trainers_without_reference(tiny_model, tmp_path, name):
    """With an answer's loss beside it, micro-batches of one pair: their mean is then over that answer's tokens alone.

    In ORPO the prompt is one token long, which nothing predicts, so that it adds nothing to their mean.
    """
    trainer, ours, theirs, same, batch, prompt = KINDS[name]
    micro = [pairs(shapes(i, batch, prompt), seed=i) for i in range(2 * STEPS)]
    lines = our_run(tiny_model, tmp_path, name.split("-")[0], micro, 2, **ours)
    rows = [labelled_row(pair) for items in micro for pair in items]
    logged, tensors = their_run(tiny_model, tmp_path, *trl_reference_free(trainer), rows, batch, 2, **theirs)
    assert_same(lines, logged, tmp_path, tensors, same)


def test_kto_trainer(tiny_model, tmp_path):
    """The mismatched answers are turned within micro-batches here, as TRL does, two of each label in every one."""
    from trl import KTOConfig, KTOTrainer

    micro = []
    for i in range(2 * STEPS):
        sizes = [(prompt, answer, (i // 2 + j) // 2 % 2) for j, (prompt, answer, _) in enumerate(shapes(i, 4))]
        micro.append(judged(sizes, seed=i))
    options = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    lines = our_run(tiny_model, tmp_path, "kto", micro, 2, **options)
    rows = []
    for item in (item for items in micro for item in items):
        prompt, start = list(item.example.prompt), len(item.example.prompt)
        answers = {"completion_ids": item.example.ids[start:], "KL_completion_ids": item.mismatched.ids[start:]}
        rows.append({"prompt_ids": prompt, **{k: list(v) for k, v in answers.items()}, "label": item.desirable})
    logged, tensors = their_run(tiny_model, tmp_path, KTOTrainer, KTOConfig, rows, 4, 2, **options)
    same = {"kl": "kl", "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected"}
    assert_same(lines, logged, tmp_path, tensors, same | SUMS)
    assert max(line["kl"] for line in lines) > 0.1  # the baseline was more than its floor of 0


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_label_smoothing_has_an_effect_here_and_none_in_trl(tiny_model, tmp_path):
    """Mitchell 2023: -(1 - e) log s(z) - e log s(-z), z = beta d the margin; one pair a step, so z is logged."""
    from trl import DPOConfig, DPOTrainer

    micro, e = [pairs(shapes(i, 1), seed=i) for i in range(STEPS)], 0.2
    lines = our_run(tiny_model, tmp_path, "dpo", micro, 1, beta=0.3, label_smoothing=e)
    rows = [row_of(pair) for (pair,) in micro]
    options = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": e}
    logged, _ = their_run(tiny_model, tmp_path, DPOTrainer, DPOConfig, rows, 1, 1, **options)
    smoothed = [-(1 - e) * log_sigmoid(line["margin"]) - e * log_sigmoid(-line["margin"]) for line in lines]
    assert [line["loss"] for line in lines] == pytest.approx(smoothed, abs=1e-6)
    plain = [-log_sigmoid(line["rewards/margins"]) for line in logged]
    assert [line["loss"] for line in logged] == pytest.approx(plain, abs=1e-6)
    # fp32 resolves a sum of 32 to 64 nats to 4e-6 only, and a margin is beta times what is between four.
    assert lines[0]["margin"] == pytest.approx(logged[0]["rewards/margins"], abs=5e-6)
    assert abs(lines[0]["loss"] - logged[0]["loss"]) > 1e-3


def test_ipo_sums_here_and_takes_means_in_trl(tiny_model, tmp_path):
    """Azar et al. 2023, equation 17: (d - 1 / (2 tau))^2 with d of whole answers, which is TRL's margin over beta."""
    from trl import DPOConfig, DPOTrainer

    micro = [pairs(shapes(i + 1, 1), seed=i) for i in range(STEPS)]
    lines = our_run(tiny_model, tmp_path, "ipo", micro, 1, beta=0.2)
    rows = [row_of(pair) for (pair,) in micro]
    logged, _ = their_run(tiny_model, tmp_path, DPOTrainer, DPOConfig, rows, 1, 1, loss_type="ipo", beta=0.2)
    whole = [(line["margin"] / 0.2 - 2.5) ** 2 for line in lines]
    assert [line["loss"] for line in lines] == pytest.approx(whole, rel=1e-5)
    # fp32 resolves a sum of 32 to 64 nats to 4e-6 only, and a margin is beta times what is between four.
    assert lines[0]["margin"] == pytest.approx(logged[0]["rewards/margins"], abs=5e-6)
    lengths = [len(side.ids) - len(side.prompt) for side in micro[0][0].documents]
    rewards = [logged[0][f"rewards/{side}"] / 0.2 / n for side, n in zip(("chosen", "rejected"), lengths, strict=True)]
    assert logged[0]["loss"] == pytest.approx((rewards[0] - rewards[1] - 2.5) ** 2, rel=1e-4)
    assert abs(lines[0]["loss"] - logged[0]["loss"]) > 1e-2


@pytest.mark.parametrize("trainer", ["CPO", "ORPO"])
def test_the_chosen_answers_loss_is_a_mean_over_answers_here_and_over_a_batchs_tokens_in_trl(
    tiny_model, tmp_path, trainer
):
    """Both means are made here from transformers' own logits; the rest of the loss is the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = trainer.lower()
    micro = [pairs([(4, 3, 6), (7, 20, 5)], seed=i) for i in range(STEPS)]
    lines = our_run(tiny_model, tmp_path, kind, micro, 1, beta=0.3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "start")
    answers, pooled = [], []
    for pair in micro[0]:
        ids, start = torch.tensor([pair.chosen.ids]), len(pair.chosen.prompt)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        answers.append(losses[start - 1 :].mean())
        pooled.append(losses if trainer == "ORPO" else losses[start - 1 :])
    ours, theirs = float(torch.stack(answers).mean()), float(torch.cat(pooled).mean())
    rows = [labelled_row(pair) for items in micro for pair in items]
    logged, _ = their_run(tiny_model, tmp_path, *trl_reference_free(trainer), rows, 2, 1, beta=0.3)
    assert abs(ours - theirs) > 1e-2
    assert logged[0]["nll_loss"] == pytest.approx(theirs, abs=1e-5)
    assert lines[0]["loss"] - ours == pytest.approx(logged[0]["loss"] - theirs, abs=1e-5)
