# %% [markdown]
"""# 1. One token through the model

We send a short text through SmolLM2 (Allal et al. 2025), a real language model, and follow it tensor by tensor.
Each tensor is computed twice: by hand, from the formula in its paper, and by the engine. Both must agree, or
this file stops with an error. So you can change any line and see at once what it means.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/01_forward_pass.py

Shapes are written with these letters, here and everywhere in minitune:

    B  batch: texts at a time           H  heads: queries per token
    T  time: tokens in the text         K  key/value heads, shared by the queries
    D  width of the model               d  width of one head
    F  width of the feed-forward part   V  vocabulary: tokens that exist
"""

# %%
import math
from pathlib import Path

import torch

import minitune
from minitune.model.cache import KVCache
from minitune.model.transformer import Context
from minitune.ops.attention import Visibility, attention
from minitune.ops.rope import apply_rope, rope_tables
from minitune.sources import fetch

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)
config = model.config
torch.set_grad_enabled(False)  # we only look; tutorial 3 trains

D, H, K, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
F, V, L = config.intermediate_size, config.vocab_size, config.num_layers

# %% [markdown]
"""Two helpers. `show` prints a tensor and checks its shape. `check` compares our number with the engine's.

By hand we use 64-bit numbers and the engine uses 32-bit ones. A 32-bit number has 24 binary digits, so it is
right to about 1 part in 16,777,216. After many sums the errors are a little larger. We allow 1 part in 100,000.
"""

# %%
TOLERANCE = 1e-5
assert TOLERANCE == 1 / 100_000 and 2 / torch.finfo(torch.float32).eps == 2**24 == 16_777_216
assert torch.finfo(torch.float64).bits == 64 and torch.finfo(torch.float32).bits == 32


def show(name, tensor, shape):
    """Print name, shape and first numbers of a tensor; `shape` is written in letters, as "B T H*d"."""
    sizes = {"B": B, "T": T, "D": D, "H": H, "K": K, "d": d, "F": F, "V": V, "2": 2}
    expected = tuple(math.prod(sizes[letter] for letter in part.split("*")) for part in shape.split())
    assert tuple(tensor.shape) == expected, f"{name} has shape {tuple(tensor.shape)}, not {shape}"
    letters = ", ".join(f"{part}={size}" for part, size in zip(shape.split(), expected, strict=True))
    numbers = " ".join(f"{value:8.4f}" for value in tensor.flatten()[:4].tolist())
    print(f"  {name:16} ({letters})  {numbers} ...")


def check(name, by_hand, engine):
    """Print and assert that two results are the same number, or the same tensor, up to rounding."""
    by_hand, engine = (torch.as_tensor(x, dtype=torch.float64) for x in (by_hand, engine))
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    error = ((by_hand - engine).abs().max() / by_hand.abs().max()).item()
    value = f"{by_hand.item():.6f} and {engine.item():.6f}" if by_hand.dim() == 0 else f"{by_hand.numel():,} numbers"
    print(f"  agree: {name}, {value}, largest error {error:.1e}")
    assert error <= TOLERANCE, f"{name}: by hand and engine differ by {error:.1e}"


# %% [markdown]
"""## 1. Text to ids

A tokenizer cuts the text into pieces that it knows, and gives the number of each. Our text has 5 pieces. The
model never sees letters, only these 5 numbers.
"""

# %%
print("== 1. Text to ids")
prompt = "The capital of France is"
ids = torch.tensor([tokenizer.encode(prompt)])  # (B, T)
B, T = ids.shape
pieces = [tokenizer.decode([id]) for id in ids[0].tolist()]
print(f"  {prompt!r} -> {pieces} -> {ids[0].tolist()}")
show("ids", ids, "B T")
assert T == 5 and "".join(pieces) == prompt

# %% [markdown]
"""## 2. The embedding: an id picks a row

The embedding is a table with one row for each of the 49,152 tokens. A row has 576 numbers. The id is the row
number. There is no arithmetic in this step.

From here on every token has a vector of width D. We call it `h`, the hidden state. All layers add to it.
"""

# %%
print("== 2. The embedding")
table = model.model.embed_tokens.weight  # (V, D)
show("table", table, "V D")
h = torch.stack([table[id] for id in ids[0].tolist()]).unsqueeze(0).double()  # (B, T, D)
show("h", h, "B T D")
check("embedding", h, model.model.embed_tokens(ids))
assert (V, D) == (49_152, 576)

