# %% [markdown]
"""# 8. Where each byte of a training step lives

A model of 135 million weights in bf16 is 269 MB. Training it takes much more, or only a little more, depending on
how. We count what a step holds, kind by kind, for full fine-tuning, LoRA and QLoRA. For each kind we look at the
real objects, and compare with `minitune.memory`, a ledger that computes the same from the model's config alone.
With that we can count what no machine here could hold: a model of 8 billion.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/08_qlora_memory.py

The letters: B batch, T time, D model width, F feed-forward width, H heads, K key/value heads, d head width, R rank,
V vocabulary, L layers, N = B x T tokens. MB is 1,000,000 bytes, GB is 1,000 of them. What is measured here is
measured on a CPU.
"""

# %%
import ctypes
import gc
import json
import math
import tempfile
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import minitune
from minitune.losses.sft import sft_loss
from minitune.memory import ledger
from minitune.model.config import LoRAConfig, ModelConfig
from minitune.model.lora import add_lora, linear_modules, quantized_weights
from minitune.model.rope import Rope
from minitune.model.trainable import train_all, trainable_parameters
from minitune.ops.nf4 import quantize
from minitune.sources import fetch
from minitune.training.config import OptimizerConfig
from minitune.training.optimizer import Optimizer

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="bfloat16").train()
config = model.config
D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
H, K, d, R = config.num_heads, config.num_kv_heads, config.head_dim, LoRAConfig().rank
B, T = 2, 128
N = B * T
ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))  # (B, T)


def total(tensors):
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def check(name, by_hand, engine, tolerance=0.0):
    """Print and assert that two numbers of bytes are the same, or apart by a share of `tolerance` at most."""
    apart = f", {engine / by_hand - 1:+.1%}" if tolerance else ""
    print(f"  agree: {name}, {by_hand:,} and {engine:,} bytes{apart}")
    assert abs(engine - by_hand) <= tolerance * by_hand, f"{name}: {by_hand:,} against {engine:,}"


# %% [markdown]
"""## 1. Weights, gradients, moments: full fine-tuning

Every weight trains, so each has four numbers: itself, its gradient, and AdamW's two moments (tutorial 3). In bf16
that is 8 bytes for each of 134,515,008 weights, 1,076 MB. (With fp32 it would be twice that. minitune keeps no fp32
copy of a bf16 model; it rounds stochastically.)
"""

# %%
print("== 1. Weights, gradients, moments")
parameters = train_all(model)
count = sum(p.numel() for p in parameters.values())
optimizer = Optimizer(parameters, OptimizerConfig(max_grad_norm=None))
moments = total(tensor for fields in optimizer.moments.values() for tensor in fields.values())
full = ledger(config, "full", B, T)
print(f"  {count:,} parameters")
assert (
    count == 134_515_008
    and round(count / 1e6) == 135
    and round(full.weights / 1e6) == 269
    and 2 * 4 == 8
    and round(8 * count / 1_000_000) == 1_076
)
check("weights", total(parameters.values()), full.weights)
check("gradients", total(parameters.values()), full.gradients)  # a gradient has the parameter's shape and dtype
check("moments", moments, full.optimizer)
assert full.weights + full.gradients + full.optimizer == 8 * count
del optimizer

# %% [markdown]
"""## 2. Activations: what the forward pass keeps

The backward pass needs numbers of the forward pass again. For each token, one layer keeps

    its two inputs, before attention and before the feed-forward part          2 D
    queries, keys and values, after rope                                      (H + 2 K) d
    what o_proj reads, the output of attention                                 H d
    gate and up                                                                2 F
    one fp32 number for each of its two norms

The inputs of q, k, v, gate, up and down are not kept. They come from a norm, or from silu(gate) * up, so they are
made again. That saves 2 D + F numbers. For our model a layer keeps 5,760 numbers and 8 bytes for a token: 11,528
bytes in bf16.

We ask autograd itself: it tells us every tensor that it saves. (Weights are saved too, but they exist anyway.)
"""

# %%
print("== 2. Activations")
numbers = 2 * D + (H + 2 * K) * d + H * d + 2 * F
assert numbers == 5_760 and 2 * 4 == 8 and 2 * numbers + 8 == 11_528


