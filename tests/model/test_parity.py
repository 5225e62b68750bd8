"""Against transformers in fp32: logits, every layer's hidden state, every gradient, cached decoding."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitune.model.cache import KVCache
from minitune.model.config import ModelConfig
from minitune.model.transformer import Transformer

BAR = 1e-5  # relative


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def twins(heads=8, kv_heads=8, tied=True, bias=False, **fields):
    """A random model with realistic scales in transformers, and the same weights in ours."""
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        initializer_range=0.2, max_position_embeddings=64, attn_implementation="eager", **fields,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = Transformer(ModelConfig.from_hf(config.to_dict()), init=False)
    state = theirs.state_dict()
    if tied:
        state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return ours, theirs


def layer_outputs(model, ids):
    """Hidden state after each layer, by hooks, and the logits."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    out = model(ids)
    for hook in hooks:
        hook.remove()
    return seen, out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("tied,bias,head_dim", [(True, False, 8), (False, True, 8), (True, False, 16)])
def test_logits_hidden_states_and_gradients(kv_heads, tied, bias, head_dim):
    ours, theirs = twins(kv_heads=kv_heads, tied=tied, bias=bias, head_dim=head_dim, rope_theta=1000.0)
    ids = torch.randint(0, 101, (2, 17))
    (our_layers, our_logits), (their_layers, their_logits) = layer_outputs(ours, ids), layer_outputs(theirs, ids)
    assert relative(our_logits, their_logits) < BAR
    for a, b in zip(our_layers, their_layers, strict=True):
        assert relative(a, b) < BAR
    upstream = torch.randn_like(their_logits)
    (our_logits * upstream).sum().backward()
    (their_logits * upstream).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert relative(gradients[name].grad, parameter.grad) < BAR, name


@pytest.mark.parametrize("mutant", ["rope", "norm", "heads", "scale"])
def test_parity_catches_a_planted_bug(mutant, monkeypatch):
    ours, theirs = twins(kv_heads=2)
    ids = torch.randint(0, 101, (1, 9))
    import minitune.model.transformer as module

    if mutant == "rope":  # the halves swapped: turned the other way round
        right = module.apply_rope
        monkeypatch.setattr(module, "apply_rope", lambda x, cos, sin: right(x, cos, -sin))
    if mutant == "norm":
        right_norm = module.rms_norm
        monkeypatch.setattr(module, "rms_norm", lambda x, w, eps, o: right_norm(x, w, eps * 1000, o))
    if mutant == "heads":  # key/value heads in the other order
        right_attention = module.attention
        monkeypatch.setattr(
            module, "attention", lambda q, k, v, s, **o: right_attention(q, k.flip(1), v.flip(1), s, **o)
        )
    if mutant == "scale":
        right_scaled = module.attention
        monkeypatch.setattr(module, "attention", lambda q, k, v, s, **o: right_scaled(q * 1.01, k, v, s, **o))
    assert relative(ours(ids), theirs(ids).logits) > 10 * BAR


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_cached_decoding_equals_the_full_pass(kv_heads):
    ours, _ = twins(kv_heads=kv_heads)
    ids = torch.randint(0, 101, (2, 12))
    whole = ours(ids)
    cache = KVCache(ours.config, 2, 12)
    parts = [ours(ids[:, :5], cache=cache), ours(ids[:, 5:8], cache=cache)]
    parts += [ours(ids[:, t : t + 1], cache=cache) for t in range(8, 12)]
    assert relative(torch.cat(parts, 1), whole) < BAR


def test_left_padding_changes_nothing():
    ours, _ = twins(kv_heads=2)
    ids = torch.randint(0, 101, (1, 7))
    padded = torch.cat((torch.full((1, 3), 100), ids), 1)
    positions = (torch.arange(10) - 3).clamp(min=0)[None]
    assert relative(ours(padded, positions=positions)[:, 3:], ours(ids)) < BAR
    cache = KVCache(ours.config, 1, 11)
    ours(padded, positions=positions, cache=cache)
    step = ours(torch.tensor([[5]]), positions=torch.tensor([[7]]), cache=cache)
    assert relative(step[:, -1], ours(torch.cat((ids, torch.tensor([[5]])), 1))[:, -1]) < BAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients(dtype):
    ours, _ = twins(kv_heads=2)
    ours = ours.to(dtype)
    ids = torch.randint(0, 101, (2, 9))
    grads = []
    for on in (False, True):
        ours.gradient_checkpointing = on
        ours.zero_grad()
        ours(ids).float().square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_moving_to_another_dtype_keeps_grouped_weights_together():
    from minitune.ops.linear import stacked

    ours, _ = twins(kv_heads=2)
    attention = ours.bfloat16().model.layers[0].self_attn
    assert stacked([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None
