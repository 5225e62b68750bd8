# %% [markdown]
"""# 4. Families: one transformer, other values

Llama, Qwen, Gemma and GPT-2 look like four programs in most libraries. In minitune they are one file,
`model/transformer.py`, and a record of values, `ModelConfig`. This tutorial changes those values, one at a time, on a
real model, and watches its logits. Some values change everything, some only what is stored in the file, and some,
it turns out, are two ways to say the same thing. Each such claim is computed, and this file stops where it fails.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/04_families.py

The letters B T D H K d F V as in tutorial 1.
"""

# %%
import dataclasses
from pathlib import Path

import torch

import minitune
from minitune.errors import ConfigError
from minitune.model.config import ModelConfig
from minitune.model.rope import Rope
from minitune.model.transformer import Transformer
from minitune.sources import fetch

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)
config, weights = model.config, model.state_dict()
torch.set_grad_enabled(False)  # we only look

D, H, K, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
TOLERANCE = 1e-4  # 32-bit numbers through 30 layers


def apart(one, other):
    """Return how far one tensor is from the other, |one - other| / |other|."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def same(name, one, other):
    """Print and assert that two tensors are the same, up to rounding."""
    error = apart(one, other)
    print(f"  agree: {name}, {one.numel():,} numbers, {error:.1e} apart")
    assert one.shape == other.shape and error <= TOLERANCE, f"{name}: {error:.1e} apart"


# %% [markdown]
"""## 1. Four families as values

These are the fields of four published `config.json` files that say something about the arithmetic. `from_hf` turns
each into a `ModelConfig`. A field that it does not know is an error: to ignore it would be to answer wrongly without a
word.

Then we print only what differs from the first. GPT-2 (Radford et al. 2019) learns a vector for each of its 1,024
positions, its norms subtract the mean, its MLP has no gate, every layer has biases, and q, k and v lie in one matrix.
Llama dropped all that. Qwen2 is Llama with biases on q, k and v. Gemma 2 is Llama with other norms, other scales, two
caps, and a window of 4,096 tokens in every other layer.

The number of parameters follows from the values alone. The model is built on the "meta" device, which gives tensors a
shape and no memory.
"""

# %%
print("== 1. Four families as values")
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
FILES = {
    "Llama 3.2 1B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "hidden_act": "silu",
    },
    "Qwen2.5 0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "max_position_embeddings": 32768, "hidden_act": "silu",
        "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24,
    },
    "Gemma 2 2B": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "GPT-2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
}  # fmt: skip
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
         "family", "max_positions"}  # fmt: skip
configs = {name: ModelConfig.from_hf(fields, name) for name, fields in FILES.items()}
first = configs["Llama 3.2 1B"]
counts = {}
for name, values in configs.items():
    counts[name] = sum(p.numel() for p in Transformer(values, device="meta", init=False).parameters())
    print(f"  {name}: {counts[name]:,} parameters; layers {values.num_layers}, D={values.hidden_size},", end=" ")
    print(f"H={values.num_heads}, K={values.num_kv_heads}, d={values.head_dim}, F={values.intermediate_size}")
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value != getattr(first, field.name) and field.name not in SIZES:
            value = f"{value[0]}, {value[1]}, ..." if field.name == "windows" else value
            value = f"{value.kind}, theta {value.theta:,.0f}" if isinstance(value, Rope) else value
            print(f"      {field.name} = {value}")
assert list(counts.values()) == [1_235_814_400, 494_032_768, 2_614_341_888, 124_439_808]
assert configs["GPT-2"].rope is None and configs["GPT-2"].learned_positions and configs["GPT-2"].max_positions == 1_024
assert configs["Qwen2.5 0.5B"].attention_bias and not configs["Qwen2.5 0.5B"].output_bias
assert configs["Gemma 2 2B"].windows == (4_096, None) * 13 and configs["Gemma 2 2B"].embedding_scale == 2304**0.5
try:
    ModelConfig.from_hf(FILES["Llama 3.2 1B"] | {"num_experts": 8}, "config.json")
except ConfigError as error:
    print(f"  refused: {error}")
else:
    raise AssertionError("a field was ignored")

# %% [markdown]
"""## 2. One value at a time

