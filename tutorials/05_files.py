# %% [markdown]
"""# 5. Files: a model, byte by byte

A model on disk is a long row of bytes and a description of them. We open the two kinds that everyone publishes,
safetensors and GGUF, with nothing but `struct` and `json`, and turn their bytes into weights by hand. The engine reads
the same files, and each result has to be the same, bit for bit, or this file stops with an error.

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/05_files.py

The letters: D model width, H heads, K key/value heads, d head width, V vocabulary, as in tutorial 1.
"""

# %%
import json
import math
import struct
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import minitune
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import open_model
from minitune.errors import MinituneError
from minitune.safetensors_io import read_header
from minitune.sources import fetch, resolve

NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
torch.set_grad_enabled(False)  # nothing is trained here
model = minitune.load_model(NAME, dtype="bfloat16")
config = model.config
D, H, K, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
V, L = config.vocab_size, config.num_layers
temporary = tempfile.TemporaryDirectory()  # gone when this program ends
place = Path(temporary.name)
save_model(model, None, place / "model")


def check(name, by_hand, engine):
    """Print and assert that two results are the same; tensors bit for bit."""
    if isinstance(engine, torch.Tensor):
        assert by_hand.dtype == engine.dtype and torch.equal(by_hand, engine), f"{name} differs"
        print(f"  equal, bit for bit: {name}, {engine.numel():,} numbers")
    else:
        assert by_hand == engine, f"{name}: {by_hand} against {engine}"
        print(f"  equal: {name}, {engine if isinstance(engine, int | float | str) else len(engine)}")


def dump(content, start=0):
    """Print bytes in rows of 16: where, as numbers, as letters."""
    for i in range(0, len(content), 16):
        row = content[i : i + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        print(f"  {start + i:8}  {row.hex(' '):47}  {letters}")


# %% [markdown]
"""## 1. A safetensors file: a length, a description, the numbers

The first 8 bytes are a whole number: how long the description is. The lowest byte comes first ("little endian"), so
the number is the sum of byte times 256^i. The description is JSON. For each tensor it gives a name, the kind of
number, the shape, and where its bytes begin and end, counted from the end of the description.

That is all. There is no code in it that could run, and one can look up a tensor without reading any other. (A pickle,
which `torch.save` writes, is a little program. To open one from a stranger is to run it.)
"""

# %%
print("== 1. A safetensors file")
file = place / "model" / "model.safetensors"
with open(file, "rb") as stream:
    first = stream.read(8)
    length = sum(byte * 256**i for i, byte in enumerate(first))
    header = json.loads(stream.read(length))
dump(first + json.dumps(header).encode()[:24])
check("length of the description", length, struct.unpack("<Q", first)[0])
header.pop("__metadata__")
name = "model.layers.0.self_attn.k_proj.weight"
entry = header[name]
print(f"  {name}: {entry}")
fields, tensors = open_model(place / "model")  # what the engine finds; it reads no weight for this
check("names", header.keys(), tensors.keys())
check("shape", tuple(entry["shape"]), tensors[name].shape)
begin, end = entry["data_offsets"]
check("where the bytes begin", 8 + length + begin, tensors[name].offset)
assert 8 == len(first) and 256 == 2**8

# %% [markdown]
"""## 2. Two bytes become a number

BF16 is the upper half of a 32-bit float: 1 bit of sign, 8 of exponent, 7 of fraction. With exponent e and fraction f,

    value = (-1)^sign * 2^(e - 127) * (1 + f / 128)

k_proj has K d = 192 rows of D = 576 numbers, 2 bytes each: 221,184 bytes. We read the first number by hand, then all.
"""

# %%
print("== 2. Two bytes become a number")
content = file.read_bytes()[8 + length :]
raw = content[begin:end]
assert len(raw) == 192 * 576 * 2 == 221_184 and (K * d, D) == (192, 576)
low, high = raw[:2]
bits = f"{high:08b}{low:08b}"
sign, e, f = bits[0], int(bits[1:9], 2), int(bits[9:], 2)
value = (-1) ** int(sign) * 2.0 ** (e - 127) * (1 + f / 128)
print(f"  bytes {low:02x} {high:02x} -> {sign} {bits[1:9]} {bits[9:]} -> e = {e}, f = {f} -> {value}")
assert (len(bits[1:9]), len(bits[9:]), 2 * len(bits)) == (8, 7, 32) and (127, 128) == (2**7 - 1, 2**7)
k_proj = model.model.layers[0].self_attn.k_proj.weight
check("the first number", value, k_proj[0, 0].item())
weight = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(K * d, D)
check("the tensor", weight, k_proj.data)
together = sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values())
check("bytes of all tensors", together, len(content))
del content, raw