def saved_by_autograd():
    """Run forward; return the loss, and the bytes of each storage kept for the backward pass, by shape and dtype."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = (storage, f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = sft_loss(model.hidden(ids), model.head_weight, ids)
    sizes = {}
    for storage, shape in kept.values():
        bytes_so_far, times = sizes.get(shape, (0, 0))
        sizes[shape] = bytes_so_far + storage.nbytes(), times + 1
    return loss, sizes


loss, sizes = saved_by_autograd()
for shape, (size, times) in sorted(sizes.items(), key=lambda item: -item[1][0])[:7]:
    print(f"  {size / 1e6:7.2f} MB in {times:3} tensors, such as {shape}")
kept = sum(size for size, _ in sizes.values())
layers = L * N * (2 * numbers + 8)
head_gradient = V * D * 2
print(f"  {L} layers x {N} tokens x {2 * numbers + 8:,} bytes = {layers / 1e6:.1f} MB")
check("all that is saved, and the ledger", kept, full.activations + head_gradient, tolerance=0.001)
assert 0.95 < layers / full.activations < 1

# %% [markdown]
"""One large tensor in that list is no activation: the head's gradient, V x D numbers, 56.6 MB. The loss makes it on
the way forward, together with its logits, and drops those at once. The logits never exist as a whole: for 256
tokens they would be 25 MB here, in fp32 50 MB. For the 4,096 tokens of section 6 and Llama's vocabulary they would
be 2.1 GB in fp32.
"""

# %%
assert round(head_gradient / 1e6, 1) == 56.6 and N == 256
assert round(N * V * 2 / 1e6) == 25 and round(N * V * 4 / 1e6) == 50
assert round(4_096 * 128_256 * 4 / 1e9, 1) == 2.1
loss.backward()
check("gradients, the real ones", total(p.grad for p in parameters.values()), full.gradients)
model.zero_grad()
del loss, parameters
gc.collect()

# %% [markdown]
"""## 3. LoRA: the weights rest

The weights are frozen. They need no gradients and no moments, 2 bytes each. An adapter of rank R = 16 on each of
the 210 linear layers adds 4,884,480 numbers, in fp32, with four numbers for each: 16 bytes, 78 MB in all.

The activations do not shrink. The gradient still has to travel through every layer, and each adapter keeps R
numbers a token more. This is why LoRA alone does not make long texts cheap.
"""

# %%
print("== 3. LoRA")
adapters = add_lora(model, LoRAConfig())
parameters = trainable_parameters(model)
count = sum(p.numel() for p in parameters.values())
lora = ledger(config, "lora", B, T)
optimizer = Optimizer(parameters, OptimizerConfig(max_grad_norm=None))
assert (R, len(adapters), count) == (16, 210, 4_884_480) and round(16 * count / 1_000_000) == 78
check("adapters", total(p for adapter in adapters.values() for p in adapter.parameters()), lora.adapters)
check("moments", total(t for fields in optimizer.moments.values() for t in fields.values()), lora.optimizer)
loss, sizes = saved_by_autograd()
check("activations", sum(size for size, _ in sizes.values()), lora.activations, tolerance=0.001)
loss.backward()
check("gradients", total(p.grad for p in parameters.values()), lora.gradients)
more = L * N * 7 * R * 2
check("activations, without the adapters", lora.activations - more, full.activations - N * (D * 2 + 16))
assert lora.adapters + lora.gradients + lora.optimizer == 16 * count and 4 * 4 == 16
optimizer.average(N)
optimizer.step(1e-4)
del loss

# %% [markdown]
"""## 4. QLoRA: the resting weights shrink

The frozen weights of the 210 linear layers go to NF4 (tutorial 6): 4.127 bits in place of 16. Embedding and norms
stay in bf16. So 106 million weights take 55 MB in place of 212. The embedding alone, which is also the head, is 57
MB: in a small model a large share is not quantised at all.

