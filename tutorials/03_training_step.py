# %% [markdown]
"""# 3. One training step

A chat becomes tokens, some of them become targets, their losses become a gradient, and the gradient moves the
weights. We do each step by hand, on real weights, and compare with the engine. At the end two steps of the real
training loop must give the same weights as ours.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/03_training_step.py

The letters: B batch, T time, D model width, V vocabulary, R rank of the adapters, as in tutorials 1 and 2.
"""

# %%
import math
import tempfile
from pathlib import Path

import torch

import minitune
from minitune.data.batching import collate
from minitune.data.examples import Example
from minitune.losses.sft import sft_loss
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.model.trainable import trainable_parameters
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.sources import fetch
from minitune.text.chat import render_chat
from minitune.training.config import ADAM, OptimizerConfig, ScheduleConfig, TrainConfig
from minitune.training.loop import Job, fit
from minitune.training.objectives import supervised
from minitune.training.optimizer import Optimizer
from minitune.training.state import Progress

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)
V, D = model.head_weight.shape


def check(name, by_hand, engine, tolerance=1e-5):
    """Print and assert that two numbers or tensors are the same, up to rounding."""
    by_hand, engine = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (by_hand, engine))
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    error = ((by_hand - engine).abs().max() / by_hand.abs().max()).item()
    value = f"{by_hand.item():.7f} and {engine.item():.7f}" if by_hand.dim() == 0 else f"{by_hand.numel():,} numbers"
    print(f"  agree: {name}, {value}, largest error {error:.1e}")
    assert error <= tolerance, f"{name}: {error:.1e} apart"


# %% [markdown]
"""## 1. Which tokens are targets

The chat template writes the conversation as one text, with markers around each turn. The model learns to write
the answer. It does not learn to write the question: at work the question is given. So only the answer's tokens
are targets, and the marker `<|im_end|>` after it. Without that marker the model would never learn to stop.

Our first row has 2 targets: the word, and the end of the turn.
"""

# %%
print("== 1. Which tokens are targets")


def row(question, answer):
    """Return a chat of one question and one answer as token ids, with a mark on each target."""
    system = {"role": "system", "content": "Answer the question."}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = render_chat(tokenizer, [system, *turns])
    return Example(tuple(rendered.ids), tuple(rendered.targets), origin="tutorial")


short = row("A warm and funny film. Positive or negative?", "positive")
long = row("Dull from start to end. Tell me more.", "The review is negative: he was bored by all of it.")
names = [tokenizer.decode([id], skip_special=False) for id in short.ids]
for place, (name, id, target) in enumerate(zip(names, short.ids, short.targets, strict=True)):
    print(f"  {place:3} {id:6} {name!r:16} {'TARGET' if target else ''}")
assert [name for name, target in zip(names, short.targets, strict=True) if target] == ["positive", "<|im_end|>"]
assert sum(short.targets) == 2 and names[-1] == "\n" and not short.targets[-1]

# %% [markdown]
"""The same as a picture, where matplotlib is installed: targets are orange, the rest is only read.
"""

# %%
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(10, 1.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 100)
    axes.set_ylim(-2.7, 0.7)
    left, line = 1.0, 0
    for name, target in zip(names, short.targets, strict=True):
        label = name.replace("\n", "\\n")
        if left + 0.86 * len(label) > 96:
            left, line = 1.0, line + 1
        box = {"facecolor": "orange" if target else "lightgrey", "edgecolor": "none", "boxstyle": "square,pad=0.25"}
        axes.text(left, -line, label, family="monospace", fontsize=10, va="center", bbox=box)
        left += 0.86 * len(label) + 1.8
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/loss_mask.png", dpi=120)
    print("  picture: runs/tutorials/loss_mask.png")

# %% [markdown]
"""## 2. The shift

The logits at a place predict the next token. So the targets move one place to the left: at the place of the
token before the answer stands the answer's first token. Where there is nothing to learn stands -100. The engine
fills a batch with padding up to a multiple of 32 tokens; padding has no target either.
"""

# %%
print("== 2. The shift")
batch = collate([[short]], pad_id=tokenizer.pad_id)
B, T = batch.ids.shape
length = len(short.ids)
shifted = [-100] * T
for place in range(length - 1):
    if short.targets[place + 1]:
        shifted[place] = short.ids[place + 1]
print(f"  ids (B={B}, T={T})   targets (B={B}, T={T})")
for place in range(length - 4, length):
    print(f"  at {names[place]!r:14} the target is {shifted[place]}")
assert shifted == batch.targets[0].tolist() and batch.target_count == 2
assert short.ids[-3:-1] == tuple(shifted[length - 4 : length - 2])
assert set(shifted[length - 2 :]) == {-100} and T % 32 == 0