# %% [markdown]
"""## 3. What a reader must not believe

A file from a stranger can claim anything. The header below says that it is 2^60 bytes long; a reader that believes it
asks for that much memory. The next one has two tensors of one name: the safetensors library keeps the last, another
program may keep the first, and then one file is two models. The last one points past its own end. The engine refuses
each in one line.

A large model is cut into several files, shards, and an index says which tensor is in which. Such an index could also
name `../../secret`. The engine follows no path out of the folder.
"""

# %%
print("== 3. What a reader must not believe")


def entry_of(shape, offsets):
    """Return the description of an F32 tensor."""
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": offsets})


def refused(header, length=None):
    """Write a header with 8 bytes of numbers behind it, and return what the engine says to it."""
    lie = place / "lie.safetensors"
    length = len(header) if length is None else length
    lie.write_bytes(struct.pack("<Q", length) + header.encode() + bytes(8))
    try:
        read_header(lie)
    except MinituneError as error:
        line = str(error).removeprefix(f"{lie} is not a whole safetensors file ")
        print(f"  refused: {line.split(':')[0]}")
        return line
    return None


one, other = entry_of([2], [0, 8]), entry_of([1, 2], [0, 8])
assert refused('{"w": ' + one + "}") is None  # an honest one
assert "is claimed" in refused('{"w": ' + one + "}", 2**60)
assert "given twice" in refused('{"w": ' + one + ', "w": ' + other + "}")
assert list(load_file(place / "lie.safetensors")["w"].shape) == [1, 2]  # the library: the last of the two
assert "has 8 bytes" in refused('{"w": ' + entry_of([4], [0, 8]) + "}")
assert refused('{"w": ' + entry_of([4], [0, 16]) + "}")
(place / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "../../secret"}}))
try:
    open_model(place / "model")
except MinituneError as error:
    print(f"  refused: {str(error).split(': ', 1)[1]}")
    assert "leads outside the folder" in str(error)
else:
    raise AssertionError("a path out of the folder was followed")

# %% [markdown]
"""## 4. A GGUF file: everything in one

GGUF is the format of llama.cpp. One file holds the weights, the config, the tokenizer and the chat template. It begins
with the letters GGUF and a version, here 3, then two counts: 272 tensors and 33 fields. A field is a name, a number
for its type, and a value. A text is its length in 8 bytes, then UTF-8. An array is the type of its elements, how many,
and then all of them.

So it can only be read from the front to the back: to know where the fields end one has to walk over each of the
49,152 tokens.
"""

# %%
print("== 4. A GGUF file")
path = resolve(NAME)
stream = open(path, "rb")
dump(stream.read(48))
stream.seek(0)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


def number(letter):
    """Read one number, lowest byte first; `letter` is struct's name for its type."""
    return struct.unpack("<" + letter, stream.read(struct.calcsize("<" + letter)))[0]


def text():
    """Read a length and as many bytes."""
    return stream.read(number("Q")).decode()


