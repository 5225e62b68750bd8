"""The byte ledger: what a run will hold, from its config alone, before a weight is read.

    held = weights + codes + scales + adapters + optimiser state + room for decoded weights
    peak = held + max(early gradients + activations + max(loss room, layer room),  gradients + step room)

The backward pass gives up activations layer by layer and makes gradients layer by layer, so their sum runs in a
straight line from one end of the pass to the other, and the larger end is the peak. Early gradients are there when it
begins: the head's, which the loss makes on its way forward, and all of them while a window accumulates.

Activations are what `minitune/ops` keeps for the backward pass, and no more: of a norm its input and one fp32 number a
row, of attention q, k, v, of a gated unit gate and up, of o_proj its input, of an adapter the R numbers a row between A
and B. The inputs of all other projections are made again (`ops/linear.py`). Running a step and reading the peak was
rejected: it needs the very memory that is in question, and does not say what holds it.

What the process itself adds is two lines of their own, which no tensor explains; they were measured, not derived.
`allocator` is what glibc's malloc keeps idle. For a tensor, aligned to 64 bytes, it looks for a block 96 bytes larger
than the one that an equal tensor gave back, so that holes stay between tensors (`ops/allocate.py` does away with the
most). It is taken as 0.35 of the activations in 16 bits, 0.2 in 32, and 0.25 of the gradients, and with checkpointing
as 0.215 of what would be kept without: the inputs that stay lie between what is made and dropped layer by layer. With
MALLOC_MMAP_THRESHOLD_=262144 in the environment it is nearly 0, and a step takes longer. `library` is code and plans
that the matmul library makes for each shape: 10 to 48 MB. With both, the growth of a process is met within 10% in 27 of
28 combinations and within 12% in all (`python -m bench.ledger`); the worst is a GPT-NeoX with checkpointing. Torch and
Python, 0.3 GB before a model is there, come on top.

Not counted: a weight in fp32, which DoRA makes for the length of its rows, modules trained whole beside adapters,
loading, validation's samples. The count is of the references in `ops`; on a GPU the loss makes 256 MiB of logits at a
time, attention keeps one number more a row and head, and the allocator is another: not measured.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from minitune.errors import ConfigError, check_counts
from minitune.model.config import LoRAConfig, ModelConfig, QuantizationConfig
from minitune.model.linear import LoRA
from minitune.model.lora import add_lora, linear_modules
from minitune.model.trainable import train_all, train_last_layers
from minitune.model.transformer import Transformer
from minitune.ops.adamw8bit import BLOCK_SIZE, keeps_8_bits
from minitune.ops.attention import block_size
from minitune.ops.cross_entropy import CHUNK, SPAN
from minitune.ops.nf4 import NESTED_BLOCK
from minitune.ops.rounding import POOL

METHODS, OPTIMIZERS = ("full", "last_layers", "lora", "qlora"), ("adamw", "adamw8bit", "sgd")
IDLE_ACTIVATIONS, IDLE_WIDE_ACTIVATIONS, IDLE_CHECKPOINTED, IDLE_GRADIENTS = 0.35, 0.2, 0.215, 0.25
LIBRARY = 35_000_000


@dataclass(frozen=True)
class Ledger:
    """Bytes by what they are for. `total` is the peak, not the sum: not all exist at once."""

    weights: int
    """The base's parameters that are not quantised."""
    codes: int
    """Quantised weights without their scales."""
    scales: int
    """Of the quantised weights; in double quantisation their 8-bit codes, nested scales and means."""
    adapters: int
    """A and B, fp32, with DoRA's magnitudes and PiSSA's starts."""
    optimizer: int
    """Moments; of paged ones with fused_backward the largest parameter's."""
    decode_room: int
    """The weights that are decoded at a time, kept for the next."""
    penalty: int
    """Against forgetting: the start of what trains without adapter, and for EWC a bf16 number for each weight held."""
    gradients: int
    """Of all that trains; with fused_backward of the largest parameter."""
    early_gradients: int
    """Those that exist beside the activations when the backward pass begins."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    masks: int
    """Who sees whom in packed rows and in windows: a byte a pair of tokens."""
    loss_room: int
    """Logits of a chunk of rows, and copies of the hidden states."""
    layer_room: int
    """What the backward pass of a layer makes; with checkpointing its activations too."""
    step_room: int
    """The embedding's own gradient where the head is tied to it and trains; random numbers for rounding to bf16; of
    paged moments the largest parameter's, but with fused_backward."""
    allocator: int
    """What malloc keeps idle between tensors on a CPU; measured."""
    library: int
    """Code and plans of the matmul library on a CPU; measured."""

    @property
    def held(self) -> int:
        """Bytes that exist at every moment of a run."""
        base = self.weights + self.codes + self.scales
        return base + self.adapters + self.optimizer + self.decode_room + self.penalty

    @property
    def total(self) -> int:
        """Bytes of tensors at the peak of a step."""
        begin = self.early_gradients + self.activations + self.masks + max(self.loss_room, self.layer_room)
        return self.held + max(begin, self.gradients + self.step_room)

    @property
    def resident(self) -> int:
        """Bytes by which a process on a CPU grows, from before the model is loaded to the peak."""
        return self.total + self.allocator + self.library

    def __str__(self) -> str:
        """A table in MB (1,000,000 bytes)."""
        lines = {**asdict(self), "held all along": self.held, "peak": self.total, "resident": self.resident}
        return "\n".join(f"{name.replace('_', ' '):16}{size / 1e6:12,.1f} MB" for name, size in lines.items())


