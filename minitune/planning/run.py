"""One run as a plan sees it: what decides its bytes and its operations, and nothing else.

    seconds of a step = operations / (peak rate x share of it) + bytes that the update moves / bandwidth

The update reads and writes each weight, gradient and moment once, which no matmul hides; paged moments cross the bus.
"""

from dataclasses import dataclass, replace

import torch

from minitune.memory import Ledger, ledger
from minitune.model.config import LoRAConfig, ModelConfig, QuantizationConfig
from minitune.planning.devices import Device
from minitune.planning.flops import step_flops

PROCESS, COMPILER = 300_000_000, 160_000_000
"""Bytes of Python and torch before a model is there, and of torch's compiler, which its checkpointing loads; measured
(torch 2.13, Linux)."""
MARGIN = 1.1
"""On a GPU the count is taken times this: for its context and its allocator's rounding; not measured."""
BUS = 25e9
"""Bytes a second each way between computer and GPU, for paged moments: of PCIe 4's 32e9 with 16 lanes; not measured."""


@dataclass(frozen=True)
class Run:
    """A training run; `batch_size` counts items: rows, or pairs of `documents` 2."""

    config: ModelConfig
    method: str
    batch_size: int
    length: int
    dtype: str = "bfloat16"
    lora: LoRAConfig = LoRAConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    last_layers: int = 2
    optimizer: str = "adamw"
    paged: bool = False
    accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    fused_backward: bool = False
    packing: bool = True
    documents: int = 1
    """Of an item: 2 for pairs."""
    preference: bool = False
    """An objective over answers."""
    penalty: str | None = None
    """Against forgetting: ewc, l2 or none."""
    reference: bool = False
    """Its reference is the model without adapter, which runs forward in each step."""

    @property
    def parameters(self) -> int:
        """Of the base."""
        return ledger(self.config, "full", 1, 1, dtype=torch.float32).weights // 4

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of a micro-batch and their tokens: the documents of a pair lie in one row where rows are packed."""
        if self.packing:
            return self.batch_size, self.length * self.documents
        return self.batch_size * self.documents, self.length

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step with full rows."""
        return self.batch_size * self.length * self.documents * self.accumulation_steps

    def ledger(self) -> Ledger:
        """Return the bytes of the run."""
        return ledger(
            self.config, self.method, *self.rows, dtype=getattr(torch, self.dtype), lora=self.lora,
            quantization=self.quantization, last_layers=self.last_layers, optimizer=self.optimizer,
            paged=self.paged, accumulation_steps=self.accumulation_steps,
            gradient_checkpointing=self.gradient_checkpointing, fused_backward=self.fused_backward,
            packed=self.packing, preference=self.preference, penalty=self.penalty,
        )  # fmt: skip

    def needed(self, cpu: bool) -> int:
        """Return the bytes to have: of the process on a CPU, of the device's memory elsewhere."""
        if not cpu:
            return int(self.ledger().total * MARGIN)
        beside = PROCESS + (COMPILER if self.gradient_checkpointing else 0)
        return replace(self, paged=False).ledger().resident + beside  # there are no pages on a CPU

    def flops(self) -> float:
        """Return the operations of an optimiser step with full rows, each of one document and every token a target."""
        documents = [self.length] * (self.batch_size * self.documents * self.accumulation_steps)
        return step_flops(
            self.config, documents, 0 if self.config.reward else self.step_tokens, method=self.method,
            rank=self.lora.rank, trained_layers=self.last_layers if self.method == "last_layers" else None,
            checkpointing=self.gradient_checkpointing, reference=self.reference,
        )  # fmt: skip

    def step_seconds(self, device: Device) -> tuple[float, float]:
        """Return the least and the most seconds that a step is expected to take; ConfigError without such units."""
        counted = replace(self, paged=False).ledger()
        trained = counted.weights if self.fused_backward else counted.gradients  # of those with it only one exists
        update = 2 * (counted.optimizer + 2 * trained) / device.bandwidth
        update += 2 * counted.optimizer / BUS if self.paged and not device.name.startswith("CPU") else 0
        least, most = device.shares(self.dtype)
        peak = self.flops() / device.rate(self.dtype)
        return peak / most + update, peak / least + update
