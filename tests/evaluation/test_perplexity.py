"""Perplexity against transformers' own loss on the same windows."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.errors import ConfigError, DataError
from minitune.evaluation.bootstrap import interval, ratio_of
from minitune.evaluation.perplexity import perplexity, plan_windows, score_ids
from minitune.model.config import ModelConfig
from minitune.model.transformer import Transformer


@pytest.fixture(scope="module")
def twins():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    peer = LlamaForCausalLM(config).eval()
    model = Transformer(ModelConfig.from_hf(config.to_dict()))
    model.load_state_dict(peer.state_dict())
    return model, peer


IDS = torch.randint(0, 101, (100,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (63, 40), (60, None)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loss_equals_transformers_on_the_same_windows(twins, window, stride, batch_size):
    model, peer = twins
    total, count, first = 0.0, 0, 0
    for start in range(0, len(IDS) - 1, stride or window):  # window tokens read, each predicting the next
        end = min(start + window, len(IDS) - 1)
        ids = torch.tensor([IDS[start : end + 1]])
        labels = ids.clone()
        labels[:, : first - start + 1] = -100  # predicted in an earlier window already
        tokens = end - first
        with torch.no_grad():
            total += peer(ids, labels=labels).loss.item() * tokens
        count, first = count + tokens, end
        if end == len(IDS) - 1:
            break
    result = score_ids(model, IDS, window=window, stride=stride, batch_size=batch_size)
    assert result.tokens == count == len(IDS) - 1
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_interval_is_of_windows(twins):
    model, peer = twins
    ids = IDS[:1] + IDS[1:] * 2
    found = score_ids(model, ids, window=16, batch_size=3)
    losses = []
    for start in range(0, len(ids) - 1, 16):
        part = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            losses.append((peer(part, labels=part).loss.item() * (part.shape[1] - 1), part.shape[1] - 1))
    expected = interval(ratio_of(*zip(*losses, strict=True)))
    assert found.interval == pytest.approx(tuple(map(math.exp, expected)), rel=1e-4)
    assert found.interval[0] < found.perplexity < found.interval[1]
    assert score_ids(model, IDS, window=16).interval is None  # 7 windows say little


def test_bits_per_byte_divide_by_what_was_scored(roomy):
    model, tokenizer = load_model(roomy, dtype=torch.float32), load_tokenizer(roomy)
    text = "Grüße an alle, " * 20
    found = perplexity(model, tokenizer, text, window=64)
    size = len(text.encode()) - 1  # the first token is the byte G, and nothing precedes it
    assert found.tokens == size  # a token is a byte here, so that bits per byte are bits per token
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))
    assert found.bits_per_byte_interval is None  # of 6 windows
    many = perplexity(model, tokenizer, text, window=16)
    assert many.bits_per_byte_interval == pytest.approx(tuple(math.log2(edge) for edge in many.interval))
    cut = perplexity(model, tokenizer, text, window=64, max_tokens=100)
    assert (cut.tokens, cut.bits_per_byte) == (99, pytest.approx(cut.loss / math.log(2)))
    assert score_ids(model, IDS, window=16).bits_per_byte is None


@pytest.mark.parametrize("length, window, stride", [(2, 8, 8), (9, 8, 8), (10, 8, 3), (100, 10, 7), (17, 16, 1)])
def test_every_token_but_the_first_is_predicted_once(length, window, stride):
    windows = plan_windows(length, window, stride)
    predicted = [place + 1 for start, end, first in windows for place in range(first, end)]
    assert predicted == list(range(1, length))
    assert all(0 <= start <= first < end <= start + window for start, end, first in windows)


def test_the_full_logits_never_exist(twins, monkeypatch):
    model, _ = twins
    monkeypatch.setattr(Transformer, "logits", lambda *_: pytest.fail("the logits of a whole window were made"))
    model.train()
    heard = []
    result = score_ids(model, IDS, window=16, batch_size=4, on_batch=heard.append)
    assert sum(heard) == result.tokens
    assert model.training


def test_bad_settings_are_named(twins):
    model, _ = twins
    for values, line in [
        ({"window": 65}, "window is 65; it must be 2 to the model's 64"),
        ({"window": 1}, "window is 1"),
        ({"window": 16, "stride": 17}, "stride is 17"),
        ({"window": 16, "stride": 0}, "stride is 0"),
        ({"window": 16, "batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(ConfigError, match=line):
            score_ids(model, IDS, **values)
    with pytest.raises(DataError, match="the text has 1 token"):
        score_ids(model, [3], window=16)
