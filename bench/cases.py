"""What is compared with what, and the bars that were set before anything was measured.

A bar is a ratio, ours / peer: of the seconds for the same work, and of the peak resident memory. "least" has to be
reached, "aim" is hoped for. Both sides get the same weights, token ids, optimiser and thread count.
"""

import math
from dataclasses import dataclass

LEARNING_RATE = 5e-4  # LoRA; a tenth of it for full fine-tuning and for preferences
RANK, ALPHA = 16, 32.0
PROMPT, NEW = 32, 128  # tokens of the generation cases
ROW_POOL, ROW_LENGTH = 16, 512  # rows of the case on real rows, and the longest of them
REVIEWS, ANSWER = 48, 16  # rows of a round of the classification cases, and the most tokens of an answer
WIDTH = 4096  # in and out of the single quantised layer
SHAPES = {  # random models, by the fields that both transformers and ModelConfig.from_hf know
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    title: str
    """The peer, in words."""
    peer: str
    """peft, transformers, trl,
    trl-grouped, trl-packed, trl-dpo, litgpt, torchtune, bitsandbytes (with PEFT), linear4bit-train
    or linear4bit-eval (one layer of bitsandbytes), or lora: our own step on the unquantised model."""
    dtype: str = "float32"
    kind: str = "lora"
    """lora, qlora, full, rows (LoRA on rows of varied length), dpo (LoRA on pairs), generate, classify (answers to
    reviews), start, or of one quantised layer "forward" or "gradient" (forward and the gradient of its input)."""
    batch: int = 4
    """Rows, or pairs: two rows of one prompt each."""
    length: int = 256
    """Tokens of a row."""
    medium: bool = False
    """set_float32_matmul_precision("medium") on both sides."""
    checkpointing: bool = False
    shape: str | None = None
    """Of a random model in SHAPES, fed random ids; None: the prepared real one."""
    device: str = "cpu"
    time_least: float | None = None
    time_aim: float | None = None
    memory_least: float | None = None
    memory_aim: float | None = None

    @property
    def tolerance(self) -> float:
        """How far the losses of step 1 may lie apart, in nats per token.

        bf16 keeps 8 bits (a loss of 3 is a multiple of 0.016 there) and each side rounds in other places; "medium" may
        compute in bf16. Labels shifted by one, or a row missing, are off by more. A quantised model's loss is its own.
        """
        if self.peer == "lora":
            return math.inf
        return 1e-4 if self.dtype == "float32" and not self.medium else 5e-2

    @property
    def prompt(self) -> int:
        """Tokens that both sides of a pair begin with; the others are learned."""
        return self.length // 4

    @property
    def unit(self) -> str:
        """What the printed times mean."""
        if self.layer:
            return "ms"
        return {"rows": "ms/target token", "generate": "tokens/s", "classify": "rows/s", "start": "s"}.get(
            self.kind, "s/step"
        )

    @property
    def layer(self) -> bool:
        """Whether one quantised layer is timed, on `batch` rows; a round is `calls` calls."""
        return self.kind in ("forward", "gradient")

    @property
    def calls(self) -> int:
        """How many calls of a layer make a round of some tenths of a second."""
        return max(2, 24 // (1 + self.batch // 32))

    @property
    def learning_rate(self) -> float:
        """Real rows are batched differently on each side; so that losses stay comparable, nothing moves there."""
        return {"full": LEARNING_RATE / 10, "dpo": LEARNING_RATE / 10, "rows": 1e-9}.get(self.kind, LEARNING_RATE)


def _pair(name: str, title: str, peer: str, fp32: tuple, bf16: tuple, **rest) -> list[Case]:
    """Return the fp32 and the bf16 case; the tuples are (time_least, time_aim)."""
    return [
        Case(f"{name}-{short}", title, peer, dtype, time_least=bars[0], time_aim=bars[1], **rest)
        for short, dtype, bars in (("fp32", "float32", fp32), ("bf16", "bfloat16", bf16))
    ]


def _layers() -> list[Case]:
    """Return a quantised layer's forward pass and its input gradient, against both of the peer's modes."""
    return [
        Case(f"linear4bit-{rows}-{kind}{suffix}", f"bitsandbytes Linear4bit, {mode} mode", f"linear4bit-{mode}",
             "bfloat16", kind, batch=rows, length=WIDTH, time_least=1.0)
        for rows in (1, 64, 512)
        for kind in ("forward", "gradient")
        for mode, suffix in (("train", ""), ("eval", "-eval"))
    ]  # fmt: skip


_TRL = {"memory_least": 0.5, "kind": "rows", "dtype": "bfloat16", "time_least": 0.35, "time_aim": 0.2}
_DPO = {"kind": "dpo", "memory_least": 0.4, "memory_aim": 0.3}
_LORA_MEMORY = {"memory_least": 0.5, "memory_aim": 0.35}
CASES = [
    *_pair("lora", "transformers + PEFT", "peft", (0.5, 0.4), (0.7, 0.5), **_LORA_MEMORY),
    Case("lora-medium", "PEFT, fp32 matmuls 'medium'", "peft", medium=True, time_least=0.85, time_aim=0.7),
    *_pair("checkpointing", "PEFT, gradient checkpointing", "peft", (0.5, None), (0.85, None), checkpointing=True,
           memory_least=0.5),
    *_pair("full", "transformers, full fine-tuning", "transformers", (0.5, None), (0.8, None), kind="full",
           memory_least=0.6),
    *_pair("trl", "TRL SFTTrainer", "trl", (0.4, 0.33), (0.45, 0.33), memory_least=0.5),
    Case("rows", "TRL, real rows, as they come", "trl", **_TRL),
    Case("rows-grouped", "TRL, real rows, grouped by length", "trl-grouped", **_TRL),
    Case("rows-packed", "TRL, real rows, packed (bfd, padding-free)", "trl-packed", **_TRL),
    *_pair("dpo", "TRL DPOTrainer, 2 pairs x 256", "trl-dpo", (0.45, 0.3), (0.45, 0.3), batch=2, **_DPO),
    *_pair("dpo-long", "TRL DPOTrainer, 1 pair x 1024", "trl-dpo", (0.45, 0.3), (0.45, 0.3), batch=1, length=1024,
           **_DPO),
    *_pair("long", "PEFT, 1 x 1024", "peft", (0.55, None), (0.75, None), batch=1, length=1024, memory_least=0.5),
    Case("generate-bf16", "transformers generate, greedy", "transformers", "bfloat16", "generate",
         time_least=1 / 1.6, time_aim=1 / 2.5),
    Case("generate-fp32", "transformers generate, greedy", "transformers", "float32", "generate"),
    *_pair("evaluate", "transformers generate, row by row", "transformers", (1 / 3, None), (1 / 3, None),
           kind="classify"),
    Case("start", "import transformers, peft, trl; load", "transformers", "bfloat16", "start", time_least=0.3),
    Case("qlora-bf16", "transformers + PEFT + bitsandbytes NF4", "bitsandbytes", "bfloat16", "qlora",
         time_least=0.75, memory_least=0.5),
    Case("qlora-over-lora", "our own LoRA step, unquantised", "lora", "bfloat16", "qlora",
         time_least=1.2, memory_least=1.0),
    *_layers(),
    *_pair("litgpt", "litgpt", "litgpt", (1.0, None), (1.0, None), memory_least=1.0),
    *_pair("torchtune", "torchtune", "torchtune", (1.0, None), (1.0, None), memory_least=1.0),
]  # fmt: skip
