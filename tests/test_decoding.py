"""Decoding against transformers: greedy token for token, every filter's kept set; sampling against its distribution."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as hf

from minitune import sampling as ours
from minitune.decoding import SHARED_PREFIX, _AnswerStream, encode_prompt, generate_ids, generate_texts
from minitune.errors import ConfigError, DataError
from minitune.model.config import ModelConfig
from minitune.model.lora import LoRAConfig, add_lora
from minitune.model.transformer import Transformer
from minitune.sampling import Sampling, next_tokens

VOCABULARY = 97


def twins(kv_heads: int) -> tuple[Transformer, LlamaForCausalLM]:
    """Return the same random model in both libraries."""
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=kv_heads, max_position_embeddings=128, initializer_range=0.6,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    peer = LlamaForCausalLM(config).eval()
    model = Transformer(ModelConfig.from_hf(config.to_dict()))
    model.load_state_dict(peer.state_dict())
    return model, peer


def ragged_prompts(seed: int, *, shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()  # noqa: E731
    prefix = draw(shared)
    return [prefix + draw(size) for size in (5, 1, 17, 5, 30)]


def peer_greedy(peer, prompts, count, end_ids=(), **options) -> list[list[int]]:
    """Return transformers' greedy continuation, left-padded, without the end token and what follows it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"eos_token_id": list(end_ids) or None, **options}
    result = peer.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)
    answers = []
    for row in result[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in end_ids), len(row))
        answers.append(row[:end])
    return answers


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("shared", [0, 20])
def test_greedy_equals_transformers_token_for_token(kv_heads, shared):
    model, peer = twins(kv_heads)
    prompts = ragged_prompts(kv_heads, shared=shared)
    free = generate_ids(model, prompts, max_new_tokens=20)
    assert free == peer_greedy(peer, prompts, 20)
    # End tokens that do occur, so that rows leave the batch at different steps.
    ends = sorted({free[0][3], free[1][8], free[4][0]})
    expected = peer_greedy(peer, prompts, 20, ends)
    assert len({len(row) for row in expected}) > 2
    assert generate_ids(model, prompts, max_new_tokens=20, end_ids=ends) == expected
    assert generate_ids(model, prompts, max_new_tokens=20, end_ids=ends, batch_size=2) == expected


def test_greedy_with_repetition_penalty_equals_transformers():
    model, peer = twins(2)
    prompts = [prompt[:5] + [9] * 3 for prompt in ragged_prompts(3)]
    prompts = [prompt for prompt in prompts if len(prompt) == 8]  # padding would be penalised by the peer
    expected = peer_greedy(peer, prompts, 24, repetition_penalty=1.7)
    assert expected != peer_greedy(peer, prompts, 24)
    assert generate_ids(model, prompts, max_new_tokens=24, sampling=Sampling(repetition_penalty=1.7)) == expected


def test_padding_is_not_penalised():
    model, _ = twins(2)
    sampling = Sampling(repetition_penalty=1.7)
    prompts = ragged_prompts(5)
    alone = [generate_ids(model, [prompt], max_new_tokens=12, sampling=sampling)[0] for prompt in prompts]
    assert generate_ids(model, prompts, max_new_tokens=12, sampling=sampling) == alone


