# %% [markdown]
"""# 2. LoRA: a small update, its gradient, and why it merges

Fine-tuning changes the weights W of a model. LoRA (Hu et al. 2021) leaves W alone and learns the change, as a
product of two thin matrices:

    y = x W^T + s (x A^T) B^T           (Hu et al. 2021, equation 3, written for rows)

W has shape (out, in), A has shape (R, in) and B has shape (out, R). R is the rank, for example 8. The number s
is the scaling. So the weights change by `s B A`, a matrix of W's shape, made of far fewer numbers.

We compute the update and its gradient by hand, on real weights. Open this file in VS Code or Jupyter and run it
cell by cell, or run it as a whole:

    python tutorials/02_lora.py

The letters: B T D F V as in tutorial 1, and R for the rank. (B is also the name of a matrix here, as in the
paper.)
"""

# %%
import math
from pathlib import Path

import torch

import minitune
from minitune.checkpoint.merge import merge
from minitune.model.config import LoRAConfig
from minitune.model.lora import adapter_disabled, add_lora, lora_modules
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.sources import fetch

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)


def check(name, by_hand, engine, tolerance=1e-5):
    """Print and assert that two numbers or tensors are the same, up to rounding."""
    by_hand, engine = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (by_hand, engine))
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    error = ((by_hand - engine).abs().max() / by_hand.abs().max()).item()
    value = f"{by_hand.item():.7f} and {engine.item():.7f}" if by_hand.dim() == 0 else f"{by_hand.numel():,} numbers"
    print(f"  agree: {name}, {value}, largest error {error:.1e}")
    assert error <= tolerance, f"{name}: {error:.1e} apart"


# %% [markdown]
"""## 1. The update starts at zero

We give every linear layer of the model an adapter. A is drawn at random, evenly between -1/sqrt(in) and
1/sqrt(in). B is zero. So `s B A` is zero, and the model is what it was. Not nearly: bit for bit.

Why not both zero? Then both gradients would be zero too, as section 2 shows, and nothing would ever move.

We look at one layer closely: the `down_proj` of the last layer, which maps F = 1,536 numbers to D = 576.
"""

# %%
print("== 1. The update starts at zero")
settings = LoRAConfig(rank=8, alpha=16.0)
adapters = add_lora(model, settings, seed=0)
layer = model.model.layers[-1]
W, lora = layer.mlp.down_proj.weight, layer.mlp.down_proj.lora
R, s = settings.rank, settings.alpha / settings.rank
D, F = W.shape
print(f"  W (D={D}, F={F})   A (R={R}, F={F})   B (D={D}, R={R})   s = {s}")
assert lora.A.shape == (R, F) and lora.B.shape == (D, R) and (R, D, F) == (8, 576, 1_536)
assert lora.scaling == s == 2.0

text = "The best way to learn a thing is to compute every number by hand."
ids = torch.tensor([tokenizer.encode(text)])  # (B, T)
with torch.no_grad():
    logits = model(ids)
    with adapter_disabled(model):
        base_logits = model(ids)
bound = 1 / math.sqrt(F)
print(f"  largest number in A: {lora.A.abs().max():.5f}, bound {bound:.5f}; in B: {lora.B.abs().max():.1f}")
assert torch.equal(logits, base_logits) and (lora.B == 0).all()
assert 0.99 * bound < lora.A.abs().max() <= bound
print(f"  {logits.numel():,} logits with and without the {len(adapters)} adapters: equal, bit for bit")

# %% [markdown]
"""## 2. The gradient, derived

Let L be the loss. Write `u = x A^T`, the R numbers in the middle. Let dy be the gradient of L at y, which the
layers above hand down. Then `y = x W^T + s u B^T` and the chain rule gives

    dB = s dy^T u            each entry: dB[i, j] = s * sum over tokens of dy[t, i] * u[t, j]
    du = s dy B
    dA = du^T x              each entry: dA[j, k] = sum over tokens of du[t, j] * x[t, k]

Nothing here has the shape of W. That is why LoRA training is light. And where B is zero, du and dA are exactly
zero: in the first step only B moves.

We catch dy on its way through the real model, and the hidden state h below the feed-forward part. From h we
make x by hand, as in tutorial 1. Then we compare with autograd.
"""

