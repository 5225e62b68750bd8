# %% [markdown]
"""# 9. DPO: from a bet on two answers to a loss

People can't say how good an answer is, but they can say which of two is better. DPO (Rafailov et al. 2023) trains a
model on such pairs directly, without a reward model and without reinforcement learning. Its loss is one line:

    L = -log s(b (log p(w|x) - log p_ref(w|x)) + b (log p_ref(l|x) - log p(l|x)))
                                                                        (Rafailov et al. 2023, equation 7)

x is the prompt, w the chosen answer, l the rejected one. p is the model that is trained, p_ref a copy from before.
b is beta, and s is the logistic function s(z) = 1 / (1 + e^-z).

We derive it step by step, on a prompt with four possible answers, where everything can be computed exactly. Then we
follow one pair through one step of a real model.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/09_dpo.py
"""

# %%
import math
from pathlib import Path

import torch

import minitune
from minitune.data.batching import collate_preferences
from minitune.data.examples import Example
from minitune.data.preferences import Pair
from minitune.losses.preference import dpo_loss, hinge_loss, ipo_loss
from minitune.model.config import LoRAConfig
from minitune.model.lora import adapter_disabled, add_lora
from minitune.model.trainable import trainable_parameters
from minitune.sources import fetch
from minitune.text.chat import render_chat
from minitune.training.config import PreferenceOptions
from minitune.training.preference import answer_log_probabilities, preference_objective


def check(name, by_hand, engine, tolerance=1e-5):
    """Print and assert that two numbers or tensors are the same, up to rounding."""
    by_hand, engine = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (by_hand, engine))
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    error = ((by_hand - engine).abs().max() / by_hand.abs().max()).item()
    value = f"{by_hand.item():.7f} and {engine.item():.7f}" if by_hand.dim() == 0 else f"{by_hand.numel():,} numbers"
    print(f"  agree: {name}, {value}, largest error {error:.1e}")
    assert error <= tolerance, f"{name}: {error:.1e} apart"


def numbers(values):
    """Return numbers as text."""
    return " ".join(f"{value:7.4f}" for value in values.tolist())


# %% [markdown]
"""## 1. The bet: Bradley and Terry

Say that each answer has a reward r, which we can't see. We see bets: of two answers, somebody picks one. A better
answer wins more often, but not always (Bradley & Terry 1952):

    P(i beats j) = e^r_i / (e^r_i + e^r_j) = s(r_i - r_j)           (Rafailov et al. 2023, equation 1)

Only differences count. Add 5 to all rewards, and no bet changes. A lead of 1 wins 73% of the time.

Our four answers have the rewards 1, 0.5, 0 and -0.5.
"""

# %%
print("== 1. The bet: Bradley and Terry")
r = torch.tensor([1, 0.5, 0, -0.5], dtype=torch.float64)
e = r.exp()
wins = e[:, None] / (e[:, None] + e[None, :])  # (4, 4): row i beats column j
for i in range(4):
    print(f"  answer {i}, reward {r[i]:4.1f}, beats the others with probability {numbers(wins[i])}")
check("s of the difference", wins, torch.sigmoid(r[:, None] - r[None, :]), 1e-12)
shifted = (r + 5).exp()
check("all rewards 5 higher", wins, shifted[:, None] / (shifted[:, None] + shifted[None, :]), 1e-12)
check("one of the two wins", wins + wins.T, torch.ones(4, 4), 1e-12)
assert round(100 * wins[0, 2].item()) == 73 and r[0] - r[2] == 1

# %% [markdown]
"""## 2. What is wanted

A model p gives each answer a probability. We want much reward, but a model that is still the one we know. So we pay for
the distance from the reference p_ref, at the price b (Rafailov et al. 2023, equation 3):

    J(p) = E_p[r] - b KL(p || p_ref)          KL(p || q) = sum over y of p(y) log(p(y) / q(y))

Which p is best? Put r into the logarithm: r = b log e^(r/b). Then

    J(p) = -b sum of p(y) log(p(y) / (p_ref(y) e^(r(y)/b))) = b log Z - b KL(p || p*)

    p*(y) = p_ref(y) e^(r(y)/b) / Z           Z = sum over y of p_ref(y) e^(r(y)/b)       (equation 4)

A KL is never below zero, and zero only where both are equal. So p* is the best, and nothing else is. A large b leaves
it near the reference, a small b near the answer with most reward.

We take b = 0.5 and a reference that prefers the bad answers: 0.1, 0.2, 0.3, 0.4.
"""