To be used, a weight is decoded to bf16 first. All layers share one room for that, as large as the largest group
(gate and up together): 3.5 MB.
"""

# %%
print("== 4. QLoRA")
for path, layer in linear_modules(model).items():
    layer.replace_weight(quantize(layer.weight.data, name=path))
qlora = ledger(config, "qlora", B, T)
packed = quantized_weights(model).values()
linear_numbers = sum(w.shape.numel() for w in packed)
check("codes", total(w.packed for w in packed), qlora.codes)
check("scales", sum(w.nbytes for w in packed) - qlora.codes, qlora.scales)
check("the rest", total(p for name, p in model.named_parameters() if ".lora." not in name), qlora.weights)
print(f"  {8 * (qlora.codes + qlora.scales) / linear_numbers:.3f} bits for each of {linear_numbers:,} weights")
assert round(linear_numbers / 1e6) == 106 and round(8 * (qlora.codes + qlora.scales) / linear_numbers, 3) == 4.127
assert round((qlora.codes + qlora.scales) / 1e6) == 55 and round(2 * linear_numbers / 1e6) == 212
assert round(qlora.weights / 1e6) == 57 and round(qlora.decode_room / 1e6, 1) == 3.5 and len(packed) == 210
assert qlora.decode_room == 2 * F * D * 2 and qlora.activations == lora.activations

# %% [markdown]
"""## 5. The peak, counted and measured

