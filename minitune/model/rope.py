"""The kinds of rotary embedding: how fast each pair of a head turns, and what stretches that to longer texts.

A pair i of the r turned elements has the inverse frequency f_i = theta^(-2i/r), and the wavelength 2 pi / f_i. With
factor s, trained context c and length n of a text:
    linear    f / s                                                            (Chen et al. 2023)
    dynamic   theta (s n / c - (s - 1))^(r / (r - 2)) in the place of theta    (NTK-aware, for n > c)
    llama3    f / s for wavelengths above c / low, f below c / high, a mean of both between (Llama 3.1)
    yarn      as llama3, with a ramp over i, and cos and sin times 0.1 ln s + 1 (Peng et al. 2023, equations 15 to 17)
    longrope  f divided by a learned factor for each pair, another set for n > c (Ding et al. 2024)
In `dynamic` and `longrope` the length of the whole text decides, so each document of a packed row has frequencies of
its own, and a cache that is read on into another set must be filled again (`Rope.settled`). To let one text's length
decide for a batch was rejected: an answer would depend on its neighbours.
"""

import math
import sys
from dataclasses import dataclass

import torch

from minitune.errors import ConfigError
from minitune.ops.rope import angle_tables, inverse_frequencies

# Which settings each kind takes beside theta and share; the first number of them are needed.
KINDS = {
    "default": (0, ()),
    "linear": (1, ("factor",)),
    "dynamic": (1, ("factor",)),
    "llama3": (3, ("factor", "low_freq_factor", "high_freq_factor", "original_positions")),
    "yarn": (0, ("factor", "original_positions", "attention_factor", "beta_fast", "beta_slow", "mscale",
                 "mscale_all_dim", "truncate")),
    "longrope": (2, ("short_factor", "long_factor", "factor", "original_positions", "attention_factor")),
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding; settings that its kind does not take are None.

    `theta` is the base, `share` the part of a head's width that is turned, `factor` how much longer texts may be than
    the `original_positions` tokens of training; None stands for the model's `max_positions`, and `max_positions` over
    `original_positions`. The other fields have the names of `config.json`.
    """

    theta: float = 10000.0
    kind: str = "default"
    share: float = 1.0
    factor: float | None = None
    original_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        """Refuse an unknown kind, settings that it does not take or lacks, and values without meaning."""
        if self.kind not in KINDS:
            raise ConfigError(f"rope kind {self.kind!r} is not implemented; there are {', '.join(KINDS)}")
        needed, taken = KINDS[self.kind]
        missing = [name for name in taken[:needed] if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"rope kind {self.kind!r} needs {missing[0]}")
        for name in ("theta", "share", *taken):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                right = type(number) in (int, float) and 0 < number < sys.float_info.max or name == "truncate"
                if value is not None and not right:
                    raise ConfigError(f"rope: {name} is {number!r}; it must be a number above 0")
        if self.share > 1:
            raise ConfigError(f"rope: the turned share of a head is {self.share}; it must be at most 1")
        if self.low_freq_factor is not None and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError("rope: low_freq_factor and high_freq_factor are equal; they must differ")

    def check(self, head_dim: int) -> None:
        """Raise ConfigError where the settings do not fit heads of that width."""
        width = self.width(head_dim)
        if width < 2 or width % 2 or self.kind == "dynamic" and width < 4:
            raise ConfigError(f"head_dim: rope turns {width} of a head's {head_dim} elements, too few or an odd number")
        for name in ("short_factor", "long_factor"):
            found = getattr(self, name)
            if found is not None and len(found) != width // 2:
                raise ConfigError(f"rope: {name} has {len(found)} numbers; {width // 2} pairs are turned")

    def width(self, head_dim: int) -> int:
        """Return how many of a head's elements are turned."""
        return int(head_dim * self.share)

    def settled(self, before: int, now: int, max_positions: int) -> bool:
        """Tell whether texts of `before` and of `now` tokens, `now` being longer, have the same frequencies."""
        if self.kind == "longrope":
            trained = self.original_positions or max_positions
            return (before > trained) == (now > trained)
        return self.kind != "dynamic" or now <= max_positions

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long a text is."""
        return self.kind in ("dynamic", "longrope")

    def tables(self, positions: torch.Tensor, head_dim: int, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (B, T, 1, r/2) in fp32, for positions (B, T) that restart at 0 in each document."""
        width = self.width(head_dim)
        plain = inverse_frequencies(width, self.theta, positions.device)
        scale, trained = 1.0, self.original_positions or max_positions
        factor = self.factor or max_positions / trained
        if self.kind == "linear":
            plain = plain / factor
        elif self.kind == "llama3":
            plain = self._llama3(plain, trained)
        elif self.kind == "yarn":
            plain, scale = self._yarn(plain, width, factor, trained), self._yarn_scale(factor)
        elif self.kind == "longrope":
            lengths = document_lengths(positions)[..., None]
            short, long = (plain / plain.new_tensor(values) for values in (self.short_factor, self.long_factor))
            plain = torch.where(lengths > trained, long, short)  # (B, T, r/2)
            scale = self.attention_factor or math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(trained))
        elif self.kind == "dynamic":
            lengths = document_lengths(positions)[..., None].clamp(min=max_positions).double()
            theta = self.theta * (factor * lengths / max_positions - (factor - 1)) ** (width / (width - 2))
            plain = theta ** -(torch.arange(0, width, 2, device=positions.device).double() / width)
        return angle_tables(positions, plain, scale)

    def _llama3(self, plain: torch.Tensor, trained: int) -> torch.Tensor:
        turns = trained * plain / (2 * math.pi)  # of a pair in the trained context
        between = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - between) * plain / self.factor + between * plain

    def _yarn(self, plain: torch.Tensor, width: int, factor: float, trained: int) -> torch.Tensor:
        def pair(turns: float) -> float:  # the index of the pair that makes that many turns in the trained context
            return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate in (None, True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        index = torch.arange(width // 2, device=plain.device, dtype=torch.float64)
        stretched = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
        return stretched * plain / factor + (1 - stretched) * plain

    def _yarn_scale(self, factor: float) -> float:
        def of(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)


def document_lengths(positions: torch.Tensor) -> torch.Tensor:
    """Return for each token of positions (B, T) how long its document is, in tokens: (B, T) int64.

    A document goes from one position 0 to the next; its last position says how much of it lies before this row.
    """
    documents = (positions == 0).cumsum(-1)
    longest = positions.new_zeros(len(positions), positions.shape[1] + 1)
    longest.scatter_reduce_(1, documents, positions + 1, "amax")
    return longest.gather(1, documents)