# %%
print("== 2. What is wanted")
beta = 0.5
reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
Z = (reference * (r / beta).exp()).sum()
best = reference * (r / beta).exp() / Z


def kl(p, q):
    """KL(p || q) of two distributions over the answers, in nats."""
    return (p * (p / q).log()).sum()


def J(p):
    """The goal: reward less the price of the distance."""
    return (p * r).sum() - beta * kl(p, reference)


print(f"  p_ref {numbers(reference)}   reward {(reference * r).sum():.4f}")
print(f"  p*    {numbers(best)}   reward {(best * r).sum():.4f}   KL {kl(best, reference):.4f}   Z {Z:.4f}")
check("J(p*) and b log Z", beta * Z.log(), J(best), 1e-12)
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    p = torch.rand(4, generator=generator, dtype=torch.float64)
    p = p / p.sum()
    check("J of some other p", beta * Z.log() - beta * kl(p, best), J(p), 1e-9)
    assert J(p) < J(best)
near, far = (reference * (r / b).exp() for b in (100, 0.01))
assert kl(near / near.sum(), reference) < 1e-4 and far[0] / far.sum() > 0.99
assert beta == 0.5 and reference.tolist() == [0.1, 0.2, 0.3, 0.4] and r.tolist() == [1, 0.5, 0, -0.5]

# %% [markdown]
"""## 3. The trick

For a language model this formula is useless at first sight: Z is a sum over all answers. With a vocabulary of 49,152
there are more than 10^100 answers of 24 tokens.

But read it backwards. If p* is the best model for the reward r, then r is

    r(y) = b log(p*(y) / p_ref(y)) + b log Z                                           (equation 5)

A bet needs only the difference of two rewards, to the same prompt. In it the second term is the same, and goes:

    P(w beats l) = s(b log(p*(w) / p_ref(w)) - b log(p*(l) / p_ref(l)))               (Rafailov et al. 2023, equation 6)

No Z, no reward. A model is its own reward model.
"""

# %%
print("== 3. The trick")
implicit = beta * (best / reference).log()  # what DPO calls the implicit reward
print(f"  b log(p*/p_ref)  {numbers(implicit)}")
print(f"  r                {numbers(r)}   they differ by b log Z = {beta * Z.log():.4f} everywhere")
check("equation 5", implicit + beta * Z.log(), r, 1e-12)
check("equation 6", torch.sigmoid(implicit[:, None] - implicit[None, :]), wins, 1e-12)
assert 24 * math.log10(49_152) > 100 and 49_152**24 > 10**100

# %% [markdown]
"""## 4. The loss

So say that p stands for p*, and choose it so that the bets we saw become as probable as possible. Minus the logarithm
of that probability is the loss of one bet. Write r(y) for the log-ratio log p(y) - log p_ref(y) from here on, and d for
the margin r(w) - r(l):

    L = -log s(b d)                    (Rafailov et al. 2023, equation 7)

At the start p is p_ref, so d = 0 and L = ln 2 = 0.6931: a coin.

Does minimising it really find p*? We give our four answers four free logits. First with infinitely many bets: each
pair both ways, weighted by how often it comes out so. Then with bets that are drawn. Which pairs are asked for does not
matter, as long as all answers are connected.
"""

# %%
print("== 4. The loss")


def fitted(weights):
    """Return the p that minimises the engine's DPO loss; weights (4, 4): how often row beat column."""
    logits = reference.log().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss():
        ratio = logits.log_softmax(0) - reference.log()
        return (weights * dpo_loss(ratio[:, None] - ratio[None, :], beta)).sum() / weights.sum()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0), loss().item()


z = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
check("-log s(b d) for d = -2, 0, 3", [math.log(1 + math.exp(-beta * d)) for d in z.tolist()], dpo_loss(z, beta), 1e-12)
assert round(math.log(2), 4) == 0.6931 and z.tolist() == [-2, 0, 3]
asked = wins * (1 - torch.eye(4, dtype=torch.float64))  # all pairs but an answer with itself
p, value = fitted(asked)
print(f"  p     {numbers(p)}")
check("the minimum is p*", best, p, 1e-6)
check("and its loss is the entropy of a bet", -(asked * wins.log()).sum().item() / asked.sum().item(), value)
chain = torch.zeros_like(asked)
for i, j in ((0, 1), (1, 2), (2, 3)):
    chain[i, j], chain[j, i] = wins[i, j], wins[j, i]
check("the same p from three pairs in a chain", best, fitted(chain)[0], 1e-6)

errors = {}
for count in (100, 10_000, 1_000_000):
    first = torch.randint(4, (count,), generator=generator)
    second = (first + torch.randint(1, 4, (count,), generator=generator)) % 4  # another answer
    won = torch.rand(count, generator=generator) < wins[first, second]
    cells = torch.where(won, 4 * first + second, 4 * second + first)
    errors[count] = (fitted(torch.bincount(cells, minlength=16).reshape(4, 4).double())[0] - best).abs().max().item()
    print(f"  {count:9,} bets drawn: p is off by {errors[count]:.4f} at most")

# %% [markdown]
"""100 times as many bets make the error about ten times smaller, as always with drawn numbers.

What if the better answer always wins? Then no p is good enough: -log s(b d) has no minimum, and d grows for ever, at
the price of what the reference knew. That is over-fitting, and with few pairs it comes soon. IPO (Azar et al. 2023,
equation 17) asks for a margin of 1 / (2 b) and no more: 5 nats at b = 0.1.
"""

# %%
assert errors[100] > errors[10_000] > errors[1_000_000] and errors[1_000_000] < 0.01 and 10_000 / 100 == 100
assert 3 < errors[10_000] / errors[1_000_000] < 10 * 3 and math.sqrt(100) == 10


def margin_after(loss, steps):
    """Return the margin that gradient descent on a loss of one pair reaches from 0, at rate 1."""
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        d.data -= torch.autograd.grad(loss(d).sum(), d)[0]
    return d.item()


reached = []
for steps in (100, 1_000, 10_000):
    dpo, ipo = margin_after(lambda d: dpo_loss(d, 0.1), steps), margin_after(lambda d: 0.1 * ipo_loss(d, 0.1), steps)
    print(f"  after {steps:6,} steps: margin by DPO {dpo:6.2f}, by IPO {ipo:.4f}")
    reached.append(dpo)
    assert math.isclose(ipo, 5, rel_tol=1e-6) and 1 / (2 * 0.1) == 5
assert reached == sorted(reached) and reached[-1] > 40

# %% [markdown]
"""## 5. The gradient

With s' = s (1 - s) the derivative of the loss by the margin is short, and so the gradient by the weights:

    dL/dd = -b s(-b d)           grad L = -b s(-b d) (grad log p(w) - grad log p(l))

The chosen answer is pushed up and the rejected one down. How hard? s(-b d) is the probability that the model, as a
reward model, gives to the wrong outcome. At d = 0 it is 1/2. A pair that is settled hardly counts any more, one that
the model has the wrong way round counts fully. That weight is what DPO adds to "more of this, less of that" (Rafailov
et al. 2023, section 4).

As a picture, where matplotlib is installed, beside the weights of two relatives: the hinge, which stops at d = 1 / b,
and IPO, which turns back at 1 / (2 b).
"""

# %%
print("== 5. The gradient")
d = torch.linspace(-40, 60, 101, dtype=torch.float64)


def weight(loss, b):
    """Return -dL/dd at each d, by autograd."""
    at = d.clone().requires_grad_(True)
    return -torch.autograd.grad(loss(at, b).sum(), at)[0]


