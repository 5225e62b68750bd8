# %% [markdown]
"""# 6. NF4: a weight in four bits

QLoRA (Dettmers et al. 2023) keeps the frozen weights of a model in 4 bits each and trains a LoRA on top. Four bits
can name 16 values. Which 16? How are real weights turned into them and back? And where does the error go?

We do it by hand on a real matrix, and compare with the engine, bit for bit. Open this file in VS Code or Jupyter
and run it cell by cell, or run it as a whole:

    python tutorials/06_nf4.py

The letters: D model width, F feed-forward width, as in tutorials 1 to 3.
"""

# %%
import math
from pathlib import Path
from statistics import NormalDist

import torch

import minitune
from minitune.codebooks import dynamic_map
from minitune.model.lora import linear_modules
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.ops.nf4 import codebook, quantize
from minitune.sources import fetch

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)


def check(name, by_hand, engine, tolerance=0.0):
    """Print and assert that two numbers or tensors are the same; without a tolerance, bit for bit."""
    by_hand, engine = torch.as_tensor(by_hand), torch.as_tensor(engine)
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    what = "one number" if by_hand.dim() == 0 else f"{by_hand.numel():,} numbers"
    if tolerance:
        error = ((by_hand.double() - engine.double()).abs().max() / by_hand.double().abs().max()).item()
        print(f"  agree: {name}, {what}, largest error {error:.1e}")
        assert error <= tolerance, f"{name}: {error:.1e} apart"
    else:
        assert by_hand.dtype == engine.dtype and torch.equal(by_hand, engine), f"{name} differs"
        print(f"  equal, bit for bit: {name}, {what}")


# %% [markdown]
"""## 1. A matrix, and what its weights look like

We take the `down_proj` of the last layer. It has D = 576 rows and F = 1,536 columns, 884,736 numbers. Read row by
row, they are cut into blocks of 64: that makes 13,824 blocks. Each block is divided by its largest magnitude, its
absmax. After that every number is between -1 and 1.

How are the numbers of the matrix spread? Nearly as a normal distribution would have it, only with a few more far
out. Of a normal 68.3% lie within one standard deviation of the mean and 95.4% within two.

(The file we load was itself made in 4 bits, by another rule: the GGUF kind Q4_1, which has 16 even steps in each
run of 32 numbers. So this tutorial quantises numbers that were quantised before. It changes no rule below, but a
figure from a model that was published in 16 bits would be a little different.)
"""

# %%
print("== 1. A matrix, and what its weights look like")
W = model.model.layers[-1].mlp.down_proj.weight.detach().contiguous()  # (D, F)
D, F = W.shape
assert (D, F, W.numel()) == (576, 1_536, 884_736)
blocks = W.view(-1, 64)  # (blocks, 64)
absmax = blocks.abs().amax(1)  # (blocks,)
print(f"  W (D={D}, F={F})   blocks {tuple(blocks.shape)}   absmax {tuple(absmax.shape)}")
assert len(absmax) == 13_824 and blocks.shape[1] == 64
spread = W.std()
shares = []
for deviations in (1, 2):
    normal = 100 * (NormalDist().cdf(deviations) - NormalDist().cdf(-deviations))
    inside = 100 * ((W - W.mean()).abs() < deviations * spread).double().mean().item()
    print(f"  within {deviations} standard deviations ({spread:.4f}): {inside:.1f}% of W, {normal:.1f}% of a normal")
    shares.append(round(normal, 1))
    assert abs(inside - normal) < 2
assert shares == [68.3, 95.4]
assert W.view(-1, 32).shape[1] == 32 and max(len(row.unique()) for row in W.view(-1, 32)[:200]) <= 16