def field(kind):
    """Read a value of a type."""
    if kind == TEXT:
        return text()
    if kind == ARRAY:
        inner, count = number("I"), number("Q")
        return [field(inner) for _ in range(count)]
    return number(SCALARS[kind])


magic, version, tensor_count, field_count = stream.read(4), number("I"), number("Q"), number("Q")
assert (magic, version, tensor_count, field_count) == (b"GGUF", 3, 272, 33)
metadata = {}
for _ in range(field_count):
    key = text()
    metadata[key] = field(number("I"))
for key, found in list(metadata.items())[9:17]:
    print(f"  {key} = {found}")
check("layers", metadata["llama.block_count"], L)
check("width", metadata["llama.embedding_length"], D)
check("tokens", len(metadata["tokenizer.ggml.tokens"]), V)
check("the base of rope", metadata["llama.rope.freq_base"], config.rope.theta)
tokenizer = minitune.load_tokenizer(NAME)
assert metadata["tokenizer.chat_template"] == tokenizer.chat_template.source
assert V == 49_152

# %% [markdown]
"""## 5. Where the tensors are

After the fields comes a list of tensors: name, number of dimensions, the dimensions (the fastest one first, so the
other way round than in PyTorch), the type of its numbers, and where it begins. That is counted from the next multiple
of 32 bytes, so that a program can use the bytes in place.

The names are llama.cpp's own. What we call `model.layers.0.self_attn.k_proj` is `blk.0.attn_k` there.
"""

# %%
print("== 5. Where the tensors are")
TYPES = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
infos = {}
for _ in range(tensor_count):
    key = text()
    shape = tuple(number("Q") for _ in range(number("I")))[::-1]
    infos[key] = (TYPES[number("I")], shape, number("Q"))
start = math.ceil(stream.tell() / 32) * 32
for key in ("token_embd.weight", "blk.0.attn_k.weight", "blk.0.attn_norm.weight"):
    print(f"  {key:24} {infos[key]}")
_, ours = open_model(path)
kind, shape, offset = infos["blk.0.attn_k.weight"]
check("the shape of k_proj", shape, ours[name].shape)
check("where it begins", start + offset, ours[name].offset)
assert start % 32 == 0 and len(infos) == len(ours) == 272
print("  " + ", ".join(f"{kind}: {sum(one[0] == kind for one in infos.values())} tensors" for kind in TYPES.values()))

# %% [markdown]
"""## 6. A block of 20 bytes is 32 weights

Most matrices of this file are of the type Q4_1. A block of 32 weights has a step s and a minimum m, both FP16, and
then 16 bytes with two 4-bit numbers q each: the lower half of byte i is weight i, the upper half is weight i + 16.

    weight = s q + m

2 + 2 + 16 = 20 bytes for 32 weights is 5 bits each. The embedding is in Q8_0: one FP16 step and 32 whole numbers of 8
bits, 34 bytes, 8.5 bits a weight. Whoever made this file rounded the weights; what was lost does not come back. When
we say that a reader is right, we mean that it gets the very numbers which the file's bits stand for.
"""

# %%
print("== 6. A block of 20 bytes")
stream.seek(start + offset)
block = stream.read(20)
dump(block, start + offset)
s, m = struct.unpack("<ee", block[:4])
q = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
weights = [s * step + m for step in q]
print(f"  s = {s}, m = {m}, q = {q[:6]} ..., weights {weights[0]:.4f} {weights[1]:.4f} {weights[2]:.4f} ...")
assert len(q) == 32 and len(block[4:]) == 16 and max(q) <= 15 == 2**4 - 1
assert 2 + 2 + 16 == 20 == len(block) and 8 * 20 / 32 == 5 and (2 + 32, 8 * 34 / 32) == (34, 8.5)


def q4_1(raw, shape):
    """Decode a whole tensor of blocks of 20 bytes."""
    blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 20)
    s, m = blocks[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)  # (blocks, 1) each
    q = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)  # (blocks, 32)
    return (s * q + m).view(shape)