for b in (0.05, 0.1, 0.5):
    by_hand = torch.tensor([b / (1 + math.exp(b * x)) for x in d.tolist()], dtype=torch.float64)
    check(f"b s(-b d) at 101 margins, b = {b}", by_hand, weight(dpo_loss, b), 1e-12)
    measured = -(dpo_loss(d + 1e-4, b) - dpo_loss(d - 1e-4, b)) / (2 * 1e-4)
    check("the same, measured", measured, weight(dpo_loss, b), 1e-6)
middle = d.tolist().index(0.0)
assert weight(dpo_loss, 0.1)[middle] == 0.1 * 1 / 2 and weight(dpo_loss, 0.1)[0] > 0.98 * 0.1
assert (weight(hinge_loss, 0.1)[d > 1 / 0.1] == 0).all() and (weight(ipo_loss, 0.1)[d > 1 / (2 * 0.1)] < 0).all()
for x in (-40, -10, 0, 10, 40):
    share = weight(dpo_loss, 0.1)[d.tolist().index(x)] / 0.1
    print(f"  b = 0.1, margin {x:3}: weight {share:.3f} b  {'#' * round(40 * share.item())}")
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for b in (0.05, 0.1, 0.5):
        axes.plot(d, weight(dpo_loss, b) / b, label=f"DPO, beta {b}")
    axes.plot(d, weight(hinge_loss, 0.1) / 0.1, "--", color="grey", label="hinge, beta 0.1")
    axes.plot(d, weight(ipo_loss, 0.1) / 10, ":", color="black", label="IPO, tau 0.1 (a tenth)")
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlabel("margin d, nats")
    axes.set_ylabel("weight of the pair / beta")
    axes.legend()
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/dpo_weight.png", dpi=120)
    print("  picture: runs/tutorials/dpo_weight.png")

# %% [markdown]
"""## 6. One pair, before the step

Now a real model, and one pair by hand. The log-probability of an answer is the sum over its tokens, the end of the
turn included; the prompt's tokens don't count. The sum, not the mean: equation 4 is about whole answers.

The reference is the same model with its adapter off. A fresh adapter changes nothing, so both answers have a log-ratio
of exactly 0, and the loss is ln 2. The first batch of every DPO run shows that number; where it does not, something is
wrong.
"""

# %%
print("== 6. One pair, before the step")
NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)
QUESTION = "My train was cancelled. What can I do?"


def side(answer):
    """Return the chat of question and answer as an example whose targets are the answer's tokens."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    rendered = render_chat(tokenizer, turns)
    return Example(tuple(rendered.ids), tuple(rendered.targets), origin="tutorial")


chosen = side("Ask at the desk for the next connection, and keep your ticket: you can claim a refund.")
rejected = side("Trains are cancelled sometimes.")
model.requires_grad_(False)
add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=0)
parameters = trainable_parameters(model)


def log_probability(example):
    """Return log p(answer|prompt), the sum over the answer's tokens, from the full logits, in 64 bits."""
    places = [place for place in range(len(example.ids) - 1) if example.targets[place + 1]]
    log_p = model(torch.tensor([example.ids]))[0, places].double().log_softmax(-1)  # (answer's tokens, V)
    return sum(log_p[i, example.ids[place + 1]] for i, place in enumerate(places))


def flat_gradient(value):
    """Return the gradient by all adapters as one long vector, in 64 bits."""
    return torch.cat([part.flatten().double() for part in torch.autograd.grad(value, list(parameters.values()))])


def with_gradient(example):
    """Return log p(answer|prompt) and its gradient, for what follows."""
    value = log_probability(example)
    return value.detach(), flat_gradient(value)


with torch.no_grad(), adapter_disabled(model):
    reference_w, reference_l = log_probability(chosen), log_probability(rejected)
(log_w, g_w), (log_l, g_l) = with_gradient(chosen), with_gradient(rejected)
for name, example, own, other in (("chosen", chosen, log_w, reference_w), ("rejected", rejected, log_l, reference_l)):
    print(f"  {name:8}: {sum(example.targets):2} tokens, log p {own.item():.4f}, reference {other.item():.4f}")
    assert own == other