# %% [markdown]
"""## 3. RMSNorm: every vector to the same size

Before each part of a layer, the vector is divided by its root mean square, then each of its D numbers is
multiplied by a learned weight (Zhang & Sennrich 2019, equation 4):

    norm(x)_i = w_i * x_i / sqrt(mean(x^2) + eps)

The small `eps`, here 0.00001, keeps us from dividing by zero. First one number, with nothing but Python floats.
"""

# %%
print("== 3. RMSNorm")
layer = model.model.layers[0]
row = h[0, -1].tolist()  # the vector of the last token
mean_square = sum(x * x for x in row) / D
first = layer.input_layernorm.weight[0].item() * row[0] / math.sqrt(mean_square + config.norm_eps)
assert config.norm_eps == 0.00001


def norm(x, weight):
    """RMSNorm of the last dimension, from the formula."""
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()


x = norm(h, layer.input_layernorm.weight)  # (B, T, D)
show("x = norm(h)", x, "B T D")
engine_x = layer.input_layernorm(h.float())
check("one number of the norm", first, engine_x[0, -1, 0])
check("norm", x, engine_x)

# %% [markdown]
"""## 4. Queries, keys and values

Attention lets a token read from earlier ones. Each token makes, with three matrices,

- a query for each of the 9 heads: what am I looking for?
- a key for each of the 3 key/value heads: what do I have?
- a value for each of the 3 key/value heads: what do I hand over?

Each is a vector of 64 numbers. A linear layer is `y = x W^T`: number j of y is the dot product of x with row j
of W.
"""

# %%
print("== 4. Queries, keys and values")
attn = layer.self_attn


def linear(x, module):
    """Compute x W^T; W has one row for each output."""
    return x @ module.weight.double().T


q = linear(x, attn.q_proj)  # (B, T, H d)
k, v = linear(x, attn.k_proj), linear(x, attn.v_proj)  # (B, T, K d)
show("q, flat", q, "B T H*d")
show("k, flat", k, "B T K*d")
one = sum(a * b for a, b in zip(x[0, -1].tolist(), attn.q_proj.weight[0].tolist(), strict=True))
check("one number of q", one, attn.q_proj(engine_x)[0, -1, 0])
check("q", q, attn.q_proj(engine_x))
check("k", k, attn.k_proj(engine_x))
check("v", v, attn.v_proj(engine_x))
q, k, v = q.view(B, T, H, d), k.view(B, T, K, d), v.view(B, T, K, d)  # cut into heads
show("q, by heads", q, "B T H d")
show("k, by heads", k, "B T K d")
show("v, by heads", v, "B T K d")
assert (H, K, d) == (9, 3, 64)

# %% [markdown]
"""## 5. Rope: the place of a token is an angle

So far a token does not know where it stands. Rotary position embedding (Su et al. 2021, equations 14 and 34)
turns queries and keys by an angle that grows with the position.

The 64 numbers of a head are 32 pairs. In this checkpoint pair i is number i and number i + 32. A pair (a, b) is
a point in the plane, and we turn it around the origin:

    angle = position * theta^(-2i/d)
    (a, b) -> (a cos(angle) - b sin(angle),  b cos(angle) + a sin(angle))

Here theta is 100,000. Pair 0 turns fast, by 1 radian for each token. The last pair turns slowly. It feels only
long distances.
"""

