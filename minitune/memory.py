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

Not counted: a weight in fp32, which DoRA makes for the length of its rows, modules trained whole beside adapters,
Python, torch and the code that its matmul library compiles, the mask of packed rows and of windows (a byte for each
pair of tokens; in fp32 torch keeps 4 more in each layer), loading, and what an allocator keeps of freed memory: with
glibc's, the process grows by 1.2 (full) to 1.5 times (qlora) of the peak; with MALLOC_MMAP_THRESHOLD_=262144, which
costs time, by the peak and 30 to 55 MB (SmolLM2 135M, 4 x 256 tokens, bf16: `pytest -m real tests/test_memory.py`). The
count is of the references in `ops`. On a GPU the loss makes 256 MiB of logits at a time and attention keeps one number
more a row and head: not measured.
"""

from dataclasses import asdict, dataclass

import torch

from minitune.errors import ConfigError
from minitune.model.config import LoRAConfig, ModelConfig, QuantizationConfig
from minitune.model.linear import LoRA
from minitune.model.lora import add_lora, linear_modules
from minitune.model.transformer import Transformer
from minitune.ops.adamw8bit import BLOCK_SIZE, keeps_8_bits
from minitune.ops.attention import BLOCK
from minitune.ops.cross_entropy import CHUNK, SPAN
from minitune.ops.nf4 import NESTED_BLOCK
from minitune.ops.rounding import POOL


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
    """Moments."""
    decode_room: int
    """The weights that are decoded at a time, kept for the next."""
    gradients: int
    """Of all that trains; with fused_backward of the largest parameter."""
    early_gradients: int
    """Those that exist beside the activations when the backward pass begins."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    loss_room: int
    """Logits of a chunk of rows, and copies of the hidden states."""
    layer_room: int
    """What the backward pass of a layer makes; with checkpointing its activations too."""
    step_room: int
    """The embedding's own gradient where the head is tied to it and trains; random numbers for rounding to bf16."""

    @property
    def held(self) -> int:
        """Bytes that exist at every moment of a run."""
        return self.weights + self.codes + self.scales + self.adapters + self.optimizer + self.decode_room

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        begin = self.early_gradients + self.activations + max(self.loss_room, self.layer_room)
        return self.held + max(begin, self.gradients + self.step_room)

    def __str__(self) -> str:
        """A table in MB (1,000,000 bytes)."""
        lines = {**asdict(self), "held all along": self.held, "peak": self.total}
        return "\n".join(f"{name.replace('_', ' '):16}{size / 1e6:12,.1f} MB" for name, size in lines.items())