# %% [markdown]
"""## 2. From quantiles to a codebook

The 16 values should each be used about equally often, then four bits carry the most. For a normal distribution
these are its quantiles: the value below which a given share of all numbers lies. So the paper takes them at even
steps of probability (Dettmers et al. 2023, equation 4).

Two more wishes complicate it. Zero has to be one of the values, since it stands for nothing at all. And -1 and 1
have to be there, since each block holds one of them. So the two sides are made apart: 8 values above zero, at 8
probabilities from p down to just above 1/2, and 7 below zero, at 7 probabilities. With zero that makes 16. The
outermost p cannot be 1, where the quantile is infinite. The published table has p = 0.9677083, the mean of 1 - 1/30
and 1 - 1/32. At the end all are divided by the largest.
"""

# %%
print("== 2. From quantiles to a codebook")
p = (1 - 1 / 30 + 1 - 1 / 32) / 2
assert round(p, 7) == 0.9677083 and p == (29 / 30 + 31 / 32) / 2


def side(count):
    """Return `count` quantiles above zero, the largest first: probabilities p, ..., in even steps towards 1/2."""
    step = (p - 1 / 2) / count
    return [NormalDist().inv_cdf(p - i * step) for i in range(count)]


largest = NormalDist().inv_cdf(p)
above = [value / largest for value in reversed(side(8))]
below = [-value / largest for value in side(7)]
codes = [*below, 0.0, *above]
print("  by hand: " + " ".join(f"{value:.4f}" for value in codes))
assert (len(below), len(above), len(codes)) == (7, 8, 16) and codes[0] == -1 and codes[-1] == 1
check("the codebook", codes, codebook("nf4"), tolerance=1e-6)
code = codebook("nf4")  # the published fp32 numbers, for what has to be equal bit for bit

# %% [markdown]
"""## 3. From weights to bits

A weight, divided by its block's absmax, gets the number of the nearest code. Between two neighbours the border is
their midpoint. Two codes make a byte: the first weight goes into the upper four bits (the high nibble), the second
into the lower. 884,736 weights become 442,368 bytes.

First one block, in a loop, to see it happen; then all.
"""

# %%
print("== 3. From weights to bits")
midpoints = (code[:-1] + code[1:]) / 2  # (15,)
chosen = 7_000
row, scaled = blocks[chosen], blocks[chosen] * (1 / absmax[chosen])
found = []
for number in scaled:
    found.append(sum(1 for border in midpoints if number > border))  # how many borders it has passed
for i in (0, 1, int(row.abs().argmax())):
    print(f"  weight {row[i]:8.4f} / absmax {absmax[chosen]:.4f} = {scaled[i]:7.4f}, nearest is code {found[i]:2}, "
          f"{code[found[i]]:7.4f}")  # fmt: skip
assert found[int(row.abs().argmax())] in (0, 15) and len(midpoints) == 15
byte = (found[0] << 4) | found[1]
print(f"  codes {found[0]} and {found[1]} make the byte {found[0]:04b}{found[1]:04b}, which is {byte}")

number = torch.bucketize(blocks * (1 / absmax)[:, None], midpoints).flatten()  # (n,), 0 to 15
packed = ((number[::2] << 4) | number[1::2]).to(torch.uint8)  # (n / 2,)
weight = quantize(W, "nf4", block_size=64, double_quant=False)
check("this block's codes", found, number[chosen * 64 : chosen * 64 + 64])
check("the bytes", packed, weight.packed)
check("absmax", absmax, weight.absmax)
assert packed.numel() == 442_368 and int(packed[chosen * 32]) == byte

# %% [markdown]
"""## 4. And back

To decode is a table lookup and a multiplication: `code[number] * absmax`, both in 32 bits, then rounded once to
what the model computes in. That order matters. If the codes and scales were first rounded to bf16 and then
multiplied there, three roundings would follow one another, and a fifth of these weights would come out as another
number. Then a model trained by one program would not be quite the model that another one loads.
"""