# %%
print("== 5. Rope")
theta = config.rope.theta
position, pair = T - 1, 0  # the last token, its fastest pair
a, b = q[0, position, 0, pair].item(), q[0, position, 0, pair + d // 2].item()
angle = position * theta ** (-2 * pair / d)
turned_a = a * math.cos(angle) - b * math.sin(angle)
turned_b = b * math.cos(angle) + a * math.sin(angle)
print(f"  position {position}, head 0, pair {pair}: ({a:.4f}, {b:.4f}) by {angle:.2f} rad -> "
      f"({turned_a:.4f}, {turned_b:.4f})")  # fmt: skip
assert math.isclose(math.hypot(a, b), math.hypot(turned_a, turned_b))  # a turn keeps the length
assert theta == 100_000 and d == 64 and d // 2 == 32 and theta ** (-2 * 0 / d) == 1
slowest = theta ** (-2 * 31 / d)
print(f"  the slowest pair turns by {slowest:.7f} rad a token: once around in {2 * math.pi / slowest:,.0f} tokens")


def rotate(x, positions):
    """Turn all pairs of x (B, T, heads, d); positions (T,)."""
    angles = positions[:, None].double() * theta ** (-torch.arange(0, d, 2).double() / d)  # (T, d/2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, d/2): the same for all heads
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


positions = torch.arange(T)
unturned_q, unturned_k = q, k
q, k = rotate(q, positions), rotate(k, positions)
show("q, turned", q, "B T H d")
show("k, turned", k, "B T K d")
tables = rope_tables(positions[None], d, theta)
check("the pair, first number", turned_a, apply_rope(unturned_q.float(), *tables)[0, position, 0, pair])
check("q turned", q, apply_rope(unturned_q.float(), *tables))
check("k turned", k, apply_rope(unturned_k.float(), *tables))

# %% [markdown]
"""Why turns? A dot product of two turned vectors depends only on the difference of their angles (Su et al. 2021,
equation 16). So a query at position 4 sees a key at position 2 exactly as one at position 104 sees one at 102.
The model learns "two tokens back", not "token number 2".
"""

# %%
query, key = unturned_q[:, -1:, :1], unturned_k[:, 2:3, :1]  # one head each, (1, 1, 1, d)


def product(i, j):
    """Dot product of the query turned to position i with the key turned to position j."""
    return (rotate(query, torch.tensor([i])) * rotate(key, torch.tensor([j]))).sum().item()


print(f"  query at 4, key at 2: {product(4, 2):.6f}; at 104 and 102: {product(104, 102):.6f}; "
      f"at 4 and 3: {product(4, 3):.6f}")  # fmt: skip
assert math.isclose(product(4, 2), product(104, 102)) and not math.isclose(product(4, 2), product(4, 3))

# %% [markdown]
"""## 6. Scores: which token looks at which

A score is the dot product of a query and a key, divided by sqrt(d), which is 8 (Vaswani et al. 2017, equation
1). Without the division the scores of wide heads would be large, and the softmax below would see only one
token.

There are 9 query heads and only 3 key heads. Heads 0, 1, 2 share key head 0, heads 3, 4, 5 share key head 1,
and so on (Ainslie et al. 2023, section 2.2: grouped-query attention). That saves memory when text is generated.
"""

# %%
print("== 6. Scores")
group = H // K
scores = torch.empty(B, H, T, T, dtype=torch.float64)  # one row per query, one column per key
for head in range(H):
    scores[:, head] = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / math.sqrt(d)
show("scores", scores, "B H T T")
one = sum(a * b for a, b in zip(q[0, 4, 5].tolist(), k[0, 2, 1].tolist(), strict=True)) / 8
print(f"  head 5, token {pieces[4]!r} looks at {pieces[2]!r}: {one:.4f}")
assert math.isclose(one, scores[0, 5, 4, 2].item(), rel_tol=1e-9) and math.sqrt(d) == 8 and 5 // group == 1
assert [head // group for head in range(H)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]

# %% [markdown]
"""## 7. The mask: no token sees the future

The model learns to predict the next token. If it could see that token, there would be nothing to learn. So the
scores of later tokens become minus infinity. Of 25 pairs 15 are left: token i sees itself and what is before
it.
"""

# %%
print("== 7. The mask")
future = torch.ones(T, T, dtype=torch.bool).triu(1)  # True where the key stands after the query
scores = scores.masked_fill(future, float("-inf"))
print("  " + "\n  ".join(" ".join("." if hidden else "x" for hidden in line) for line in future.tolist()))
assert T * T == 25 and int((~future).sum()) == T * (T + 1) // 2 == 15

# %% [markdown]
"""## 8. Softmax: scores become shares

Each row of scores is turned into positive shares that sum to 1: `p_j = exp(s_j) / sum over j of exp(s_j)`. And
exp of minus infinity is 0, so the future gets exactly nothing.
"""

# %%
print("== 8. Softmax")
exponentials = [math.exp(score) for score in scores[0, 5, 4].tolist()]  # head 5, last token
shares = [value / sum(exponentials) for value in exponentials]
weights = scores.softmax(-1)
show("weights", weights, "B H T T")
print("  head 5, last token: " + ", ".join(f"{p!r} {share:.3f}" for p, share in zip(pieces, shares, strict=True)))
assert torch.allclose(weights[0, 5, 4], torch.tensor(shares, dtype=torch.float64))
assert math.exp(float("-inf")) == 0 and (weights[:, :, future] == 0).all()
assert torch.allclose(weights.sum(-1), torch.tensor(1.0, dtype=torch.float64))

# %% [markdown]
"""A picture, where matplotlib is installed: the weights of the first 3 heads. They share their keys and values,
and still look at different tokens. The first token can only look at itself.
"""

# %%
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for head, axes in enumerate(figure.subplots(1, 3)):
        axes.imshow(weights[0, head], cmap="Blues", vmin=0, vmax=1)
        for i in range(T):
            for j in range(i + 1):
                share = weights[0, head, i, j].item()
                axes.text(j, i, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
        axes.set_xticks(range(T), pieces, rotation=45)
        axes.set_yticks(range(T), pieces)
        axes.set_title(f"layer 0, head {head}")
        axes.set_xlabel("looks at")
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/attention.png", dpi=120)
    print("  picture: runs/tutorials/attention.png")
assert group == 3 and (weights[0, :, 0, 0] == 1).all()

# %% [markdown]
"""## 9. The value mix and o_proj

Each head takes the mean of the values that it sees, weighted by these shares. The 9 results of 64 numbers are
laid side by side, 576 numbers, and one more matrix, `o_proj`, mixes the heads.
"""

# %%
print("== 9. The value mix and o_proj")
mix = torch.empty(B, H, T, d, dtype=torch.float64)
for head in range(H):
    mix[:, head] = weights[:, head] @ v[:, :, head // group]
show("mix", mix, "B H T d")
one = sum(share * value for share, value in zip(shares, v[0, :, 1, 0].tolist(), strict=True))
engine_mix = attention(*(part.float().transpose(1, 2) for part in (q, k, v)), Visibility(None, causal=True))
check("one number of head 5", one, engine_mix[0, 5, 4, 0])
check("mix", mix, engine_mix)
heads = mix.transpose(1, 2).reshape(B, T, H * d)  # (B, H, T, d) -> (B, T, H d)
show("heads", heads, "B T H*d")
out = linear(heads, attn.o_proj)
show("attention out", out, "B T D")
context = Context.of(config, None, positions[None], 0)  # the tables and the mask, which all layers share
check("the whole attention", out, attn(engine_x, context, None))
assert H * d == 576

# %% [markdown]
"""## 10. The residual

The result is added to `h`, it does not replace it (He et al. 2016, equation 1). So the embedding of the token
stays in the sum through all layers, and gradients have a straight way back.
"""

# %%
print("== 10. The residual")
h = h + out
show("h", h, "B T D")

# %% [markdown]
"""## 11. SwiGLU: the feed-forward part

Now each token thinks by itself. Two matrices make 1,536 numbers each, `gate` and `up`. The gate goes through
`silu(z) = z / (1 + exp(-z))`, which is near 0 for very negative z and near z for large z. So it opens or closes
each number of `up`. A third matrix brings the product back to width D (Shazeer 2020, equation 6):

    mlp(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T
"""

# %%
print("== 11. SwiGLU")


def silu(z):
    """Return z / (1 + exp(-z))."""
    return z / (1 + torch.exp(-z))


x = norm(h, layer.post_attention_layernorm.weight)
gate, up = linear(x, layer.mlp.gate_proj), linear(x, layer.mlp.up_proj)
show("gate", gate, "B T F")
show("up", up, "B T F")
inner = silu(gate) * up
show("inner", inner, "B T F")
g, u = gate[0, -1, 0].item(), up[0, -1, 0].item()
print(f"  one number: silu({g:.4f}) * {u:.4f} = {g / (1 + math.exp(-g)) * u:.4f}")
assert math.isclose(g / (1 + math.exp(-g)) * u, inner[0, -1, 0].item()) and F == 1_536
out = linear(inner, layer.mlp.down_proj)
show("mlp out", out, "B T D")
check("the whole mlp", out, layer.mlp(x.float()))
h = h + out
show("h", h, "B T D")
engine_h = layer(model.model.embed_tokens(ids), context, None)
check("the whole layer", h, engine_h)

# %% [markdown]
"""## 12. All layers

The other 29 layers do the same with other weights. Here is a layer once more, in one piece, and the loop over
all 30.
"""

# %%
print("== 12. All layers")


def layer_by_hand(h, layer):
    """One layer on h (B, T, D), from the formulas above."""
    x, attn = norm(h, layer.input_layernorm.weight), layer.self_attn
    q = rotate(linear(x, attn.q_proj).view(B, T, H, d), positions).transpose(1, 2)  # (B, H, T, d)
    k = rotate(linear(x, attn.k_proj).view(B, T, K, d), positions).transpose(1, 2)
    v = linear(x, attn.v_proj).view(B, T, K, d).transpose(1, 2)
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))  # (B, K, T, d) -> (B, H, T, d)
    scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(future, float("-inf"))
    mix = scores.softmax(-1) @ v  # (B, H, T, d)
    h = h + linear(mix.transpose(1, 2).reshape(B, T, H * d), attn.o_proj)
    x, mlp = norm(h, layer.post_attention_layernorm.weight), layer.mlp
    return h + linear(silu(linear(x, mlp.gate_proj)) * linear(x, mlp.up_proj), mlp.down_proj)


for module in model.model.layers[1:]:
    h = layer_by_hand(h, module)
    engine_h = module(engine_h, context, None)
show("h", h, "B T D")
check("all layers", h, engine_h)
assert L == len(model.model.layers) == 30 and len(model.model.layers[1:]) == 29

# %% [markdown]
"""## 13. The final norm and the tied head

One more RMSNorm. Then each vector is compared with all 49,152 rows of the embedding, by dot product. The
results are the logits. A large logit says: that token is likely next.

The head is the embedding table, used a second time (Press & Wolf 2017, section 1). A table of its own would be
28,311,552 more parameters. The whole model has 134,515,008.
"""

# %%
print("== 13. The final norm and the tied head")
h = norm(h, model.model.norm.weight)
show("h", h, "B T D")
check("final norm", h, model.hidden(ids))
logits = torch.stack([torch.mv(table, row) for row in h[0].float()]).unsqueeze(0)  # row by row, dot products
show("logits", logits, "B T V")
engine_logits = model(ids)
check("logits", logits, engine_logits)
assert model.lm_head is None and V * D == 28_311_552
assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008

# %% [markdown]
"""## 14. The next token

Softmax turns the logits of the last token into probabilities over the vocabulary. The largest is the model's
guess.
"""

# %%
print("== 14. The next token")
probabilities = logits[0, -1].double().softmax(-1)
for share, id in zip(*(part.tolist() for part in probabilities.topk(5)), strict=True):
    print(f"  {tokenizer.decode([id])!r:10} {share:.4f}")
best = int(probabilities.argmax())
total = sum(math.exp(logit) for logit in engine_logits[0, -1].tolist())
one = math.exp(engine_logits[0, -1, best].item()) / total
check("one probability", one, engine_logits[0, -1].softmax(-1)[best])
print(f"  {prompt!r} -> {tokenizer.decode([best])!r}")
assert best == int(engine_logits[0, -1].argmax()) and tokenizer.decode([best]) == " Paris"

# %% [markdown]
"""## 15. The KV cache: the same number twice

To go on, we append the new token and run again. But the old tokens cannot see the new one, so their keys and
values stay as they are. It is enough to keep them, and to compute the new token only.

We feed 4 tokens first, and then the last one alone. The logits must be those of the full pass.

A token costs a key and a value, in each of 30 layers, for 3 heads of 64 numbers, 4 bytes each: 46,080 bytes.
With 9 key/value heads it would be 3 times as much.
"""

# %%
print("== 15. The KV cache")
cache = KVCache(config, batch=B, max_length=T)
model(ids[:, :-1], cache=cache)
print(f"  after the first call {cache.length} tokens are stored")
assert cache.length == 4
cached_logits = model(ids[:, -1:], cache=cache)  # one token in, (B, 1, V) out
check("keys of layer 0 in the cache", k.transpose(1, 2), cache.keys[0])
check("values of layer 0 in the cache", v.transpose(1, 2), cache.values[0])
check("logit, full pass and cached", engine_logits[0, -1, best], cached_logits[0, -1, best])
check("all logits, full pass and cached", engine_logits[0, -1], cached_logits[0, -1])
size = sum(part.numel() * part.element_size() for part in (*cache.keys, *cache.values)) // T
print(f"  one token in the cache: {size:,} bytes")
assert size == 2 * 30 * 3 * 64 * 4 == 46_080 and H // K == 3 and H == 9

# %% [markdown]
"""That is the whole model. `minitune/model/transformer.py` is the same, for all layers and batches at once. Go on
with `02_lora.py`: how to change this model by training a small part of it.
"""

# %%
print("== every number agreed")