# %% [markdown]
"""## 3. The loss

The loss of a target t is `-log p(t)`, where p is the softmax of the logits before it: 0 when the model was
certain and right, and log V = 10.8 when it guesses evenly. The loss of a row is the sum over its targets.

The engine never makes all logits. `linear_cross_entropy` takes the hidden states at the target places only, and
the head. The number must be the same.
"""

# %%
print("== 3. The loss")
with torch.no_grad():
    logits = model(batch.ids)[0].double()  # (T, V)
    hidden = model.hidden(batch.ids)  # (B, T, D)
by_hand = []
for place, target in enumerate(shifted):
    if target != -100:
        numbers = logits[place].tolist()
        top = max(numbers)  # exp of a large number overflows, so the largest is taken out first
        log_sum = top + math.log(sum(math.exp(number - top) for number in numbers))
        by_hand.append(log_sum - numbers[target])
        print(f"  {names[place + 1]!r:14} p = {math.exp(-by_hand[-1]):.4f}   -log p = {by_hand[-1]:.4f}")
chosen = batch.targets >= 0
losses = linear_cross_entropy(hidden[chosen], model.head_weight, batch.targets[chosen])
check("the loss of each target", by_hand, losses)
check("their sum", sum(by_hand), sft_loss(hidden, model.head_weight, batch.targets)[0])
assert round(math.log(V), 1) == 10.8 and -math.log(1) == 0

# %% [markdown]
"""Its gradient at the logits is short. With `loss = log(sum of exp(z)) - z_t`:

    d loss / d z_v = p_v - 1 where v is the target, and p_v elsewhere

The target's logit is pushed up, all others down, each as much as the model was wrong. These numbers sum to
zero.
"""

# %%
place = length - 4  # the place before the answer
z = logits[place].clone().requires_grad_(True)
(z.logsumexp(0) - z[shifted[place]]).backward()
gradient = logits[place].softmax(0)
gradient[shifted[place]] -= 1
check("p - onehot", gradient, z.grad)
assert abs(gradient.sum().item()) < 1e-9

# %% [markdown]
"""## 4. Sum over sum, not mean of means

A second row has a longer answer: 14 targets. Two rows are one step. What is the loss of the step?

- Sum over sum: all losses added, divided by all 16 targets. Every target weighs 1/16.
- Mean of means: the mean of each row, then the mean of the two. A target of the short row weighs 1/4, one of
  the long row 1/28. So 2 tokens decide half of the step, only because they have few neighbours.

Many training loops do the second without saying so. minitune does the first, always.
"""

# %%
print("== 4. Sum over sum, not mean of means")
model.requires_grad_(False)
add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=0)
parameters = trainable_parameters(model)  # name -> A or B of each adapter


def forward_by_hand(example):
    """Return the summed loss of one row and its number of targets, from the full logits."""
    logits = model(torch.tensor([example.ids]))[0].double()  # (T, V)
    places = [place for place in range(len(example.ids) - 1) if example.targets[place + 1]]
    goal = torch.tensor([example.ids[place + 1] for place in places])
    return -logits[places].log_softmax(-1)[torch.arange(len(places)), goal].sum(), len(places)


def gradients_of(loss):
    """Return the gradient of every trained parameter, in 64 bits."""
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {name: part.double() for name, part in zip(parameters, found, strict=True)}


loss_1, count_1 = forward_by_hand(short)
loss_2, count_2 = forward_by_hand(long)
g_1, g_2 = gradients_of(loss_1), gradients_of(loss_2)
right = (loss_1 + loss_2).item() / (count_1 + count_2)
wrong = (loss_1.item() / count_1 + loss_2.item() / count_2) / 2
print(f"  short: {loss_1.item():.4f} over {count_1}; long: {loss_2.item():.4f} over {count_2}")
print(f"  sum over sum {right:.4f}, mean of means {wrong:.4f}")
assert (count_1, count_2, count_1 + count_2) == (2, 14, 16) and 2 * 2 == 4 and 2 * 14 == 28
assert abs(right - wrong) > 0.05

sum_over_sum = {name: (g_1[name] + g_2[name]) / (count_1 + count_2) for name in parameters}
mean_of_means = {name: (g_1[name] / count_1 + g_2[name] / count_2) / 2 for name in parameters}


def norm_of(gradients):
    """The length of all gradients together, as one long vector."""
    return math.sqrt(sum(part.square().sum().item() for part in gradients.values()))


apart = norm_of({name: sum_over_sum[name] - mean_of_means[name] for name in parameters}) / norm_of(sum_over_sum)
print(f"  the gradient of the mean of means is off by {apart:.0%} of its length")
assert apart > 0.1