# %%
print("== 4. And back")
wide = code[number].view(-1, 64) * absmax[:, None]  # (blocks, 64), fp32
check("decoded to fp32", wide.view(D, F), weight.dequantize(torch.float32))
check("decoded to bf16", wide.view(D, F).bfloat16(), weight.dequantize(torch.bfloat16))
thrice = code.bfloat16()[number].view(-1, 64) * absmax.bfloat16()[:, None]
other = (thrice.view(D, F) != weight.dequantize(torch.bfloat16)).double().mean().item()
print(f"  rounded three times instead of once: {other:.1%} of the weights differ")
assert torch.finfo(wide.dtype).bits == 32 and 0.15 < other < 0.25 and thrice.dtype == torch.bfloat16

# %% [markdown]
"""## 5. Double quantisation: the scales cost bits too

An absmax of 32 bits for 64 weights is half a bit each: 4.5 bits in all. The scales are numbers like others, so they
can be quantised too (Dettmers et al. 2023, section 3). They are all positive, so first their mean, the offset, is
taken away. Then blocks of 256 scales share one 32-bit number, and each scale has 8 bits:

    4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits a weight

The 256 values for these 8 bits are a "dynamic map" (Dettmers et al. 2022): a sign, then a decimal exponent from 0
down to -6, then a fraction. The more bits the exponent leaves, the finer the fraction. Large numbers get the finest
steps, and small ones are still not zero.
"""