@dataclass(frozen=True)
class _Fixed:
    """What does not depend on the batch: bytes, and what of the model has gradients."""

    weights: int
    codes: int
    scales: int
    adapters: int
    moments: tuple[int, ...]
    """Of each parameter that trains."""
    decode_room: int
    gradients: tuple[int, ...]
    """Of each parameter that trains."""
    head: int
    """The head's gradient, 0 where it does not train."""
    layers: int
    """From the lowest one that trains up."""
    start: int
    """Of the copy that a penalty keeps."""
    priced: int
    """Weights, not bytes, that a penalty is on."""
    adapter_row: int
    """Bytes a token that the adapters of all layers keep."""
    joined: int


def ledger(
    config: ModelConfig,
    method: str,
    batch_size: int,
    length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    lora: LoRAConfig | None = None,
    quantization: QuantizationConfig | None = None,
    last_layers: int = 2,
    optimizer: str = "adamw",
    paged: bool = False,
    accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    fused_backward: bool = False,
    packed: bool = False,
    preference: bool = False,
    penalty: str | None = None,
) -> Ledger:
    """Count the bytes of a run in which every token is a target.

    Args:
        config: of the base; with `reward`, of the reward model that is made of it.
        method: full, last_layers, lora or qlora.
        batch_size: rows of a micro-batch: of pairs both sides, packed or not.
        length: tokens of a row, padding included.
        dtype: of the weights that are not quantised, and of the arithmetic.
        lora: for lora and qlora; None: the defaults.
        quantization: for qlora; None: the defaults.
        last_layers: for last_layers, how many.
        optimizer: adamw, adamw8bit or sgd.
        paged: moments lie elsewhere, but for those of one parameter in a step.
        accumulation_steps: micro-batches of a step.
        gradient_checkpointing: keep the inputs of layers only, and make the rest again in the backward pass.
        fused_backward: update in the backward pass and drop each gradient.
        packed: rows of several documents, which need a mask.
        preference: an objective over answers, which weights the rows of the loss differently.
        penalty: ewc, l2 or None (`training/penalty.py`); making the Fisher information before training is not counted.

    Raises:
        ConfigError: an unknown method or optimiser, a count below 1, or more layers than there are.
    """
    check_counts(batch_size=batch_size, length=length, accumulation_steps=accumulation_steps)
    fixed = _fixed(
        config, method, dtype, lora or LoRAConfig(), quantization or QuantizationConfig(), last_layers, optimizer
    )
    tokens, gradients, head = batch_size * length, fixed.gradients, fixed.head
    inputs = tokens * config.hidden_size * dtype.itemsize
    trained = range(config.num_layers - fixed.layers, config.num_layers)
    kept = [[tokens * width for width in _kept(config, dtype, layer)] for layer in trained]
    adapters, joined = tokens * fixed.adapter_row, fixed.joined
    largest = max(map(sum, kept)) + adapters // len(kept)
    share = IDLE_WIDE_ACTIVATIONS if dtype.itemsize > 2 else IDLE_ACTIVATIONS
    idle = (IDLE_CHECKPOINTED if gradient_checkpointing else share) * sum(map(sum, kept))
    if gradient_checkpointing:
        kept, adapters, joined = [[inputs]] * len(kept), 0, 0
    idle += 0 if fused_backward else IDLE_GRADIENTS * sum(gradients)
    loss = _logits(config, dtype, tokens, bool(head)) + (head if preference else 0)
    return Ledger(
        weights=fixed.weights, codes=fixed.codes, scales=fixed.scales, adapters=fixed.adapters,
        optimizer=_held_moments(fixed.moments, paged, fused_backward), decode_room=fixed.decode_room,
        penalty={None: 0, "l2": fixed.start, "ewc": fixed.start + 2 * fixed.priced}[penalty],
        gradients=max(gradients) if fused_backward else sum(gradients),
        early_gradients=head + (sum(gradients) if accumulation_steps > 1 else 0),
        activations=tokens * _outside(config, dtype, bool(head)) + sum(map(sum, kept)) + adapters + joined,
        masks=_masks(config, batch_size, length, packed),
        loss_room=3 * inputs + (0 if config.reward else loss),
        layer_room=_layer_room(config, dtype, batch_size, length)
        + (largest - inputs if gradient_checkpointing else 0),
        step_room=_step_room(config, method, dtype, head, fixed.moments if paged and not fused_backward else ()),
        allocator=int(idle),
        library=LIBRARY,
    )  # fmt: skip