# %% [markdown]
"""## 5. Accumulation: two rows one by one, or together

A step can be too large for memory. Then its rows go through the model one by one, and their gradients are added
up. Because we add sums, and divide once at the end, the result is that of one large batch.

In the batch the short row is padded. SmolLM2 pads with id 2, which is `<|im_end|>` itself. So padding must be
known by its place, not by its id. If every id 2 were masked, the end of the turn would never be learned.
"""

# %%
print("== 5. Accumulation")
both = collate([[short], [long]], pad_id=tokenizer.pad_id)
print(f"  ids (B={both.ids.shape[0]}, T={both.ids.shape[1]}), {both.target_count} targets")
assert tokenizer.pad_id == 2 and tokenizer.decode([2], skip_special=False) == "<|im_end|>"
assert (both.targets[0, len(short.ids) :] == -100).all() and (both.targets == 2).sum() == 2
loss_sum, weight, _ = supervised(model, both)
together = {name: part / weight for name, part in gradients_of(loss_sum).items()}
check("the summed loss", loss_1 + loss_2, loss_sum)
flat = [torch.cat([part.flatten() for part in gradients.values()]) for gradients in (sum_over_sum, together)]
check("the gradient, one by one and together", *flat, tolerance=5e-5)

# %% [markdown]
"""## 6. Clipping

One strange row can make a huge gradient. So the length of all gradients together is limited (Pascanu et al.
2013, algorithm 1). If it is above the limit c, all are multiplied by c / length. The direction stays.

The length here is the root of the sum of all squares, over all parameters. The limit is 1.
"""

# %%
print("== 6. Clipping")


def clip(gradients, limit):
    """Scale the gradients down to the limit if they are longer; the 0.000001 avoids dividing by zero, as in torch."""
    length = norm_of(gradients)
    factor = min(1.0, limit / (length + 0.000001))
    return {name: part * factor for name, part in gradients.items()}, length


clipped, length = clip(sum_over_sum, 1.0)
for name, parameter in parameters.items():
    parameter.grad = sum_over_sum[name].float()
torch_length = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm=1.0)
print(f"  length before {length:.4f}, after {norm_of(clipped):.4f}")
check("length", length, torch_length)
check("clipped gradient", clipped["model.layers.0.mlp.up_proj.lora.B"],
      parameters["model.layers.0.mlp.up_proj.lora.B"].grad)  # fmt: skip
assert length > 1 and math.isclose(norm_of(clipped), 1, rel_tol=1e-5)
model.zero_grad()

# %% [markdown]
"""## 7. AdamW

AdamW keeps two running means for each number: m of the gradient, v of its square (Kingma & Ba 2015, algorithm
1). In step t, with rate a, b1 = 0.9, b2 = 0.999, decay w (Loshchilov & Hutter 2019, algorithm 2):

    m = b1 m + (1 - b1) g              m' = m / (1 - b1^t)
    v = b2 v + (1 - b2) g^2            v' = v / (1 - b2^t)
    p = p - a w p - a m' / (sqrt(v') + 0.00000001)

m and v start at zero, so at first they are too small. Dividing by `1 - b^t` puts that right. In step 1, m is
0.1 g and v is 0.001 g^2. Without the correction the step would be 0.1 / sqrt(0.001) = 3.16 times the rate. With
it, it is exactly the rate, whatever the size of g. So Adam's first step looks only at the sign.
"""

# %%
print("== 7. AdamW")
(b1, b2), tiny = ADAM["betas"], ADAM["eps"]
assert (b1, b2, tiny) == (0.9, 0.999, 0.00000001)


def adamw(p, g, m, v, t, rate, decay):
    """Return p, m and v after step t, counted from 1."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_corrected, v_corrected = m / (1 - b1**t), v / (1 - b2**t)
    return p - rate * decay * p - rate * m_corrected / (v_corrected**0.5 + tiny), m, v


p = start = 0.5
m = v = 0.0
tensor = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
judge = torch.optim.AdamW([tensor], lr=0.01, betas=(b1, b2), eps=tiny, weight_decay=0.1)
for t, g in enumerate((0.3, -0.2, 0.004), start=1):
    p, m, v = adamw(p, g, m, v, t, rate=0.01, decay=0.1)
    tensor.grad = torch.tensor([g], dtype=torch.float64)
    judge.step()
    check(f"step {t}, gradient {g}", p, tensor[0], 1e-12)
for g in (1000.0, 0.001):
    moved, m, v = adamw(start, g, 0.0, 0.0, 1, rate=0.01, decay=0.0)
    assert math.isclose(m, 0.1 * g) and math.isclose(v, 0.001 * g * g)
    assert math.isclose(start - moved, 0.01, rel_tol=1e-4) and round(m / v**0.5, 2) == 3.16

# %% [markdown]
"""## 8. The real loop