# %%
print("== 5. Double quantisation")
positive = [1.0]
for exponent in range(7):  # 10^-6 with one fraction, 10^-5 with two, ... 1 with 64
    count = 2**exponent
    edges = [0.1 + 0.9 * i / count for i in range(count + 1)]
    positive += [10.0 ** (exponent - 6) * (low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
by_hand = sorted([0.0, *positive, *(-value for value in positive if value != 1.0)])  # -1 is left out, 0 takes its place
assert len(by_hand) == 256 and 0.1 + 0.9 == 1 and (exponent, exponent - 6, 0 - 6) == (6, 0, -6)
check("the dynamic map", by_hand, dynamic_map(True), tolerance=1e-6)
values = dynamic_map(True)

offset = absmax.mean()
groups = (absmax - offset).view(-1, 256)  # (54, 256)
nested = groups.abs().amax(1)  # (54,)
borders = (values[:-1] + values[1:]) / 2
eight = torch.bucketize(groups * (1 / nested)[:, None], borders).flatten().to(torch.uint8)
double = quantize(W, "nf4", block_size=64, double_quant=True)
check("codes of the scales", eight, double.absmax_codes)
check("one scale for 256 of them", nested, double.nested_absmax)
check("the offset", offset, double.offset)
decoded_scales = (values[eight.int()].view(-1, 256) * nested[:, None]).flatten() + offset
check("scales decoded", decoded_scales, double.scales())
check("weights decoded", (code[number].view(-1, 64) * decoded_scales[:, None]).view(D, F), double.dequantize())
bits = {name: 8 * w.nbytes / W.numel() for name, w in (("single", weight), ("double", double))}
print(f"  absmax {offset:.4f} on average; kept in 8 bits it is off by {(decoded_scales / absmax - 1).abs().mean():.2%}")
print(f"  bits a weight: {bits['single']:.3f} with fp32 scales, {bits['double']:.3f} with double quantisation")
assert bits["single"] == 4.5 and 32 / 64 == 1 / 2
assert round(4 + 8 / 64 + 32 / (64 * 256), 3) == 4.127 == round(bits["double"], 3)

# %% [markdown]
"""That saves 0.373 bits a weight. In a model of 8 billion that is 0.37 GB. The error grows by less than 1% of
itself, as the last lines show.
"""

# %%


def relative_error(quantized):
    """Return |decoded - W| / |W|, where |.| is the root of the sum of squares."""
    return ((quantized.dequantize() - W).norm() / W.norm()).item()


errors = {"single": relative_error(weight), "double": relative_error(double)}
print(f"  relative error: {errors['single']:.5f} with fp32 scales, {errors['double']:.5f} with double quantisation")
assert round(bits["single"] - bits["double"], 3) == 0.373 and round(8e9 * 0.373 / 8 / 1e9, 2) == 0.37 and 8e9 == 8 * 1e9
assert errors["single"] < errors["double"] < 1.01 * errors["single"]

# %% [markdown]
"""## 6. Where the error goes

A code's cell is the interval of numbers that are rounded to it. NF4 has narrow cells where there are many weights,
in the middle, and wide ones far out: next to 0 the cells are 0.09 wide, the two outermost codes lie 0.28 and 0.30
from their neighbours.

If a number were anywhere in its cell with the same probability, its squared error would be width^2 / 12 on average,
or width^2 / 3 in the two outermost cells, whose code is at their edge. We compare, code by code. (The outermost
cells do better than that: in each block one number is the absmax itself, and has no error at all.)

The shares are not quite equal, for a reason: we divide each block by its own largest weight, and the largest of 64
normal numbers is about 2.6 standard deviations, while the codebook is made as if it were 1.85 (the quantile at p).
So the outer codes are used less than the inner ones. The four bits carry 3.85 bits of information.
"""

# %%
print("== 6. Where the error goes")
scaled = (blocks * (1 / absmax)[:, None]).flatten()
squared = (scaled - code[number]).double().square()
share = torch.bincount(number, minlength=16).double() / len(number)
of_error = torch.bincount(number, weights=squared, minlength=16) / squared.sum()
edges = torch.cat([torch.tensor([-1.0]), midpoints, torch.tensor([1.0])])
widths = (edges[1:] - edges[:-1]).double()
print("  code    value   cell width   weights   root mean square error, and expected   share of squared error")
for i in range(16):
    error = (of_error[i] * squared.sum() / (share[i] * len(number))).sqrt()
    even = widths[i] / math.sqrt(3 if i in (0, 15) else 12)
    print(f"  {i:4} {code[i]:8.4f} {widths[i]:12.4f} {share[i]:9.1%} {error:24.4f} {even:14.4f} {of_error[i]:24.1%}")
    assert 0.6 < error / even < 1 if i in (0, 15) else 0.9 < error / even < 1.1
entropy = -(share * share.log2()).sum().item()
print(f"  information in four bits: {entropy:.2f} bits")
assert round(entropy, 2) == 3.85 and round(widths[7].item(), 2) == 0.09 == round(widths[6].item(), 2)
assert round((code[15] - code[14]).item(), 2) == 0.28 and round((code[1] - code[0]).item(), 2) == 0.30
draws = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).abs().amax(1).mean()
assert abs(draws - 2.6) < 0.25 and round(largest, 2) == 1.85 and 2**4 == 16 and 12 == 4 * 3
outer = share[:3].sum() + share[-3:].sum()
of_outer = of_error[:3].sum() + of_error[-3:].sum()
print(
    f"  the three outermost codes of each side hold {outer:.0%} of the weights and {of_outer:.0%} of the squared error"
)
assert 0.15 < outer < 0.30 and of_outer > 1.5 * outer

# %% [markdown]
"""Now against two other formats. FP4 is a 4-bit float: a sign, two bits of exponent and one of fraction. It spends
two of its 16 names on zero (+0 and -0), and between 0.005 and 0.167 of the absmax it has no value at all, just
where many weights are. The int8 here has 255 values in even steps for each row: 8 bits, and the same error
everywhere.

We sort the weights by magnitude into ten bins of equal size (deciles), and give the root mean square error of each.
It is in units of the standard deviation of W.
"""

# %%
formats = {"nf4": double, "fp4": quantize(W, "fp4"), "int8": quantize(W, "int8")}
order = W.abs().flatten().argsort()
bins = {}
for name, quantized in formats.items():
    error = (quantized.dequantize() - W).flatten()[order].double() / spread
    bins[name] = [part.square().mean().sqrt().item() for part in error.tensor_split(10)]
    whole = f"all {relative_error(quantized):.4f}, {8 * quantized.nbytes / W.numel():.3f} bits"
    print(f"  {name:5} " + " ".join(f"{value:.4f}" for value in bins[name]) + f"   {whole}")
assert all(len(row) == 10 for row in bins.values()) and 1 + 2 + 1 == 4 and 2 * 127 + 1 == 255
sizes = codebook("fp4").abs().unique().tolist()
assert [round(size, 3) for size in sizes[:3]] == [0, 0.005, 0.167]
assert len(codebook("fp4").unique()) == 15 and len(codebook("nf4").unique()) == 16
assert bins["nf4"][9] > 2 * bins["nf4"][0] and max(bins["int8"]) < 1.3 * min(bins["int8"])
small, large = (relative_error(formats[name]) for name in ("nf4", "fp4"))
assert 1.2 * small < large and relative_error(formats["int8"]) < small / 8

# %% [markdown]
"""NF4 puts its error where the few large weights are; FP4's is larger in most bins. int8 is about ten times better,
and costs about twice the bytes.

As a picture, where matplotlib is installed: the weights of all blocks, each divided by its absmax, with the 16
values of either codebook.
"""

# %%
ratio = small / relative_error(formats["int8"])
print(
    f"  NF4's error is {ratio:.1f} times int8's, in {formats['nf4'].nbytes / formats['int8'].nbytes:.2f} of the bytes"
)
assert 8 < ratio < 12
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(scaled.numpy(), bins=201, density=True, color="lightgrey")
    for name, height, color in (("nf4", 1.15, "tab:blue"), ("fp4", 1.30, "tab:orange")):
        axes.plot(codebook(name).numpy(), [height] * 16, "|", markersize=14, color=color, label=name)
    axes.set_xlabel("weight / absmax of its block")
    axes.set_ylabel("density")
    axes.legend(loc="upper left")
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/nf4.png", dpi=120)
    print("  picture: runs/tutorials/nf4.png")

# %% [markdown]
"""## 7. What the model makes of it

An error of 9% in every weight sounds like the end of the model. But a dot product adds many products, and the
errors are as often up as down. They grow like a random walk, and so does the result itself: the output of a layer
is off by about as much as its weights, not more. And the model adds the outputs of its layers to a stream that
remembers the rest.

We quantise all 210 linear layers, as `--method qlora` does, and compare the model's loss on a text. (One short text
is no benchmark. It is only to see the size of the effect.)
"""

# %%
print("== 7. What the model makes of it")
text = (
    "The bakery on the corner opens at six. By then the first loaves have cooled, and the street smells of bread. "
    "Most people buy the same thing every day and hardly look at the shelves. My neighbour, who is ninety, says that "
    "the shop has changed hands four times since she was a child, and that the bread was best under the second owner."
)
ids = torch.tensor([tokenizer.encode(text)])  # (B, T)
caught = {}
hook = model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
    lambda module, inputs: caught.update(x=inputs[0].make())
)


def loss():
    """Return the mean of minus log p(token | tokens before), in nats."""
    with torch.no_grad():
        hidden = model.hidden(ids)[0]  # (T, D)
        return linear_cross_entropy(hidden[:-1], model.head_weight, ids[0, 1:]).mean().item()


before = loss()
hook.remove()
x = caught["x"][0].double()  # (T, F)
y, y4 = x @ W.double().T, x @ double.dequantize().double().T
print(f"  the output of our layer is off by {(y4 - y).norm() / y.norm():.1%}, its weights by {small:.1%}")
assert round(100 * small) == 9 and 0.3 * small < (y4 - y).norm() / y.norm() < 2 * small
assert len(linear_modules(model)) == 210
losses = {"as loaded": before}
full = {path: layer.weight.data for path, layer in linear_modules(model).items()}
for kind in ("int8", "nf4", "fp4"):
    for path, layer in linear_modules(model).items():
        layer.replace_weight(quantize(full[path], kind, name=path))
    losses[kind] = loss()
print("  loss of the text: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
assert abs(losses["int8"] - before) < 0.05 and before < losses["nf4"] < before + 0.5
assert losses["nf4"] < losses["fp4"]
print("== every number agreed")