def _held_moments(moments: tuple[int, ...], paged: bool, fused_backward: bool) -> int:
    """Return the bytes of moments beside activations: a parameter's at a time where they are fetched in that pass."""
    if not paged:
        return sum(moments)
    return max(moments) if fused_backward else 0


def _step_room(config: ModelConfig, method: str, dtype: torch.dtype, head: int, paged: tuple[int, ...]) -> int:
    """Return the bytes that the update itself needs; `paged` are the moments that it fetches, by parameter."""
    noise = 8 * POOL if method in ("full", "last_layers") and dtype == torch.bfloat16 else 0
    return (head if config.tie_embeddings else 0) + noise + max(paged, default=0)


@lru_cache(maxsize=64)
def _fixed(
    config: ModelConfig, method: str, dtype: torch.dtype, lora: LoRAConfig, quantization: QuantizationConfig,
    last_layers: int, optimizer: str,
) -> _Fixed:  # fmt: skip
    """Build the model without memory, let the method choose what trains, and count."""
    if method not in METHODS or optimizer not in OPTIMIZERS:
        methods = ", ".join(METHODS)
        raise ConfigError(f"no ledger for {method!r} with {optimizer!r}: take {methods} with an optimizer.kind")
    model = Transformer(config, dtype=dtype, device="meta", init=False)  # names and shapes; it has no bytes
    linears, adapters = linear_modules(model), {}
    if method in ("lora", "qlora"):
        adapters = add_lora(model, lora)
    elif method == "full":
        train_all(model)
    else:
        train_last_layers(model, last_layers)
    if config.reward:
        model.score.requires_grad_(True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter for name, parameter in model.named_parameters() if ".lora." not in name}
    plain = [parameter for name, parameter in trained.items() if ".lora." not in name and not name.startswith("score.")]
    moved = [linears[path].weight for path in adapters]
    factors = [factor for one in adapters.values() if one.A0 is not None for factor in (one.A, one.B)]  # of PiSSA
    packed = {path: weights.pop(f"{path}.weight") for path in linears} if method == "qlora" else {}
    stored = [_stored(weight.shape, quantization) for weight in packed.values()]
    lowest = 0 if method == "full" else min(int(name.split(".")[2]) for name in trained if ".layers." in name)
    return _Fixed(
        weights=sum(parameter.nbytes for parameter in weights.values()),
        codes=sum(codes for codes, _ in stored),
        scales=sum(scales for _, scales in stored),
        adapters=sum(part.nbytes for one in adapters.values() for part in (*one.parameters(), *one.buffers())),
        moments=tuple(_moments(optimizer, name, parameter) for name, parameter in trained.items()),
        decode_room=_decode_room(config, dtype) if packed else 0,
        gradients=tuple(parameter.nbytes for parameter in trained.values()),
        head=model.head_weight.nbytes if method == "full" and not config.reward else 0,
        layers=config.num_layers - lowest,
        start=sum(part.nbytes for part in (*plain, *factors)),
        priced=sum(weight.shape.numel() for weight in (*plain, *moved)),
        adapter_row=_adapters(adapters, dtype),
        joined=_joined(adapters),
    )