SmolLM2 is a Llama of 30 layers. It continues "The capital of France is" with " Paris". `variant` builds the same model,
with the same weights, and one value changed. What does that do?

We measure the change of the last token's prediction by the Kullback-Leibler divergence from the original, in nats.
0 means the same prediction; a model that gives every token the same chance is 9.3 nats away.

The weights were trained with the old value, so a change can only hurt. How much it hurts tells what the value does.
"""

# %%
print("== 2. One value at a time")


def variant(extra=None, base=config, **changes):
    """Build the model with other values and the same weights, or with some weights replaced or added."""
    changed = Transformer(dataclasses.replace(base, **changes), device="meta", init=False)
    given = {**weights, **(extra or {})}
    changed.load_state_dict({name: given[name] for name in changed.state_dict()}, assign=True)
    return changed.eval()


def divergence(logits, changed):
    """KL(original || changed) of the last token's predictions, in nats."""
    p, q = logits[0, -1].double().log_softmax(-1), changed[0, -1].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


ids = torch.tensor([tokenizer.encode("The capital of France is")])
logits = model(ids)
turns = config.rope
EVERY = tuple((layer + 1) % 4 != 0 for layer in range(config.num_layers))  # SmolLM3's pattern
CHANGES = {
    "rope theta x 10": {"rope": dataclasses.replace(turns, theta=10 * turns.theta)},
    "rope theta / 10": {"rope": dataclasses.replace(turns, theta=turns.theta / 10)},
    "half of each head turned (like Pythia)": {"rope": dataclasses.replace(turns, share=0.5)},
    "every 4th layer without rope (SmolLM3)": {"rope_layers": EVERY},
    "no rope": {"rope": None},
    "window of 2 tokens (Mistral)": {"windows": (2,) * config.num_layers},
    "scores capped at 50 (Gemma 2)": {"attention_softcap": 50.0},
    "scores capped at 5": {"attention_softcap": 5.0},
    "attention scale x 2": {"attention_scale": 2 * d**-0.5},
    "GELU for SiLU (Gemma)": {"activation": "gelu_tanh"},
    "LayerNorm for RMSNorm (GPT-2)": {"norm": "layer"},
    "norm weights + 1 (Gemma)": {"norm_offset": 1.0},
    "embedding x sqrt(D) (Gemma)": {"embedding_scale": D**0.5},
    "residuals x 0.22 (Granite)": {"residual_scale": 0.22},
    "attention and MLP side by side (NeoX)": {"parallel_residual": True},
}


def with_norm_biases():
    """Return zeros for the biases that LayerNorm has and RMSNorm has not."""
    return {f"{name[:-6]}bias": torch.zeros_like(value) for name, value in weights.items() if "norm.weight" in name}


effect = {}
print(f"  original: {tokenizer.decode([logits[0, -1].argmax().item()])!r}")
for name, changes in CHANGES.items():
    changed = variant(with_norm_biases() if "norm" in changes else None, **changes)(ids)
    effect[name] = divergence(logits, changed)
    print(f"  {name:46} {effect[name]:8.4f} nats, {tokenizer.decode([changed[0, -1].argmax().item()])!r}")
print(f"  {'(every token the same chance)':46} {divergence(logits, torch.zeros_like(logits)):8.4f} nats")
assert tokenizer.decode([logits[0, -1].argmax().item()]) == " Paris" and config.num_layers == 30
assert round(divergence(logits, torch.zeros_like(logits)), 1) == 9.3

# %% [markdown]
"""The list has surprises. Rope's theta hardly matters in a text of 5 tokens, and no rope at all costs less than a nat:
the causal mask alone says a lot about the order. A cap of 50 hardly bends the scores. To subtract the mean in the
norms, as GPT-2 does, costs next to nothing, because there is hardly a mean to subtract: we measure its part in the
squares that go into each layer.

What ruins the model, to worse than giving every token the same chance, is a window of 2 tokens, a factor in the wrong
place, or an MLP that reads what attention has not been added to. Such a model still loads and still answers. That is
why a field is never ignored.
"""

