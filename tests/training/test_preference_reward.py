"""Reward models against transformers' LlamaForSequenceClassification: loss, gradients, and files in both directions."""

import pytest
import torch

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.data import batching
from minitune.errors import CheckpointError, ConfigError
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.model.transformer import add_score_head
from minitune.training import preference
from minitune.training.objectives import final_hidden
from tests.kernels.proof import mutant
from tests.training.preferences import PAD, batch_of, config_of, pairs, prepared
from tests.training.test_loop import relative
from tests.training.test_preference_objective import measured

MARGINS = [0.5, -0.25, 2.0]


def classifier(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)


def their_rewards(model, items):
    """Score the sides one row at a time, unpadded; (2 P,)."""
    sides = [side for pair in items for side in pair.documents]
    return torch.stack([model(input_ids=torch.tensor([side.ids])).logits[0, 0] for side in sides])


@torch.no_grad()
def our_rewards(model, items, packing=False):
    batch = batch_of(items, packing)
    rows, columns = batch.ends.unbind(1)
    return model.rewards(final_hidden(model, batch)[rows, columns])


def reward_model(folder, method="full"):
    """Return a model with a reward head that is drawn large enough to matter."""
    model, _ = prepared(folder, config_of("reward", method=method))
    torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(9))
    return model


def check(folder, tmp_path, *, module=preference, collate=batch_of, margins=MARGINS, **layout):
    """The loss is -log s(R(w) - R(l) - m), by transformers from the same weights; so are all gradients."""
    model, items = reward_model(folder), pairs(margins=margins)
    save_model(model, None, tmp_path / "model")
    theirs = classifier(tmp_path / "model")
    rewards = their_rewards(theirs, items)
    lead = rewards[::2] - rewards[1::2]
    loss = torch.log(1 + torch.exp(-(lead - torch.tensor([pair.margin or 0.0 for pair in items])))).mean()
    loss.backward()
    objective = module.preference_objective("reward", config_of("reward").preference)
    value, gradients, metrics = measured(model, items, objective, collate, **layout)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == their_gradients.keys() and relative(gradients, their_gradients) < 1e-5
    assert metrics["margin"] == pytest.approx(lead.mean().item(), abs=1e-5)
    assert metrics["accuracy"] == (lead > 0).float().mean().item()


@pytest.mark.parametrize("margins", [None, MARGINS])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_against_transformers(tiny_model, tmp_path, packing, margins):
    check(tiny_model, tmp_path, packing=packing, margins=margins)


MUTANTS = {
    "reward of the token before": (batching, "len(owned) - 1", "len(owned) - 2"),
    "sides swapped": (preference, "(rewards[::2], rewards[1::2]", "(rewards[1::2], rewards[::2]"),
    "margins ignored": (preference, "rewards[1::2], batch.margins", "rewards[1::2], None"),
    "margins added": (preference, "rewards[1::2], batch.margins", "rewards[1::2], -batch.margins"),
    "mean of the losses": (preference, "return loss.sum(), len(loss)", "return loss.mean(), len(loss)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(tiny_model, tmp_path, name):
    module, old, new = MUTANTS[name]
    other = mutant(module, tmp_path, old, new)
    changed = {"module": other}
    if module is batching:
        changed = {"collate": lambda items: other.collate_preferences([[item] for item in items], PAD, packing=False)}
    with pytest.raises(AssertionError):
        check(tiny_model, tmp_path, **changed)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_gives_transformers_the_same_rewards_and_comes_back(tiny_folder, tmp_path, tie):
    source = tiny_folder(tmp_path / "source", tie_word_embeddings=tie)
    model, items = reward_model(source), pairs()
    save_model(model, load_tokenizer(source), tmp_path / "saved")
    theirs = classifier(tmp_path / "saved")
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    ours = our_rewards(model, items)
    with torch.no_grad():
        torch.testing.assert_close(ours, their_rewards(theirs, items), atol=1e-5, rtol=0)
    again = load_model(tmp_path / "saved")
    assert torch.equal(our_rewards(again, items), ours) and again.config == model.config
    torch.testing.assert_close(our_rewards(again, items, packing=True), ours, atol=1e-5, rtol=0)
    assert len(set(ours.tolist())) == len(ours)


def test_a_model_that_transformers_saved_gives_the_same_rewards(tiny_model, tmp_path):
    torch.manual_seed(1)
    theirs, items = classifier(tiny_model), pairs()
    torch.nn.init.normal_(theirs.score.weight, std=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(
            our_rewards(load_model(tmp_path / "theirs"), items), their_rewards(theirs, items), atol=1e-5, rtol=0
        )


def test_an_adapter_goes_to_peft_and_comes_back(tiny_model, tmp_path):
    """The head travels with the adapter, as PEFT's modules_to_save."""
    peft = pytest.importorskip("peft")
    model, items = reward_model(tiny_model, "lora"), pairs()
    save_adapter(model, tmp_path / "ours", str(tiny_model))
    theirs = peft.PeftModelForSequenceClassification.from_pretrained(classifier(tiny_model), tmp_path / "ours")
    ours = our_rewards(model, items)
    with torch.no_grad():
        torch.testing.assert_close(ours, their_rewards(theirs, items), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_model(tiny_model, dtype=torch.float32)
        load_adapter(again, tmp_path / folder)
        assert torch.equal(our_rewards(again, items), ours)


def test_an_adapter_that_peft_made_gives_the_same_rewards(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    base, items = classifier(tiny_model), pairs()
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="SEQ_CLS"
    )
    theirs = peft.get_peft_model(base, config)  # adds the head to modules_to_save on its own
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tiny_model, dtype=torch.float32)
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(our_rewards(model, items), their_rewards(theirs.eval(), items), atol=1e-5, rtol=0)


def test_the_head_stays_in_fp32_where_the_model_is_cast(tiny_model):
    model = reward_model(tiny_model).bfloat16()
    assert model.score.weight.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert our_rewards(model, pairs()).dtype == torch.float32


def test_the_wrong_head_is_refused_in_one_line(tiny_model, tmp_path):
    language, rewarding = load_model(tiny_model, dtype=torch.float32), reward_model(tiny_model)
    refusals = []
    for call in (
        lambda: preference.preference_objective("reward", None)(language, batch_of(pairs())),
        lambda: preference.answer_log_probabilities(rewarding, batch_of(pairs())),
        lambda: rewarding(torch.tensor([[1, 2]])),
    ):
        with pytest.raises(ConfigError) as refusal:
            call()
        refusals.append(str(refusal.value))
    assert "without a reward head" in refusals[0] and all("reward model" in text for text in refusals[1:])
    assert not any("\n" in text for text in refusals)
    add_lora(language, LoRAConfig(rank=4), seed=0)
    save_adapter(language, tmp_path / "language", str(tiny_model))
    with pytest.raises(CheckpointError, match="no reward head"):
        load_adapter(rewarding, tmp_path / "language")


def test_a_fresh_head_prefers_nothing_much_and_depends_on_the_seed_alone(tiny_model):
    heads = []
    for seed in (0, 0, 1):
        model = load_model(tiny_model, dtype=torch.float32)
        add_score_head(model, seed)
        heads.append(model.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.2, rel=0.5)  # initializer_range of the tiny model, from 32 draws
