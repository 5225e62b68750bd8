"""Rewards against transformers' hidden states; batches, modes and what is refused."""

import pytest
import torch

from minitune import load_model, load_tokenizer
from minitune.errors import ConfigError, DataError
from minitune.evaluation import reward
from tests.kernels.proof import mutant

CONVERSATIONS = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for asked, answer in (
        ("Hi", "Hello."),
        ("How are you today?", "Well, and you? " * 5),
        ("a", "b"),
        ("Name one.", "X"),
    )
]


@pytest.fixture(scope="module")
def scoring(roomy, reward_adapter):
    return load_model(roomy, adapter=reward_adapter), load_tokenizer(roomy)


@torch.no_grad()
def expected(peer, scoring) -> list[float]:
    """What transformers gives: w . h of each conversation's last token, one by one, without padding."""
    model, tokenizer = peer
    head, rewards = scoring[0].score.weight[0], []
    for turns in CONVERSATIONS:
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt").input_ids
        rewards.append(float(head @ model.model(ids).last_hidden_state[0, -1]))
    return rewards


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_rewards_equal_transformers(peer, scoring, batch_size):
    found = reward.score(*scoring, CONVERSATIONS, batch_size=batch_size)
    assert found == pytest.approx(expected(peer, scoring), rel=1e-4, abs=1e-5)
    assert len({round(one, 3) for one in found}) == len(found)


@pytest.mark.parametrize(
    "old, new",
    [
        ("[torch.arange(len(rows)), ends]", "[torch.arange(len(rows)), ends - 1]"),  # the token before the last
        ("[torch.arange(len(rows)), ends]", "[:, -1]"),  # the padding
        ("result[rows] =", "result[start : start + len(rows)] ="),  # in the order of lengths
    ],
)
def test_a_mutant_is_caught(peer, scoring, tmp_path, old, new):
    found = mutant(reward, tmp_path, old, new).score(*scoring, CONVERSATIONS)
    assert found != pytest.approx(expected(peer, scoring), rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_answers_are_scored_to_their_prompts(scoring):
    model, tokenizer = scoring
    prompts = ["One plus one is", [{"role": "user", "content": "Hi"}]]
    continued, answered = reward.score_answers(model, tokenizer, prompts, [[" two", " 11"], ["Hello."]])
    ids = tokenizer.encode("One plus one is 11") + [tokenizer.eos_id]  # one token a byte: cut nowhere else
    assert continued[1] == pytest.approx(float(model.rewards(model.hidden(torch.tensor([ids]))[0, -1:])), abs=1e-5)
    assert answered == pytest.approx(reward.score(model, tokenizer, CONVERSATIONS[:1]), abs=1e-5)


def test_no_gradient_is_kept_and_the_mode_is_restored(scoring):
    model, tokenizer = scoring
    model.train()
    try:
        first, second = (reward.score(model, tokenizer, CONVERSATIONS[:2]) for _ in range(2))
        assert model.training and first == second
    finally:
        model.eval()
    assert reward.score(model, tokenizer, []) == []


def test_a_model_of_the_other_kind_is_refused(roomy, scoring):
    language = load_model(roomy)
    with pytest.raises(ConfigError, match="a language model without a reward head"):
        reward.score(language, scoring[1], CONVERSATIONS)
    with pytest.raises(ConfigError, match="a language model without a reward head"):
        reward.score(language, scoring[1], [])  # known before the work


def test_a_conversation_that_is_too_long_is_named(scoring):
    turns = [{"role": "user", "content": "a" * 2000}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"conversation 2: 20\d\d tokens .* at most 1024"):
        reward.score(*scoring, [CONVERSATIONS[0], turns])