# %%
ranked = sorted(effect, key=effect.get)
assert ids.shape[1] == 5 and CHANGES[ranked[0]] == {"attention_softcap": 50.0}
means = []
hooks = [
    layer.input_layernorm.register_forward_pre_hook(lambda _, given: means.append(given[0][0]))
    for layer in model.model.layers
]
model(ids)
for hook in hooks:
    hook.remove()
shares = torch.stack([(x.mean(-1).square() / x.square().mean(-1)).mean() for x in means])
print(f"  the mean's part of the squares, over the layers: {shares.mean():.4f}, at most {shares.max():.4f}")
assert len(shares) == config.num_layers and shares.max() < 0.01
assert effect["no rope"] < 1 and effect["LayerNorm for RMSNorm (GPT-2)"] < 0.1
assert set(ranked[-4:]) == {"window of 2 tokens (Mistral)", "norm weights + 1 (Gemma)", "embedding x sqrt(D) (Gemma)",
                            "attention and MLP side by side (NeoX)"}  # fmt: skip
assert all(effect[name] > 9.3 for name in ranked[-4:])
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(ranked, [effect[name] for name in ranked])
    axes.axvline(9.3, color="grey", linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("KL from the original, nats (dotted: all tokens alike)")
    axes.set_title("one value changed, the weights as they were")
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/families.png", dpi=120)
    print("  picture: runs/tutorials/families.png")

# %% [markdown]
"""## 3. Position: turned or added

Rope (Su et al. 2021) turns each pair of a query and a key by an angle that grows with the position. A score then knows
only the distance. So we may number the tokens from 100 instead of 0, and the logits stay. Where positions are learned
and added, as in GPT-2, they do not: the model has never heard that position 100 is like position 0.

Linear scaling divides the positions by a factor (Chen et al. 2023), to fit a long text into the trained range. With
every position doubled and a factor of 2 we are back where we were.
"""

# %%
print("== 3. Position: turned or added")
text = (
    "She opened the old letter slowly, read it twice, folded it again and put it back into the drawer. "
    "Then she looked out of the window and saw that it had begun to snow over the quiet town."
)
ids = torch.tensor([tokenizer.encode(text)[:40]])
T = ids.shape[1]
logits, places = model(ids), torch.arange(T)[None]
same("rope, numbered from 100", model(ids, positions=places + 100), logits)
drawn = torch.randn(config.max_positions, D, generator=torch.Generator().manual_seed(0)) * 0.02
learned = variant({"model.embed_positions.weight": drawn}, rope=None, learned_positions=True)
moved = apart(learned(ids, positions=places + 100), learned(ids))
print(f"  learned positions, numbered from 100: {moved:.2f} apart")
assert moved > 100 * TOLERANCE and T == 40
linear = variant(rope=dataclasses.replace(turns, kind="linear", factor=2.0))
same("positions doubled, linear factor 2", linear(ids, positions=2 * places), logits)

# %% [markdown]
"""## 4. Windows: how far a token can see

In Mistral's first model and in half of Gemma 2's layers a token sees itself and some tokens before it, w together. But
layers stack: what token 0 told token 1 in one layer, token 1 can tell token 2 in the next. With L layers a token hears
from up to (w - 1) L tokens back. Here w is 2 and L is 30, so token 30 may know of token 0, and token 31 can't.

We change token 0 and look where the logits move. Beyond its reach the change is not small. It is exactly 0.
"""

# %%
print("== 4. Windows: how far a token can see")
narrow, other = variant(windows=(2,) * config.num_layers), ids.clone()
other[0, 0] += 1
heard = (narrow(ids) - narrow(other))[0].abs().amax(-1)  # (T,)
reach = (2 - 1) * config.num_layers
print(f"  T={T}, w=2, L={config.num_layers}: token 0 is heard by tokens up to {int(heard.nonzero().max())}")
assert reach == 30 and (heard[reach + 1 :] == 0).all() and heard[31] == 0 and (heard[:10] > 0).all()
alternating = tuple(2 if layer % 2 == 0 else None for layer in range(config.num_layers))
heard = (variant(windows=alternating)(ids) - variant(windows=alternating)(other))[0].abs().amax(-1)
print(f"  w=2 in every other layer (Gemma 2): up to {int(heard.nonzero().max())}")
assert int(heard.nonzero().max()) == T - 1
assert torch.equal(variant(windows=(T,) * config.num_layers)(ids), logits)
print("  a window as long as the text: equal, bit for bit")

# %% [markdown]
"""## 5. Norms: three ways, and where they are the same

Gemma stores w - 1 for each norm weight w, and adds the 1 when it runs. That changes no result, only the file. We take 1
from all norm weights and set the offset to 1: the same logits. (Section 2 did the second without the first.)

LayerNorm (Ba et al. 2016) is RMSNorm (Zhang & Sennrich 2019) of what is left when the mean is taken away.

Qwen3 and Gemma 3 norm each head of the queries and keys too. Then the length of a query no longer counts: we make all
queries 8 times as long, and nothing moves. Without these norms the same change turns the softmax into a maximum.
"""

# %%
print("== 5. Norms: three ways")
stored = {name: value - 1 for name, value in weights.items() if name.endswith("norm.weight")}
same("w - 1 stored and 1 added", variant(stored, norm_offset=1.0)(ids), logits)
x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)) + 3
rest = x - x.mean(-1, keepdim=True)
by_hand = rest / (rest.square().mean(-1, keepdim=True) + 1e-5).sqrt()
same("LayerNorm, and RMSNorm without the mean", torch.nn.functional.layer_norm(x, (D,), eps=1e-5), by_hand)
longer = {name: 8 * value for name, value in weights.items() if "q_proj" in name}
ones = {f"model.layers.{layer}.self_attn.{part}_norm.weight": torch.ones(d)
        for layer in range(config.num_layers) for part in "qk"}  # fmt: skip
