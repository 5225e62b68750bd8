"""What an adapter is: its rank, scaling and targets."""

import re
from dataclasses import dataclass

from minitune.errors import ConfigError


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter (Hu et al. 2021): W x + scaling B A x, with A (R, in) and B (out, R)."""

    rank: int = 16
    """R, the width of the adapter; 8 to 64 is usual."""
    alpha: float = 32.0
    """Numerator of the scaling: alpha / rank, or alpha / sqrt(rank) with rslora."""
    dropout: float = 0.0
    """Share of the adapter's input elements that are dropped in training, 0 to below 1."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Names of linear modules ("q_proj", or a longer tail of the path), or "all-linear"."""
    rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(rank) (Kalajdzievski 2023, theorem 3.2)."""
    dora: bool = False
    """Train each output's magnitude apart from its direction (Liu et al. 2024): slower, and better at low ranks."""
    init: str = "kaiming"
    """A drawn and B zero (kaiming), or the weight's principal components (pissa; pissa_niter_N faster, in N rounds)."""

    def __post_init__(self):
        """Refuse values without meaning."""
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 1 (8 to 64 is usual)")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be above 0 (twice the rank is usual)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.target_modules:
            raise ConfigError('lora.target_modules is empty; name modules such as q_proj, or use "all-linear"')

        if not re.fullmatch(r"kaiming|pissa|pissa_niter_[1-9]\d?", self.init):
            raise ConfigError(
                f"lora.init is {self.init!r}; it must be kaiming, pissa or pissa_niter_N, as pissa_niter_16"
            )

    @property
    def scaling(self) -> float:
        """The factor on B A x."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