# %%
print("== 2. The gradient")
caught = {}


def catch_y(module, inputs, output):
    """Keep what comes out of down_proj; autograd will leave dy there."""
    output.retain_grad()
    caught["y"] = output


def catch_h(module, inputs):
    """Keep what goes into the norm before the feed-forward part."""
    caught["h"] = inputs[0].detach()[0].double()  # (T, D)


hooks = [
    layer.mlp.down_proj.register_forward_hook(catch_y),
    layer.post_attention_layernorm.register_forward_pre_hook(catch_h),
]


def norm(x, module):
    """RMSNorm (Zhang & Sennrich 2019, equation 4)."""
    weight = module.weight.detach().double()
    return weight * x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()


def input_by_hand():
    """Return x, the input of down_proj: SwiGLU (Shazeer 2020, equation 6)."""
    normed = norm(caught["h"], layer.post_attention_layernorm)
    gate = normed @ layer.mlp.gate_proj.weight.detach().double().T
    return gate / (1 + torch.exp(-gate)) * (normed @ layer.mlp.up_proj.weight.detach().double().T)  # (T, F)


def mean_loss():
    """The model's loss: the mean over all tokens but the first of minus log p(token | tokens before)."""
    hidden = model.hidden(ids)[0]  # (T, D)
    return linear_cross_entropy(hidden[:-1], model.head_weight, ids[0, 1:]).mean()


def gradients_by_hand():
    """Return dA and dB from the derivation, in 64 bits."""
    x, dy = input_by_hand(), caught["y"].grad[0].double()  # (T, F), (T, D)
    u = x @ lora.A.double().T  # (T, R)
    du = s * dy @ lora.B.double()  # (T, R)
    return du.T @ x, s * dy.T @ u


loss = mean_loss()
loss.backward()
dA, dB = gradients_by_hand()
T = ids.shape[1]
print(f"  x (T={T}, F={F})   u (T={T}, R={R})   dy (T={T}, D={D})   loss {loss.item():.4f}")
check("dB where B is zero", dB, lora.B.grad)
assert (dA == 0).all() and (lora.A.grad == 0).all()
print("  dA where B is zero: exactly 0, by hand and by autograd")
first_dB = dB

# %% [markdown]
"""The gradient of W itself would be `G = dy^T x`, with D x F = 884,736 entries. LoRA sees it through the keyhole
of A: `dB = s G A^T`. We can make G here, because it is one layer only.
"""

# %%
x, dy = input_by_hand(), caught["y"].grad[0].double()
G = dy.T @ x  # (D, F)
print(f"  G (D={D}, F={F})")
check("s G A^T and dB", s * G @ lora.A.double().T, lora.B.grad)
assert G.numel() == D * F == 884_736

# %% [markdown]
"""Now B gets some numbers, so that A has a gradient too. All adapters stay as they are, but this one.
"""

# %%
B0 = torch.randn(D, R, generator=torch.Generator().manual_seed(1)) * 0.01
lora.B.data.copy_(B0)
model.zero_grad()
loss = mean_loss()
loss.backward()
dA, dB = gradients_by_hand()
for hook in hooks:
    hook.remove()
check("y", x @ W.double().T + s * (x @ lora.A.double().T) @ lora.B.double().T, caught["y"][0])
check("dA", dA, lora.A.grad)
check("dB", dB, lora.B.grad)
entry = max((abs(value), place) for place, value in enumerate(dA.flatten().tolist()))[1]
j, k = divmod(entry, F)
du_j = [s * sum(a * b for a, b in zip(row, B0[:, j].tolist(), strict=True)) for row in caught["y"].grad[0].tolist()]
one = sum(a * b for a, b in zip(du_j, x[:, k].tolist(), strict=True))
check(f"the largest entry of dA, dA[{j}, {k}], in Python floats", one, lora.A.grad[j, k])

# %% [markdown]
"""## 3. The gradient, measured

A derivation can be wrong. A measurement needs no derivation: change one entry by a little, in both directions,
and see how the loss changes.

    dL/dB[i, j]  =  (L(B[i, j] + e) - L(B[i, j] - e)) / (2 e)      up to an error of order e^2

In 32 bits the rounding of L would drown the change, so we use 64. The part of the model above our layer is
short: residual, final norm, head. We write it by hand, and first check that it is the same function.
"""