Now all of it at once, for every adapter. Two steps of two rows each, with unequal answers. The rate falls in a
straight line: 0.001 in the first step, 0.0005 in the second. First by hand, in 64 bits where the engine uses
32.
"""

# %%
print("== 8. The real loop")
rows = [
    short,
    long,
    row("A masterpiece! Positive or negative?", "positive"),
    row("I left after an hour. How was it?", "The writer did not like the film and left early."),
]
start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
p = {name: value.double() for name, value in start.items()}
m = {name: torch.zeros_like(value) for name, value in p.items()}
v = {name: torch.zeros_like(value) for name, value in p.items()}
losses, lengths, rates = [], [], (0.001, 0.0005)
for t in (1, 2):
    total, count = 0.0, 0
    gradients = {name: torch.zeros_like(value) for name, value in p.items()}
    for example in rows[2 * t - 2 : 2 * t]:
        loss, targets = forward_by_hand(example)
        for name, part in gradients_of(loss).items():
            gradients[name] += part
        total, count = total + loss.item(), count + targets
    gradients, length = clip({name: part / count for name, part in gradients.items()}, 1.0)
    for name, parameter in parameters.items():
        p[name], m[name], v[name] = adamw(p[name], gradients[name], m[name], v[name], t, rates[t - 1], 0.1)
        parameter.data.copy_(p[name])
    losses.append(total / count)
    lengths.append(length)
    print(f"  by hand, step {t}: loss {losses[-1]:.5f} over {count} targets, length {length:.4f}")
for name, parameter in parameters.items():  # back to the start, for the loop
    parameter.data.copy_(start[name])

# %% [markdown]
"""Then the same by `minitune.training.loop.fit`, the loop that every run of minitune uses. It gets a job: what
trains, with which rows, how. A real run also writes a journal; ours is a list.
"""


# %%
class Notes:
    """What the loop tells about its steps."""

    def __init__(self):
        """Start empty."""
        self.lines = []

    def step(self, line):
        """Keep the line of a step."""
        self.lines.append(line)

    def say(self, text):
        """Print a message."""
        print(f"  {text}")


settings = TrainConfig(
    batch_size=1,
    accumulation_steps=2,
    max_steps=2,
    optimizer=OptimizerConfig(learning_rate=0.001, weight_decay=0.1, max_grad_norm=1.0),
    schedule=ScheduleConfig(kind="linear", warmup=0.0),
)
notes = Notes()
with tempfile.TemporaryDirectory() as folder:
    job = Job(
        config=settings,
        model=model,
        parameters=parameters,
        optimizer=Optimizer(parameters, settings.optimizer),
        objective=supervised,
        stream=lambda begin: iter([collate([[example]], pad_id=tokenizer.pad_id) for example in rows][begin:]),
        total_batches=len(rows),
        validation=None,
        sample=list,
        checkpoints=Path(folder),
        fingerprint={},
        progress=Progress(),
        journal=notes,
    )
    status = fit(job)
for line in notes.lines:
    print(f"  the loop, step {line['step']}: loss {line['loss']:.5f}, length {line['grad_norm']:.4f}")
assert rates == (0.001, 0.0005) and torch.finfo(torch.float64).bits == 64 and torch.finfo(torch.float32).bits == 32
assert status == "finished" and job.progress.target_tokens == sum(sum(example.targets) for example in rows)
check("the losses", losses, [line["loss"] for line in notes.lines])
check("the lengths", lengths, [line["grad_norm"] for line in notes.lines], tolerance=5e-5)
check("the rates", rates, [line["learning_rate"] for line in notes.lines])

# %% [markdown]
"""And the weights. We measure how far each number moved in units of the first rate. Two steps can move a number by
about 1.5 rates. Ours and the loop's differ by less than 0.0001 rates on average, and 999 of 1,000 numbers by
less than 0.001 rates.

A few differ more. Their gradient is so small that 32 bits cannot hold it well. Adam divides by its size, so it
makes a full step of it, and makes its rounding as large. That does no harm: their gradient says that they do
not matter.
"""

# %%
difference = torch.cat([(p[name] - parameters[name].double()).flatten() for name in p]).abs() / rates[0]
distance = torch.cat([(p[name] - start[name].double()).flatten() for name in p]).abs() / rates[0]
most = difference.kthvalue(int(len(difference) * 999 / 1_000)).values.item()
print(f"  {len(difference):,} numbers; moved by up to {distance.max():.3f} rates, on average {distance.mean():.3f}")
print(f"  by hand against the loop: average difference {difference.mean():.1e} rates, 999 of 1,000 below {most:.1e}, "
      f"largest {difference.max():.1e}")  # fmt: skip
assert difference.mean() < 0.0001 and most < 0.001 and 999 / 1_000 < 1
assert 1 < distance.max() < 2 and (rates[0] + rates[1]) / rates[0] == 1.5
print("== every number agreed")