def ledger(
    config: ModelConfig,
    method: str,
    batch_size: int,
    length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    lora: LoRAConfig | None = None,
    quantization: QuantizationConfig | None = None,
    optimizer: str = "adamw",
    accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    fused_backward: bool = False,
) -> Ledger:
    """Count the bytes of a supervised run in which each row is one document and every token a target.

    Args:
        config: of the base.
        method: full, lora or qlora.
        batch_size: rows of a micro-batch.
        length: tokens of a row, padding included.
        dtype: of the weights that are not quantised, and of the arithmetic.
        lora: for lora and qlora; None: the defaults.
        quantization: for qlora; None: the defaults.
        optimizer: adamw, adamw8bit or sgd.
        accumulation_steps: micro-batches of a step.
        gradient_checkpointing: keep the inputs of layers only, and make the rest again in the backward pass.
        fused_backward: update in the backward pass and drop each gradient.

    Raises:
        ConfigError: an unknown method or optimiser, or a count below 1.
    """
    _check(method, optimizer, batch_size, length, accumulation_steps)
    model = Transformer(config, dtype=dtype, device="meta", init=False)  # names and shapes; it has no bytes
    linears, full, tokens = linear_modules(model), method == "full", batch_size * length
    adapters = {} if full else add_lora(model, lora or LoRAConfig())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter for name, parameter in model.named_parameters() if ".lora." not in name}
    packed = {path: weights.pop(f"{path}.weight") for path in linears} if method == "qlora" else {}
    stored = [_stored(weight.shape, quantization or QuantizationConfig()) for weight in packed.values()]
    layers = config.num_layers - min((int(path.split(".")[2]) for path in adapters), default=0)  # those with gradients
    layer = tokens * (_layer(config, dtype) + _adapters(adapters, dtype) // layers)
    inputs = tokens * config.hidden_size * dtype.itemsize
    starts = sum(start.nbytes for lora in adapters.values() for start in lora.buffers())  # of PiSSA
    gradients, head = [parameter.nbytes for parameter in trained.values()], model.head_weight.nbytes if full else 0
    return Ledger(
        weights=sum(parameter.nbytes for parameter in weights.values()),
        codes=sum(codes for codes, _ in stored),
        scales=sum(scales for _, scales in stored),
        adapters=0 if full else sum(gradients) + starts,
        optimizer=sum(_moments(optimizer, name, parameter) for name, parameter in trained.items()),
        decode_room=_decode_room(config, dtype) if packed else 0,
        gradients=max(gradients) if fused_backward else sum(gradients),
        early_gradients=head + (sum(gradients) if accumulation_steps > 1 else 0),
        activations=tokens * _outside(config, dtype, full)
        + layers * (inputs if gradient_checkpointing else layer)
        + (0 if gradient_checkpointing else _joined(adapters)),
        loss_room=3 * inputs + _logits(config, dtype, tokens, full),
        layer_room=_layer_room(config, dtype, batch_size, length) + (layer - inputs if gradient_checkpointing else 0),
        step_room=(head if config.tie_embeddings else 0) + (8 * POOL if full and dtype == torch.bfloat16 else 0),
    )


def _check(method: str, optimizer: str, *counts: int) -> None:
    if method not in ("full", "lora", "qlora") or optimizer not in ("adamw", "adamw8bit", "sgd"):
        raise ConfigError(
            f"no ledger for {method!r} with {optimizer!r}: take full, lora or qlora with an optimizer.kind"
        )
    if min(counts) < 1:
        raise ConfigError(f"batch_size, length and accumulation_steps are {counts}; each must be at least 1")


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


def _layer(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes a token a layer keeps: both residuals, q, k, v, o_proj's input, gate, up, two norms' numbers.

    Norms of q and k, and after attention and MLP, keep their inputs too. Torch's own attention, in other dtypes than
    bf16 and without soft-cap, also keeps its output, laid out otherwise, and a number a head.
    """
    D, F, queries, keys = _widths(config)
    blocked = dtype == torch.bfloat16 or config.attention_softcap is not None
    own = 0 if blocked else queries * dtype.itemsize + 4 * config.num_heads
    normed = (queries + keys if config.qk_norm != "none" else 0) + (2 * D if config.norm_placement != "before" else 0)
    inner = 2 * F if config.gated else F
    residuals = D if config.parallel_residual else 2 * D
    return (residuals + 2 * (queries + keys) + inner + normed) * dtype.itemsize + 2 * 4 + own


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
    """Return the bytes a token kept by rope, the final norm and the loss, by that of a trained head its inputs too."""
    numbers = 4 * config.head_dim + 4 + 1 + (16 if full else 0)  # cos and sin, the norm's, is it a target; two ids
    return (3 if full else 2) * config.hidden_size * dtype.itemsize + numbers


def _decode_room(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the largest weights that are decoded together: gate and up, or q, k and v."""
    D, F, queries, keys = _widths(config)
    return D * max(2 * F if config.gated else F, queries + 2 * keys) * dtype.itemsize


def _logits(config: ModelConfig, dtype: torch.dtype, tokens: int, full: bool) -> int:
    """Return the bytes of the logits that the loss makes at a time, and of a trained head's sums over spans of rows."""
    rows, narrow = min(SPAN // dtype.itemsize if full else CHUNK, tokens), dtype.itemsize < 4
    wide = 4 * min(CHUNK, tokens) if narrow else 0
    sums = 4 * config.hidden_size if full and narrow and rows < tokens else 0  # in fp32, where there are several spans
    return config.vocab_size * (rows * dtype.itemsize + wide + sums)


def _layer_room(config: ModelConfig, dtype: torch.dtype, batch_size: int, length: int) -> int:
    """Return the bytes that the last layer's gated unit or attention makes going back, less what is gone by then."""
    D, F, queries, keys = _widths(config)
    tokens, block = batch_size * length, min(BLOCK, length)
    unit, attention = tokens * (3 * F - D), tokens * 2 * (queries + keys - F - D)
    if dtype == torch.bfloat16:  # three tensors of a block's scores, copies of its queries and of their gradients
        attention += batch_size * config.num_heads * block * (3 * length + 2 * config.head_dim)
    return max(unit, attention) * dtype.itemsize
