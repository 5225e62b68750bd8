"""A tiny model that can judge and one that can score, and what transformers makes of the same weights."""

import pytest


@pytest.fixture(scope="session")
def roomy(tiny_folder, tmp_path_factory):
    """The folder of a tiny model with 1,024 positions: a token is a byte, and a judge is asked at length."""
    return str(tiny_folder(tmp_path_factory.mktemp("roomy"), max_position_embeddings=1024))


@pytest.fixture(scope="session")
def reward_adapter(roomy, save_reward_adapter, tmp_path_factory):
    """The folder of an adapter of `roomy` that changes nothing but brings a reward head."""
    return save_reward_adapter(roomy, tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def peer(roomy):
    """The model and tokenizer of `roomy` in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(roomy).eval(), AutoTokenizer.from_pretrained(roomy)