def random_logits() -> torch.Tensor:
    return torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("k", [1, 7, 200, 500])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = random_logits()
    logits[0, :9] = logits[0].max() + 1  # ties at the border stay
    torch.testing.assert_close(ours.keep_top_k(logits, k), hf.TopKLogitsWarper(k)(None, logits), rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = random_logits()
    torch.testing.assert_close(ours.keep_top_p(logits, p), hf.TopPLogitsWarper(p)(None, logits), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(share):
    logits = random_logits()
    torch.testing.assert_close(ours.keep_min_p(logits, share), hf.MinPLogitsWarper(share)(None, logits), rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits()
    ids = torch.randint(0, 200, (6, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 200, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(ours.penalise_repetition(logits, seen, penalty), expected)


def test_filters_apply_in_the_order_of_transformers():
    logits, sampling = random_logits(), Sampling(temperature=1.7, top_k=40, top_p=0.8, min_p=0.1)
    scores = logits
    scores = hf.TopKLogitsWarper(40)(None, hf.TemperatureLogitsWarper(1.7)(None, scores))
    scores = hf.MinPLogitsWarper(0.1)(None, hf.TopPLogitsWarper(0.8)(None, scores))
    # The draw at every quantile visits exactly the kept tokens.
    quantiles = torch.linspace(0, 0.99999, 4000)
    for row in range(6):
        drawn = next_tokens(logits[row].expand(4000, -1), sampling, None, quantiles)
        assert set(drawn.tolist()) == set(torch.isfinite(scores[row]).nonzero()[:, 0].tolist())


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20000, -1)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = next_tokens(logits, Sampling(temperature=0.7), None, uniforms).bincount(minlength=4)
    expected = (logits[0] / 0.7).softmax(0) * 20000
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.27  # 0.1% point with 3 degrees of freedom


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24])  # both ends of what torch.rand returns
    assert next_tokens(logits, Sampling(temperature=1.0), None, uniforms).tolist() == [1, 3, 3]


def test_a_sampled_row_does_not_depend_on_its_batch():
    model, _ = twins(2)
    model.double()
    prompts, sampling = ragged_prompts(7), Sampling(temperature=0.8, top_p=0.95)
    together = generate_ids(model, prompts, max_new_tokens=15, sampling=sampling, seed=3)
    apart = generate_ids(model, prompts, max_new_tokens=15, sampling=sampling, seed=3, batch_size=1)
    assert together == apart
    assert together != generate_ids(model, prompts, max_new_tokens=15, sampling=sampling, seed=4)
    assert together[0] != together[3] or prompts[0] != prompts[3]


def test_equal_prompts_get_samples_of_their_own():
    model, _ = twins(2)
    first, second = generate_ids(model, [[5, 6]] * 2, max_new_tokens=15, sampling=Sampling(temperature=1.0))
    assert first != second


def test_callback_sees_each_token_and_ends_its_row():
    model, _ = twins(8)
    prompts = ragged_prompts(2)
    free = generate_ids(model, prompts, max_new_tokens=10)
    heard: list[list[int]] = [[] for _ in prompts]

    def on_token(row, token):
        heard[row].append(token)
        return row == 1 and len(heard[row]) == 4

    stopped = generate_ids(model, prompts, max_new_tokens=10, on_token=on_token)
    assert stopped == heard == [ids[:4] if row == 1 else ids for row, ids in enumerate(free)]


def test_dropout_is_off_and_the_mode_is_put_back():
    model, _ = twins(8)
    adapters = add_lora(model, LoRAConfig(rank=4, dropout=0.5))
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    model.train()
    runs = [generate_ids(model, [[5, 6, 7]], max_new_tokens=10) for _ in range(2)]
    assert runs[0] == runs[1]
    assert model.training
    model(torch.tensor([[5, 6, 7]])).sum().backward()  # nothing made while generating stays in the way


@pytest.mark.parametrize(
    "values, line",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1, "min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
    ],
)
def test_sampling_refuses_what_has_no_meaning(values, line):
    with pytest.raises(ConfigError, match=line):
        Sampling(**values)


def test_bad_prompts_are_refused_before_any_work():
    model, _ = twins(8)
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        generate_ids(model, [[3], []], max_new_tokens=4)
    with pytest.raises(DataError, match="125 tokens and 4 new ones may follow.*at most 128"):
        generate_ids(model, [[3] * 125], max_new_tokens=4)
    with pytest.raises(DataError, match="vocabulary"):
        generate_ids(model, [[VOCABULARY]], max_new_tokens=4)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate_ids(model, [[3]], max_new_tokens=0)
    assert generate_ids(model, [], max_new_tokens=4) == []


class Letters:
    """A decoder whose token n is the n-th piece of a fixed text."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        return ""


@pytest.mark.parametrize(
    "pieces, stop, text, stopped",
    [
        (["one ", "two"], (), "one two", False),
        (["one E", "N", "D two"], ("END",), "one ", True),  # across token borders
        (["one E", "N", " two"], ("END",), "one EN two", False),  # held back, then released
        (["one E", "N"], ("END",), "one EN", False),  # held back at the end of the answer
        (["aab"], ("ab", "b"), "a", True),  # the earliest of several
        (["\n", "\n", "x"], ("\n\n",), "", True),
    ],
)
def test_stop_strings_cut_exactly(pieces, stop, text, stopped):
    stream = _AnswerStream(Letters(*pieces), stop)
    shown = ""
    for token in range(len(pieces)):
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    assert (shown, stream.text, stream.stopped) == (text, text, stopped)


@pytest.fixture(scope="module")
def real(smollm2_path):
    """SmolLM2 in both libraries, and its tokenizer."""
    from minitune import load_model, load_tokenizer

    model, tokenizer = load_model(smollm2_path, dtype="float32"), load_tokenizer(smollm2_path)
    fields = model.config.to_hf()
    del fields["architectures"], fields["model_type"]
    peer = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    weights = model.state_dict()
    peer.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model, tokenizer, peer


def test_real_model_equals_transformers_greedily(real):
    model, tokenizer, peer = real
    texts = ["What is the capital of France?", "Count from 1 to 5.", "Name a colour and say why you like it."]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    assert len(os.path.commonprefix(prompts)) >= SHARED_PREFIX  # the system message is read once
    expected = peer_greedy(peer, prompts, 10, tokenizer.end_ids)
    assert generate_ids(model, prompts, max_new_tokens=10, end_ids=tokenizer.end_ids) == expected
    assert "Paris" in tokenizer.decode(expected[0])


def test_face_streams_what_it_returns(real):
    import minitune

    model, tokenizer, _ = real
    heard = []
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = minitune.generate(model, tokenizer, messages, max_new_tokens=6, on_text=heard.append)
    assert answer == "".join(heard)
    stopped = minitune.generate(model, tokenizer, messages[0]["content"], max_new_tokens=6, stop=["l of"])
    assert stopped == answer.split("l of")[0] != answer
    sampled = minitune.generate(model, tokenizer, messages, max_new_tokens=3, temperature=3.0, seed=1)
    assert sampled == minitune.generate(model, tokenizer, messages, max_new_tokens=3, temperature=3.0, seed=1)
    assert not answer.startswith(sampled)


def test_raw_text_is_continued_without_template(real):
    model, tokenizer, peer = real
    (expected,) = peer_greedy(peer, [tokenizer.encode("The capital of France is")], 4)
    (answer,) = generate_texts(model, tokenizer, ["The capital of France is"], max_new_tokens=4, raw=True)
    assert answer.text == tokenizer.decode(expected)
    assert (answer.tokens, answer.finished) == (4, False)


def test_bad_requests_are_named(real):
    import minitune

    model, tokenizer, _ = real
    for options, line in [
        ({"temprature": 1.0}, "no option 'temprature'; did you mean 'temperature'"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"top_k": 5}, "top_k has no effect"),
    ]:
        with pytest.raises(ConfigError, match=line):
            minitune.generate(model, tokenizer, "Hi", **options)
    for prompt in ("", " \n", []):
        with pytest.raises(DataError, match="the prompt is empty"):
            minitune.generate(model, tokenizer, prompt)
    with pytest.raises(ConfigError, match="raw continues plain text"):
        minitune.generate(model, tokenizer, [{"role": "user", "content": "Hi"}], raw=True)