Not all of this exists at the same time. At the end of the forward pass there are all activations and no gradients
(but the head's); at the end of the backward pass it is the other way round. In between the one goes down and the
other up, layer by layer. So the peak is at one of the two ends:

    held all along + the larger of   activations + early gradients + the larger room (loss, or backward of a layer)
                                     gradients + the room of the step

We run a QLoRA step under torch's profiler, which sees each tensor come and go, and add them up. Then we ask the
operating system how much the process holds at most. This is more, for three reasons. The matmul library compiles
kernels and keeps plans. The allocator keeps freed memory, in pieces that the next tensor may not fit in. And Python
and torch are in memory too; they were there before, so we subtract what there was before the step.
"""

# %%
print("== 5. The peak, counted and measured")
parameters = trainable_parameters(model)
model.zero_grad()
optimizer = Optimizer(parameters, OptimizerConfig(max_grad_norm=None))


def step():
    """One optimiser step on the random ids."""
    loss, count = sft_loss(model.hidden(ids), model.head_weight, ids)
    loss.backward()
    optimizer.average(count)
    optimizer.step(1e-4)


def allocated():
    """Return by how many bytes of tensors a step grows at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def resident(field):
    """Return what the process holds now (VmRSS) or held at its peak (VmHWM), in bytes; None where Linux is not."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1_024 for line in lines if line.startswith(field)), None)


step()  # the first one makes the rooms and plans that stay
measured = allocated()
check("a QLoRA step on top of what is held", measured, qlora.total - qlora.held, tolerance=0.05)
model.gradient_checkpointing = True
step()
lean = ledger(config, "qlora", B, T, gradient_checkpointing=True)
check("the same with checkpointing", allocated(), lean.total - lean.held, tolerance=0.05)
model.gradient_checkpointing = False

# %% [markdown]
"""Checkpointing keeps only the input of each layer, D numbers a token in place of 5,872 (with the adapters), and
makes the rest again in the backward pass, for one layer at a time. It costs about one more forward pass.

Now the process. (Torch's checkpointing loads torch's compiler when it is first used, which takes memory as well.
That has just happened, so it is not in what follows.) We let the allocator give back what it can, note what is
held, reset the mark of the peak, and run a step.
"""

# %%
assert numbers + 7 * R == 5_872
try:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
except (OSError, AttributeError):
    print("  (the peak of a process cannot be reset here; not measured)")
else:
    before = resident("VmRSS")
    step()
    grown = resident("VmHWM") - before
    print(f"  the process grew by {grown / 1e6:.0f} MB, tensors by {measured / 1e6:.0f} MB")
    assert 0.5 * measured < grown < 3 * measured

# %% [markdown]
"""All lines of the ledger, for the three methods, as they are here: 256 tokens a step. "room" is what exists only
for a moment. The peak is not the sum. The lines "allocator" and "library" are the first two of those three reasons:
measured, not derived. With them the peak is what a process grows by, "resident".
"""

# %%
ledgers = {"full": full, "LoRA": lora, "QLoRA": qlora, "QLoRA, ckpt": lean}


def table(columns):
    """Print ledgers side by side, in MB."""
    print(" " * 18 + "".join(f"{name:>14}" for name in columns))
    for name, *_ in (line.split("  ") for line in str(next(iter(columns.values()))).splitlines()):
        field = {"peak": "total", "held all along": "held"}.get(name, name.replace(" ", "_"))
        print(f"  {name:16}" + "".join(f"{getattr(each, field) / 1e6:14,.1f}" for each in columns.values()))


table(ledgers)
assert full.total > lora.total > qlora.total > lean.total
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(ledgers)
    for part in ("weights", "codes", "scales", "adapters", "optimizer", "gradients", "activations"):
        widths = [getattr(each, part) / 1e6 for each in ledgers.values()]
        axes.barh(list(ledgers), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"MB, {B} x {T} tokens (the rooms left out; gradients and activations never peak together)")
    axes.legend(fontsize=8)
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/memory.png", dpi=120)
    print("  picture: runs/tutorials/memory.png")

# %% [markdown]
"""## 6. The same for 8 billion

The shape of Llama 3 8B: L = 32 layers, D = 4,096, F = 14,336, H = 32 heads and K = 8 key/value heads of d = 128, V
= 128,256, and a head of its own. That makes 8,030,261,248 weights. We count a step of 2 rows of 2,048 tokens, with
checkpointing.

Nothing here is measured: it is arithmetic, and it is for the code that runs on a CPU. On a GPU the loss takes 268
MB for its logits, whatever the number of tokens, and the rest is nearly the same.
"""

# %%
print("== 6. The same for 8 billion")
llama = ModelConfig(vocab_size=128_256, hidden_size=4_096, intermediate_size=14_336, num_layers=32, num_heads=32,
                    num_kv_heads=8, head_dim=128, rope=Rope(500_000.0))  # fmt: skip
assert (llama.intermediate_size, llama.head_dim, llama.num_heads * llama.head_dim) == (14_336, 128, llama.hidden_size)
assert 1_000_000 * 1_000 == 1e9 and 256 << 20 == 268_435_456 and round(268_435_456 / 1e6) == 268
large = {
    method: ledger(llama, method.lower(), 2, 2_048, gradient_checkpointing=True) for method in ("full", "LoRA", "QLoRA")
}
count = large["full"].weights // 2
assert count == 8_030_261_248 and (2, 2_048) == (2, 2 * 1_024)
table(large)

# %% [markdown]
"""By hand, in GB: full fine-tuning holds 8 bytes for each weight, 64.2. LoRA holds 2 for each, 16.1, and 42 million
numbers of adapters. QLoRA's frozen weights are 5.7: 3.6 for 7.0 billion quantised ones, and 2.1 for the embedding
and the head. On a GPU of 24 GB the second barely fits and the third has room to spare; the first needs 80.

And the activations? Without checkpointing a layer keeps 94,440 bytes a token, times 32 layers, times 4,096 tokens:
that is 12.4 GB, more than twice what QLoRA needs for all its weights. With 4 bits a weight, it is the activations
that decide how long a text may be.
"""

# %%
weights, quantized = large["full"].weights, large["QLoRA"].codes + large["QLoRA"].scales
assert round(8 * count / 1e9, 1) == 64.2 and round(weights / 1e9, 1) == 16.1
assert round(large["LoRA"].adapters / 4 / 1e6) == 42
assert round(quantized / 1e9, 1) == 3.6 and round(large["QLoRA"].weights / 1e9, 1) == 2.1
assert round((quantized + large["QLoRA"].weights) / 1e9, 1) == 5.7
assert round(large["QLoRA"].codes * 2 / 1e9, 1) == 7.0 and 4 * 2 == 8
assert 24e9 > large["LoRA"].total > 16e9 and large["QLoRA"].total < 24e9 / 2 and 64.2e9 < large["full"].total < 80e9
assert 24e9 / 1e9 == 24 and 80e9 / 1e9 == 80
D, F, H, K, d = 4_096, 14_336, 32, 8, 128
token = 2 * (2 * D + (H + 2 * K) * d + H * d + 2 * F + 7 * R) + 8
whole = ledger(llama, "qlora", 2, 2_048)
print(f"  a layer keeps {token:,} bytes a token; all of them {whole.activations / 1e9:.1f} GB without checkpointing")
assert token == 94_440 and round(32 * token * 4_096 / 1e9, 1) == 12.4
assert math.isclose(whole.activations, 32 * token * 4_096, rel_tol=0.01)
assert whole.activations > 2 * (quantized + large["QLoRA"].weights)
print("== every number agreed")