margin = (log_w - reference_w) - (log_l - reference_l)
beta = 0.1
loss = -torch.log(torch.sigmoid(beta * margin))
print(f"  margin {margin.item():.1f}, loss {loss.item():.6f}")
assert margin == 0 and math.isclose(loss.item(), math.log(2), rel_tol=1e-12)

batch = collate_preferences([[Pair(chosen, rejected)]], tokenizer.pad_id, packing=True)
B, T = batch.ids.shape
with torch.no_grad():
    sums, counts = answer_log_probabilities(model, batch)
print(f"  the engine's batch: both sides packed into ids (B={B}, T={T})")
check("log p of both answers", [log_w.item(), log_l.item()], sums)
assert counts.tolist() == [sum(chosen.targets), sum(rejected.targets)] and B == 1
objective = preference_objective("dpo", PreferenceOptions(beta=beta).resolved("dpo"))
loss_sum, pairs, metrics = objective(model, batch)
check("the loss", loss, loss_sum.detach(), 1e-4)  # in 32 bits, where a sum over an answer is only so exact
assert pairs == 1 and abs(metrics["margin"][0]) < 1e-4

# %% [markdown]
"""Its gradient is -b/2 times the difference of two gradients, as section 5 says with d = 0. Both came from our full
logits above; the whole comes from the engine.
"""

# %%
gradient = -beta / 2 * (g_w - g_l)
check("the gradient", gradient, flat_gradient(loss_sum), 1e-4)
print(f"  length: chosen {g_w.norm():.2f}, rejected {g_l.norm():.2f}, of the loss {gradient.norm():.4f}")

# %% [markdown]
"""## 7. The step, and after

A plain step down the gradient with rate a moves all log-probabilities. To first order the margin becomes

    d = a b/2 |g_w - g_l|^2                 (|.|^2 is the sum of squares)

which is above zero whatever the pair. We choose a so that this is 0.1 nats, and look.

The two answers share the prompt, the model and many words, so their gradients are not independent. First order says
what happens to each: log p(w) moves by a b/2 g_w.(g_w - g_l), log p(l) by a b/2 g_l.(g_w - g_l). Nothing says that the
first is above zero! Only the difference is trained. In many real runs the chosen answers become less probable too, and
the rejected ones faster. So minitune reports both, and warns.
"""

# %%
print("== 7. The step, and after")
wanted = 0.1
rate = wanted / (beta / 2 * (g_w - g_l).square().sum()).item()
step, place = -rate * gradient, 0
for parameter in parameters.values():
    parameter.data += step[place : place + parameter.numel()].reshape(parameter.shape).float()
    place += parameter.numel()
assert place == len(step)
with torch.no_grad():
    after_w, after_l = log_probability(chosen), log_probability(rejected)
    with adapter_disabled(model):
        still_w, still_l = log_probability(chosen), log_probability(rejected)
    after_loss, _, metrics = objective(model, batch)
assert still_w == reference_w and still_l == reference_l  # the reference stays
move_w, move_l = (after_w - log_w).item(), (after_l - log_l).item()
margin = move_w - move_l
pull = rate * beta / 2 * (g_w - g_l)
print(f"  log p(w) {move_w:+.4f} (first order {(pull @ g_w).item():+.4f}), log p(l) {move_l:+.4f} "
      f"(first order {(pull @ g_l).item():+.4f})")  # fmt: skip
print(f"  margin {margin:.4f} nats, loss {after_loss.item():.5f} after {math.log(2):.5f}")
check("the margin, first order and found", wanted, margin, 0.1)
check("log p(w), first order and found", pull @ g_w, move_w, 0.1)
check("the loss", math.log(1 + math.exp(-beta * margin)), after_loss, 1e-4)
check("the engine's margin is b d", beta * margin, metrics["margin"][0], 1e-2)
assert margin > 0 and after_loss < math.log(2) and metrics["accuracy"] == (1.0, 1)
weight_now = torch.sigmoid(torch.tensor(-beta * margin)).item()
print(f"  the pair's weight fell from 0.5 b to {weight_now:.4f} b")
assert weight_now < 1 / 2
print("== every number agreed")