# %%
print("== 3. The gradient, measured")
head = model.head_weight.detach().double()  # (V, D)
h, A0 = caught["h"], lora.A.detach().double()
base_y, goal = x @ W.detach().double().T, ids[0, 1:]


def loss_by_hand(A, B):
    """The loss as a function of this layer's adapter, in 64 bits."""
    y = base_y + s * (x @ A.T) @ B.T
    logits = norm(h + y, model.model.norm)[:-1] @ head.T  # (T - 1, V)
    return (logits.logsumexp(-1) - logits[torch.arange(T - 1), goal]).mean()


def slope(A, B, matrix, i, j, e=1e-4):
    """Measure dL/dmatrix[i, j], where matrix is A or B, by a central difference."""
    kept, losses = matrix[i, j].item(), []
    for value in (kept + e, kept - e):
        matrix[i, j] = value
        losses.append(loss_by_hand(A, B).item())
    matrix[i, j] = kept
    return (losses[0] - losses[1]) / (2 * e)


A, B = A0.clone(), B0.double()
assert torch.finfo(A.dtype).bits == torch.finfo(head.dtype).bits == 64 and torch.finfo(lora.A.dtype).bits == 32
check("the loss", loss_by_hand(A, B), loss)
for name, matrix, gradient in (("A", A, lora.A.grad), ("B", B, lora.B.grad)):
    for place in gradient.abs().flatten().topk(3).indices.tolist():
        i, j = divmod(place, gradient.shape[1])
        measured = slope(A, B, matrix, i, j)
        check(f"d{name}[{i}, {j}], measured and by autograd", measured, gradient[i, j], 1e-4)

# %% [markdown]
"""## 4. Scaling, and what rank has to do with it

Start again at B = 0 and take one step of plain gradient descent, with rate a: `B = -a dB = -a s G A^T`. The
weights change by `s B A = -a s^2 G A^T A`. To first order the loss falls by

    a * s^2 * |G A^T|^2             (|.|^2 is the sum of the squares of all entries)

The entries of A have mean square 1/(3 in), so |G A^T|^2 is about R |G|^2 / (3 in): it grows with the rank. What
does s do?

- s = alpha / R (Hu et al. 2021, section 4.1): s^2 R falls like 1/R. From rank 16 to rank 256 the same rate
  learns about 16 times less. A large rank looks useless, because it learns slowly.
- s = alpha / sqrt(R), rsLoRA (Kalajdzievski 2023, theorem 3.2): s^2 R does not depend on R.

In minitune the second is `lora.rslora: true`.
"""

# %%
print("== 4. Scaling")
check("mean square of A, expected and drawn", 1 / (3 * F), A0.square().mean(), 0.05)
B = torch.zeros(D, R, dtype=torch.float64)
rate = 1e-4
fallen = (loss_by_hand(A0, B) - loss_by_hand(A0, -rate * first_dB)).item()
check("one small step: loss measured and a s^2 |G A^T|^2", fallen, rate * (s * G @ A0.T).square().sum(), 1e-2)

alpha, drops = 16.0, {}
print("  rank   alpha/R: s, first-order drop    alpha/sqrt(R): s, first-order drop   (for a = 1)")
for rank in (1, 4, 16, 64, 256):
    draw = (torch.rand(rank, F, generator=torch.Generator().manual_seed(rank)).double() * 2 - 1) * bound
    seen = (G @ draw.T).square().sum().item()  # |G A^T|^2
    plain, stable = LoRAConfig(rank=rank, alpha=alpha), LoRAConfig(rank=rank, alpha=alpha, rslora=True)
    assert plain.scaling == alpha / rank and math.isclose(stable.scaling, alpha / math.sqrt(rank))
    drops[rank] = plain.scaling**2 * seen, stable.scaling**2 * seen
    print(
        f"  {rank:4}   {plain.scaling:9.4f}   {drops[rank][0]:12.4f}   {stable.scaling:19.4f}   {drops[rank][1]:12.4f}"
    )