same(
    "queries 8 times as long, under a norm",
    variant({**longer, **ones}, qk_norm="head")(ids),
    variant(ones, qk_norm="head")(ids),
)
moved = apart(variant(longer)(ids), logits)
print(f"  queries 8 times as long, without: {moved:.2f} apart")
assert moved > 100 * TOLERANCE and torch.equal(longer[min(longer)] / 8, weights[min(longer)])
del longer, ones, learned, drawn

# %% [markdown]
"""## 6. Multipliers and caps: what they are worth

Some values are another way to write weights:

- Granite divides its logits. By 2 halves them, and the order of the tokens stays.
- Twice the attention scale is twice the query weights. Gemma 2's `query_pre_attn_scalar` is such a scale.
- Gemma multiplies embeddings by sqrt(D). A norm forgets the length of what it gets, so it is only the ratio to what the
  layers add that counts: embeddings times 4 and residuals times 4 give the old logits (with 16 times the epsilon, which
  is added to a square).

A cap c bends a number z to c tanh(z / c) (Gemma team 2024, section 2). It never changes which token is first, and
leaves small numbers alone: but it changes the loss, so whoever forgets it in training trains another model.
"""

# %%
print("== 6. Multipliers and caps")
same("logits divided by 2", variant(logits_scale=2.0)(ids), logits / 2)
double = {name: 2 * value for name, value in weights.items() if "q_proj" in name}
same("attention scale and query weights, doubled", variant(attention_scale=2 * d**-0.5)(ids), variant(double)(ids))
scaled = variant(embedding_scale=4.0, residual_scale=4.0, norm_eps=16 * config.norm_eps)
same("embeddings and residuals times 4", scaled(ids), logits)
assert 16 == 4**2
capped = variant(logits_softcap=30.0)(ids)
same("capped at 30, by hand", 30 * torch.tanh(logits / 30), capped)
assert torch.equal(capped.argmax(-1), logits.argmax(-1)) and capped.abs().max() < 30
del double, scaled
losses = [-z[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).mean().item() for z in (logits, capped)]
print(
    f"  largest logit {logits.abs().max():.1f}, capped {capped.abs().max():.1f}; loss {losses[0]:.4f}, {losses[1]:.4f}"
)
assert abs(losses[0] - losses[1]) > 1e-3

