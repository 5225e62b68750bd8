"""How weights are quantised: the options and their checks, without torch, so that a bad option answers at once."""

from dataclasses import dataclass

from minitune.errors import ConfigError, nearest

KINDS = ("nf4", "fp4", "int8")
BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))


@dataclass(frozen=True)
class QuantizationConfig:
    """How the linear layers' weights are kept (Dettmers et al. 2023, QLoRA); embedding, head and norms are not."""

    kind: str = "nf4"
    """nf4 (4 bits, at the quantiles of a normal), fp4 (4-bit floats) or int8 (one scale a row)."""
    block_size: int = 64
    """Elements that share a scale, a power of two from 32 to 4096; not for int8."""
    double_quant: bool = True
    """Keep the scales in 8 bits: 4.127 bits a weight instead of 4.5; not for int8."""

    def __post_init__(self):
        """Refuse kinds and sizes that do not exist."""
        if self.kind not in KINDS:
            raise ConfigError(
                f"cannot quantise to {self.kind!r}; known are {', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            )
        if self.kind == "int8" and (self.block_size, self.double_quant) != (64, True):  # the defaults, which it ignores
            raise ConfigError("int8 has one fp32 scale a row: leave out block_size and double_quant")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size is {self.block_size}; it must be a power of two from 32 to 4096")