expected = alpha**2 * G.square().sum().item() / (3 * F)  # with R = 1, or with rsLoRA at any rank
print(f"  expected for alpha/sqrt(R): {expected:.4f} at every rank")
assert math.isclose(drops[256][1], expected, rel_tol=0.2)
assert math.isclose(drops[16][0] / drops[256][0], 16, rel_tol=0.25) and 256 / 16 == 16

# %% [markdown]
"""## 5. Training, and what rank means

We train all 210 adapters for 6 steps on our sentence. (AdamW is opened up in tutorial 3.) Then we look at the
update `s B A` of our layer.

Its singular values say how many directions it uses. A matrix of rank R has R of them above zero and no more,
whatever its size. The full matrix could have 576.
"""

# %%
print("== 5. Training, and what rank means")
head = head[:0].clone()  # gives 226 MB back
lora.B.data.zero_()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
losses = []
for _ in range(6):
    optimizer.zero_grad()
    loss = mean_loss()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("  loss: " + " ".join(f"{value:.3f}" for value in losses))
assert losses[-1] < 0.5 * losses[0] and len(adapters) == 210 and len(losses) == 6
update = s * (lora.B.double() @ lora.A.double()).detach()  # (D, F)
values = torch.linalg.svdvals(update)
print("  singular values of the update: " + " ".join(f"{value:.5f}" for value in values[: R + 2].tolist()) + " ...")
assert len(values) == min(D, F) == 576
assert int((values > 1e-10 * values[0]).sum()) == torch.linalg.matrix_rank(update) == R == 8

# %% [markdown]
"""Is a small rank enough? The gradient G of the full matrix has rank at most T - 1, the number of tokens that had
something to predict. And its singular values fall quickly. The best rank-8 matrix keeps the 8 largest (Eckart &
Young 1936), and with them more than 90% of the sum of squares.
"""

# %%
gradient_values = torch.linalg.svdvals(G)
kept = (gradient_values[:8].square().sum() / gradient_values.square().sum()).item()
nonzero = int((gradient_values > 1e-10 * gradient_values[0]).sum())
print(f"  G has rank {nonzero} (T={T}); its 8 largest singular values keep {kept:.1%} of its squares")
assert nonzero == T - 1 and 90 < 100 * kept <= 100
assert math.isclose(gradient_values.square().sum().item(), G.square().sum().item())
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, line in ((f"update s B A, rank {R}", values), (f"gradient G of W, {T} tokens", gradient_values)):
        axes.semilogy(range(1, 25), (line[:24] / line[0]).clamp(min=1e-18), "o-", markersize=4, label=name)
    axes.set_ylim(1e-6, 2)  # what lies below is rounding, not update
    axes.set_xlabel("singular value number")
    axes.set_ylabel("size, the largest = 1")
    axes.set_title("last layer, down_proj")
    axes.legend()
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/singular_values.png", dpi=120)
    print("  picture: runs/tutorials/singular_values.png")

# %% [markdown]
"""## 6. How many parameters, how many bytes

An adapter has R (in + out) numbers, W has in x out. For our layer: 16,896 against 884,736. In the whole model,
at rank 8: 2,442,240 against 134,515,008, which is 1.8%.

AdamW needs 16 bytes for each number that trains, in 32 bits: weight, gradient, and two moments, 4 bytes each. A
frozen number needs 4, or 2 in bf16, and nothing else.

    full fine-tuning            134,515,008 x 16                     = 2,152 MB
    LoRA, base in 32 bits       134,515,008 x 4 + 2,442,240 x 16     =   577 MB
    LoRA, base in bf16          134,515,008 x 2 + 2,442,240 x 16     =   308 MB

(MB is 1,000,000 bytes. Activations come on top, in all three cases.)
"""

# %%
print("== 6. How many parameters, how many bytes")
small = sum(p.numel() for p in model.parameters() if p.requires_grad)
large = sum(p.numel() for p in model.parameters() if not p.requires_grad)
state = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values() if t.dim())
print(f"  adapters {small:,}, base {large:,}: {small / large:.2%}; AdamW's moments {state / 1e6:.1f} MB")
assert R * (D + F) == lora.A.numel() + lora.B.numel() == 16_896 and W.numel() == 884_736
assert small == sum(R * sum(m.weight.shape) for m in model.modules() if getattr(m, "lora", None)) == 2_442_240
assert large == 134_515_008 and round(100 * small / large, 1) == 1.8 and state == 2 * 4 * small
assert round(large * 16 / 1_000_000) == 2_152 and 4 * 4 == 16
assert round((large * 4 + small * 16) / 1_000_000) == 577 and round((large * 2 + small * 16) / 1_000_000) == 308