def _stored(shape: torch.Size, config: QuantizationConfig) -> tuple[int, int]:
    """Return the bytes of a quantised weight's codes and of its scales (`ops/nf4.py`)."""
    count = shape.numel()
    if config.kind == "int8":
        return count, 4 * shape[0]
    blocks = -(-count // config.block_size)
    return -(-count // 2), blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if config.double_quant else 4 * blocks


def _moments(kind: str, name: str, parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter's two moments, as `training/optimizer.py` allocates them."""
    count = parameter.numel()
    if kind == "adamw8bit":
        return 2 * (count + 4 * -(-count // BLOCK_SIZE) if keeps_8_bits(name, parameter) else 4 * count)
    return 0 if kind == "sgd" else 2 * parameter.nbytes


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return D, F, H d and K d."""
    return (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim)  # fmt: skip


def _kept(config: ModelConfig, dtype: torch.dtype, layer: int) -> list[int]:
    """Return the bytes a token of each tensor that a layer keeps.

    Both residuals, q, k, v, o_proj's input, gate and up as one, the norms' numbers (RMSNorm one in fp32, LayerNorm
    two). Norms of q and k keep their inputs, which lie in one tensor with v, and norms after attention and MLP theirs.
    """
    D, F, queries, keys = _widths(config)
    turned, norms = config.layer_rope(layer) is not None, 2
    sizes = [D] if config.parallel_residual else [D, D]
    if config.norm_placement != "before":
        sizes, norms = [*sizes, D, D], 4 if config.norm_placement == "around" else 2
    if config.qk_norm != "none":
        sizes += [queries + 2 * keys, queries, keys]
        norms += config.num_heads + config.num_kv_heads if config.qk_norm == "head" else 2
    else:
        sizes += [queries, keys, keys] if turned else [queries + 2 * keys]
    sizes += [queries, 2 * F if config.gated else F]
    numbers = norms * (4 if config.norm == "rms" else 2 * dtype.itemsize)
    return [*(size * dtype.itemsize for size in sizes), numbers]


def _adapters(adapters: dict[str, LoRA], dtype: torch.dtype) -> int:
    """Return the bytes a token adapters keep: R numbers of each, and dropout's mask of each input they read.

    DoRA keeps two outputs of its layer besides, and all inputs but o_proj's, which is kept anyway.
    """
    inputs = {(path.rsplit(".", 1)[0], path.endswith(("o_proj", "down_proj"))): lora for path, lora in adapters.items()}
    masks = sum(lora.A.shape[1] for lora in inputs.values() if lora.dropout)
    kept = sum(2 * len(lora.B) for lora in adapters.values() if lora.magnitude is not None)
    for (parent, last), lora in inputs.items():
        made_again = not (last and parent.endswith("self_attn"))
        kept += lora.A.shape[1] if lora.magnitude is not None and made_again else 0
    return (sum(len(lora.factors()[0]) for lora in adapters.values()) + masks + kept) * dtype.itemsize


def _joined(adapters: dict[str, LoRA]) -> int:
    """Return the bytes of the factors that PiSSA joins with its start in every pass (`LoRA.factors`)."""
    pissa = [lora for lora in adapters.values() if lora.A0 is not None and lora.magnitude is None]
    return sum(factor.nbytes for lora in pissa for factor in lora.factors())


def _outside(config: ModelConfig, dtype: torch.dtype, full: bool) -> int:
    """Return the bytes a token kept by ropes, the final norm and the loss, by that of a trained head its inputs too."""
    ropes = {config.layer_rope(layer) for layer in range(config.num_layers)} - {None}
    tables = sum(4 * rope.width(config.head_dim) for rope in ropes)  # cos and sin of half of them, in fp32
    numbers = tables + 4 + 1 + (16 if full else 0)  # the norm's, is it a target; two ids
    return (3 if full else 2) * config.hidden_size * dtype.itemsize + numbers


def _masks(config: ModelConfig, batch_size: int, length: int, packed: bool) -> int:
    """Return the bytes of the masks, which layers of one window share."""
    masked = packed or config.by_length  # else a row is one document, and no mask but a window's is needed
    windows = {config.window(layer) for layer in range(config.num_layers)}
    needed = [masked or window is not None and window < length for window in windows]
    return sum(needed) * batch_size * length * length


def _decode_room(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the largest weights that are decoded together: gate and up, or q, k and v."""
    D, F, queries, keys = _widths(config)
    return D * max(2 * F if config.gated else F, queries + 2 * keys) * dtype.itemsize


def _logits(config: ModelConfig, dtype: torch.dtype, tokens: int, full: bool) -> int:
    """Return the bytes of the logits that the loss makes at a time, and of a trained head's sums over spans of rows."""
    rows, narrow = min(SPAN // dtype.itemsize if full else CHUNK, tokens), dtype.itemsize < 4
    wide = 4 * min(CHUNK, tokens) if narrow else 0
    bent = 0 if config.logits_softcap is None else 4 * min(CHUNK, tokens)
    sums = 4 * config.hidden_size if full and narrow and rows < tokens else 0  # in fp32, where there are several spans
    return config.vocab_size * (rows * dtype.itemsize + wide + bent + sums)


def _layer_room(config: ModelConfig, dtype: torch.dtype, batch_size: int, length: int) -> int:
    """Return the bytes that the last layer's MLP or attention makes going back, less what is gone by then."""
    D, F, queries, keys = _widths(config)
    tokens, block = batch_size * length, min(block_size(dtype), length)
    inner = 2 * F if config.gated else F
    unit, attention = tokens * (inner + F - D), tokens * (2 * (queries + keys - D) - inner)
    windows = [config.window(layer) or length for layer in range(config.num_layers)]
    seen = min(length, max(windows) + block)
    scores = (3 if config.attention_softcap is None else 4) * seen  # tensors of a block's; its queries, their gradients
    attention += batch_size * config.num_heads * block * (scores + 2 * config.head_dim)
    return max(unit, attention) * dtype.itemsize


@dataclass(frozen=True)
class Generation:
    """Bytes of a model that answers: its weights, what it keeps of the text, and room to read a prompt in one pass."""

    weights: int
    """Quantised or not."""
    cache: int
    """Keys and values of each layer, and ids and positions where the rope depends on the length (`model/cache.py`)."""
    room: int
    """A layer's MLP over the whole prompt, and the logits of one token a row, in fp32 too."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.cache + self.room


def generation(
    config: ModelConfig,
    batch_size: int,
    length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: QuantizationConfig | None = None,
) -> Generation:
    """Count the bytes of answering `batch_size` prompts at once, where prompt and answer have `length` tokens in all.

    ConfigError for a count below 1.
    """
    check_counts(batch_size=batch_size, length=length)
    kind = "full" if quantization is None else "qlora"
    fixed = _fixed(config, kind, dtype, LoRAConfig(), quantization or QuantizationConfig(), 1, "sgd")
    D, F, _, keys = _widths(config)
    tokens, inner = batch_size * length, 3 * F if config.gated else 2 * F
    return Generation(
        weights=fixed.weights + fixed.codes + fixed.scales + fixed.decode_room,
        cache=2 * config.num_layers * tokens * keys * dtype.itemsize + (16 * tokens if config.by_length else 0),
        room=tokens * (2 * D + inner) * dtype.itemsize + batch_size * config.vocab_size * (dtype.itemsize + 8),
    )