# %% [markdown]
"""## 7. Other files, the same arithmetic

SmolLM2 has 9 query heads and 3 key/value heads, each shared by 3 queries (Ainslie et al. 2023). Copy each key/value
head 3 times, and you have the older form, with a cache 3 times as large and the same logits.

Phi-3 stores q, k and v as one matrix, rows end to end; GPT-NeoX stores them head by head. Qwen2 has biases: with zeros
for them it is Llama. An untied head with a copy of the embedding is a tied one. A reader that mixes up such an order
gets a model that talks nonsense; so does one that swaps the halves of a head, which rope pairs.
"""

# %%
print("== 7. Other files, the same arithmetic")
G = H // K
assert (H, K, G) == (9, 3, 3)
copied = {name: value.unflatten(0, (K, d)).repeat_interleave(G, 0).flatten(0, 1)
          for name, value in weights.items() if "k_proj" in name or "v_proj" in name}  # fmt: skip
same("each key/value head copied 3 times", variant(copied, num_kv_heads=H)(ids), logits)


def joined(values, join):
    """Return the layers' q, k and v matrices as one each, made by `join`."""
    blocks = [f"model.layers.{layer}.self_attn." for layer in range(config.num_layers)]
    return {f"{block}qkv_proj.weight": join(*(values[f"{block}{part}_proj.weight"] for part in "qkv"))
            for block in blocks}  # fmt: skip


def head_by_head(q, k, v):
    """Lay the rows of head 0 of q, k and v first, then those of head 1: (H, 3, d, D)."""
    return torch.stack([part.unflatten(0, (H, d)) for part in (q, k, v)], 1).flatten(0, 2)


gates = {name.replace("gate_proj", "gate_up_proj"): torch.cat((value, weights[name.replace("gate", "up")]))
         for name, value in weights.items() if "gate_proj" in name}  # fmt: skip
stacked = {**gates, **joined(weights, lambda *parts: torch.cat(parts))}
same("q, k, v end to end (Phi-3)", variant(stacked, fused="stacked")(ids), logits)
del stacked
each = {**gates, **joined({**weights, **copied}, head_by_head)}
same("q, k, v head by head (GPT-NeoX)", variant(each, fused="by_head", num_kv_heads=H)(ids), logits)
wrong = variant(each, fused="stacked", num_kv_heads=H)(ids)
print(f"  the second file read in the first order: {divergence(logits, wrong):.1f} nats")
assert divergence(logits, wrong) > 1
del gates, each
zeros = {name.replace("weight", "bias"): torch.zeros(len(value)) for name, value in weights.items()
         if any(f"{part}_proj" in name for part in "qkv")}  # fmt: skip
same("biases of zeros (Qwen2)", variant(zeros, attention_bias=True)(ids), logits)
same("an untied head with a copy", variant({"lm_head.weight": model.head_weight}, tie_embeddings=False)(ids), logits)
halves = {name: value.unflatten(0, (-1, 2, d // 2)).flip(1).flatten(0, 2)
          for name, value in weights.items() if "q_proj" in name or "k_proj" in name}  # fmt: skip
print(f"  the halves of each head swapped: {divergence(logits, variant(halves)(ids)):.1f} nats")
assert divergence(logits, variant(halves)(ids)) > 1

# %% [markdown]
"""How do we know that all this is what the families' authors meant? Not from this file, which compares the engine with
itself. `make parity` compares it with transformers: every family and every kind of rope, logits, gradients and training
runs, every field of every config. The result is `tests/PARITY.md`.
"""

# %%
print("== every number agreed")