def q8_0(raw, shape):
    """Decode a whole tensor of blocks of 34 bytes."""
    blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 34)
    return (blocks[:, :2].contiguous().view(torch.float16).float() * blocks[:, 2:].view(torch.int8)).view(shape)


def by_hand(key):
    """Return a tensor of the file, in fp32 and in the file's own order of rows."""
    kind, shape, offset = infos[key]
    decode, size = {"Q4_1": (q4_1, 20), "Q8_0": (q8_0, 34)}[kind]
    stream.seek(start + offset)
    return decode(stream.read(math.prod(shape) // 32 * size), shape)


def engine(name):
    """Return a tensor as the engine reads it."""
    stored = ours[name]
    found = torch.empty(stored.shape)
    stored.read_into(found)
    return found


check("the first 32 weights", torch.tensor(weights), by_hand("blk.0.attn_k.weight")[0, :32])
check("up_proj", by_hand("blk.0.ffn_up.weight"), engine("model.layers.0.mlp.up_proj.weight"))
check("v_proj", by_hand("blk.0.attn_v.weight"), engine("model.layers.0.self_attn.v_proj.weight"))
check("the embedding", by_hand("token_embd.weight"), engine("model.embed_tokens.weight"))

# %% [markdown]
"""## 7. The same rows in another order

With k_proj that does not work. The numbers are there, but the rows stand elsewhere.

Rope turns the d = 64 numbers of a head in pairs (tutorial 1, section 5). Which two make a pair is a convention. Llama's
checkpoints at Hugging Face pair number i with number i + d/2. llama.cpp pairs neighbours, 2i and 2i + 1. So that its
simple code turns the right numbers, whoever writes a GGUF file moves the rows of q_proj and k_proj: within each head,
row 2i + j of the file is our row i + j d/2, where j is 0 or 1. For a head of width 8:
"""

# %%
print("== 7. The same rows in another order")


def our_row(row, width):
    """Return which of our rows stands at `row` of the file, within a head."""
    i, j = divmod(row, 2)
    return i + j * width // 2


order = [our_row(row, 8) for row in range(8)]
print("  row of the file   " + "  ".join(map(str, range(8))) + "    pairs of neighbours: (0 1) (2 3) (4 5) (6 7)")
print("                    " + "  ".join("|" * 8))
pairs = " ".join(f"({a} {b})" for a, b in zip(order[::2], order[1::2], strict=True))
print("  is our row        " + "  ".join(map(str, order)) + f"    are our pairs:       {pairs}")
print("  as a matrix, x where a row of the file (down) is a row of ours (across):")
for row in range(8):
    print("      " + " ".join("x" if order[row] == column else "." for column in range(8)))
assert order == [0, 4, 1, 5, 2, 6, 3, 7] and (our_row(2, 8), our_row(3, 8)) == (1, 1 + 8 // 2)
assert d == 64 and d // 2 == 32 and 2 * 1 + 1 == 3


def back(weight, heads):
    """Put the rows of a file's q or k in our order."""
    found = torch.empty_like(weight)
    for head in range(heads):
        for row in range(d):
            found[head * d + our_row(row, d)] = weight[head * d + row]
    return found


for key, theirs, heads in (("attn_q", "q_proj", H), ("attn_k", "k_proj", K)):
    found, expected = by_hand(f"blk.0.{key}.weight"), engine(f"model.layers.0.self_attn.{theirs}.weight")
    same = (found == expected).all(1).double().mean().item()
    print(f"  {theirs}: {same:.1%} of the rows are where they stand in the file")
    assert not torch.equal(found, expected)
    check(f"{theirs}, rows put back", back(found, heads), expected)

# %% [markdown]
"""Both orders mean the same. We take a query and a key from random vectors, turn them in the way of each convention,
and compare the scores. They agree to rounding: a sum does not care in which order its terms stand.
"""

# %%


def turned(x, position, pairs):
    """Turn the given pairs (a, b) of x (d,) by the angle of a position."""
    result = x.clone()
    for i, (a, b) in enumerate(pairs):
        angle = position * config.rope.theta ** (-2 * i / d)
        result[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        result[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return result


def score(q_rows, k_rows, pairs):
    """Return the score of head 0 for a query at position 9 and a key at position 4."""
    x, y = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return turned(q_rows[:d].double() @ x, 9, pairs) @ turned(k_rows[:d].double() @ y, 4, pairs) / math.sqrt(d)


halves = [(i, i + d // 2) for i in range(d // 2)]
neighbours = [(2 * i, 2 * i + 1) for i in range(d // 2)]
q_file, k_file = by_hand("blk.0.attn_q.weight"), by_hand("blk.0.attn_k.weight")
here, there = score(back(q_file, H), back(k_file, K), halves), score(q_file, k_file, neighbours)
mixed = score(q_file, k_file, halves)
print(f"  score: ours {here:.9f}, llama.cpp's {there:.9f}; the file's rows turned in our way {mixed:.9f}")
assert math.isclose(here, there, rel_tol=1e-9) and not math.isclose(here, mixed, rel_tol=0.01)

# %% [markdown]
"""A picture, where matplotlib is installed: the matrix from above for one real head, 64 rows.
"""

# %%
permutation = [our_row(row, d) for row in range(d)]
assert sorted(permutation) == list(range(64))
try:
    from matplotlib.figure import Figure
except ImportError:
    print("  (no matplotlib, no picture)")
else:
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(permutation[::2], range(0, d, 2), "o", markersize=4, label="even rows: a of a pair")
    axes.plot(permutation[1::2], range(1, d, 2), "s", markersize=4, label="odd rows: b of a pair")
    axes.invert_yaxis()
    axes.set_xlabel("our row")
    axes.set_ylabel("row of the GGUF file")
    axes.legend()
    Path("runs/tutorials").mkdir(parents=True, exist_ok=True)
    figure.savefig("runs/tutorials/row_order.png", dpi=120)
    print("  picture: runs/tutorials/row_order.png")

# %% [markdown]
"""## 8. What happens if one forgets

Nothing fails. Every shape fits, every number is finite, the model writes words. It only writes worse ones: we put the
rows of q_proj and k_proj of all layers in the file's order, and the loss of a text rises by more than 1 nat a token.
One could take that for the cost of quantisation. A test of shapes never finds such an error, which is why the engine's
readers are compared with other programs, logit by logit.
"""

# %%
print("== 8. What happens if one forgets")
words = (
    "The bakery on the corner opens at six. By then the first loaves have cooled, and the street smells of bread. "
    "Most people buy the same thing every day and hardly look at the shelves. My neighbour, who is ninety, says that "
    "the shop has changed hands four times since she was a child, and that the bread was best under the second owner."
)
ids = torch.tensor([tokenizer.encode(words)])  # (B, T)


def loss():
    """Return the mean of minus log p(token | tokens before)."""
    shares = model(ids)[0, :-1].float().log_softmax(-1)
    return -shares.gather(1, ids[0, 1:, None]).mean().item()


right = loss()
places = torch.tensor(permutation)
for layer in model.model.layers:
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        rows = projection.weight.view(-1, d, D)  # (heads, d, D)
        rows.copy_(rows[:, places].clone())
wrong = loss()
print(f"  loss {right:.2f} as it should be, {wrong:.2f} with the rows left as in the file")
assert right + 1 < wrong and math.log(V) > wrong  # bad, but far from knowing nothing

# %% [markdown]
"""`python -m minitune.inspect PATH` prints what this tutorial found, of any file, without reading a weight.
`minitune/safetensors_io.py`, `minitune/gguf_io.py` and `minitune/checkpoint/` are the same in the engine.
"""

# %%
print("== every number agreed")