# %% [markdown]
"""## 7. Why it merges

Matrix products can be regrouped: `x W^T + s (x A^T) B^T = x (W + s B A)^T`. So after training the update can be
added to the weights once (Hu et al. 2021, section 4.1). The merged model is a plain model. It runs without
adapters, as fast as before.

In 32 bits the logits stay the same, up to rounding.
"""

# %%
print("== 7. Why it merges")
del optimizer
with torch.no_grad():
    before = model(ids)
    apart = {path: (module.A.clone(), module.B.clone()) for path, module in lora_modules(model).items()}
    by_hand = W.double() + update
    report = merge(model)
    after = model(ids)
print(f"  {report}")
check("W + s B A", by_hand, layer.mlp.down_proj.weight)
check("logits with the adapters and after merging", before, after)
assert not lora_modules(model) and report.layers == 210

# %% [markdown]
"""## 8. What bf16 does to the update

Models are often stored in bf16: 16 bits, of which 8 hold the digits. Between 1 and 2 the neighbours are 1/128
apart. So a weight can only move in steps. Rounding takes the nearest: an entry of the update that is smaller
than a quarter of a step is lost for certain, and one that is larger than half a step makes the weight jump a
whole one. (In between it depends on the direction: just below a power of two the steps are half as wide.)

Let U = s B A and let C be the change that really happens, `C = bf16(W + U) - W`. Two numbers tell the story:

    survived         <C, U> / <U, U>     the part of C that points along U; 1 is perfect
    relative error   |C - U| / |U|       how much of C is wrong; 0 is perfect

We load the model again, now in bf16, give our layer its trained adapter, and merge.
"""

# %%
print("== 8. What bf16 does to the update")
del model
path = "model.layers.29.mlp.down_proj"
model = minitune.load_model(NAME, dtype="bfloat16")
module = add_lora(model, LoRAConfig(rank=8, alpha=16.0, target_modules=(path,)))[path]
module.A.data.copy_(apart[path][0])
module.B.data.copy_(apart[path][1])
W = model.get_submodule(path).weight.detach().double()  # (D, F), its numbers are bf16 numbers
C = (W + update).float().bfloat16().double() - W
step = torch.exp2(torch.floor(torch.log2(W.abs())) - 7)  # the distance to the next larger number in bf16
survived = ((C * update).sum() / update.square().sum()).item()
error = ((C - update).norm() / update.norm()).item()
print(f"  middle entry of W: {W.abs().median():.5f}, its step {step.median():.6f}, of U {update.abs().median():.6f}")
print(f"  {(C != 0).double().mean():.1%} of the entries move; survived {survived:.4f}, relative error {error:.4f}")
assert torch.finfo(torch.bfloat16).bits == 16 and torch.finfo(torch.bfloat16).eps == 1 / 128 == 2 ** -(8 - 1)
margin = 1.001  # the sum is rounded to 32 bits first, which can turn a hair over half a step into exactly half
assert (C[update.abs() < step / 4] == 0).all() and (C[update.abs() > margin * step / 2] != 0).all()

# %% [markdown]
"""An update ten times smaller would lose more than half of its effect: most of its entries are below half a step.
That is the trap of merging after a short or careful training.

So minitune merges in 32 bits, rounds once, and says what was lost. Merge into 32 bits, or keep the adapter
beside the base, when that line looks bad.
"""

# %%
tenth = update / 10
tenth_C = (W + tenth).float().bfloat16().double() - W
print(f"  a tenth of the update: survived {(tenth_C * tenth).sum() / tenth.square().sum():.4f}")
assert (tenth_C * tenth).sum() / tenth.square().sum() < 1 / 2
assert (tenth.abs() < step / 2).double().mean() > 1 / 2
report = merge(model)
print(f"  {report}")
check("C, by hand and by the engine", C, model.get_submodule(path).weight.detach().double() - W)
check("survived", survived, report.survived)
check("relative error", error, report.relative_error)
print("== every number agreed")
