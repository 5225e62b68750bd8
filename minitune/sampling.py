"""From the logits of one step to the next token: penalty, temperature, filters, draw.

Let z be the logits and s the tokens already in the row. In this order, which is Hugging Face's:

    penalty r      z_i <- z_i / r if z_i > 0 else z_i r, for i in s       (Keskar et al. 2019, equation 1)
    temperature t  z <- z / t;  t = 0 is greedy: argmax z and nothing else
    top-k          keep the k largest z                                   (Fan et al. 2018)
    top-p          keep the smallest set of largest probability >= p      (Holtzman et al. 2020, equation 2)
    min-p          keep p_i >= min_p max(p)                               (Nguyen et al. 2024)
    draw           the first i whose cumulative probability exceeds u, u uniform in [0, 1)

The draw inverts the distribution function with one uniform number per row and step, so a row's text is a
function of its own seed, whatever shares its batch. `torch.multinomial` was rejected: it draws for the whole
batch from one stream. This file uses tensor methods only: a command's `--help` need not wait for torch.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from minitune.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most probable token, the same every time."""

    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution; below 1 sharpens it."""
    top_k: int | None = None
    """Sample among the K most probable tokens only."""
    top_p: float | None = None
    """Sample among the most probable tokens that hold this share of the probability, above 0 up to 1."""
    min_p: float | None = None
    """Sample among tokens at least this many times as probable as the best one, 0 to 1."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are already in the prompt or answer become less likely."""

    def __post_init__(self):
        """Refuse values without meaning, and filters that greedy decoding would ignore."""
        limits = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
        }
        for name, (good, wanted) in limits.items():
            if not good or getattr(self, name) == float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and filters:
            raise ConfigError(f"{filters[0]} has no effect at temperature 0 (greedy); set a temperature above 0")

    @classmethod
    def of(cls, options: "Sampling") -> "Sampling":
        """Return the sampling part of a subclass's instance (a command's options)."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def next_tokens(
    logits: "torch.Tensor", sampling: Sampling, seen: "torch.Tensor | None", uniforms: "torch.Tensor | None"
) -> "torch.Tensor":
    """Choose one token per row.

    Args:
        logits: (B, V), any float dtype.
        sampling: how to choose.
        seen: (B, V) bool, the tokens of each row so far; needed with a repetition penalty only.
        uniforms: (B,) float32 in [0, 1), one draw per row; needed with a temperature only.

    Returns:
        (B,) int64 token ids.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalise_repetition(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return _draw(logits, uniforms)


def penalise_repetition(logits: "torch.Tensor", seen: "torch.Tensor", penalty: float) -> "torch.Tensor":
    """Divide positive and multiply negative logits (B, V) of the tokens in `seen` (B, V) by `penalty`."""
    penalised = (logits / penalty).where(logits > 0, logits * penalty)
    return penalised.where(seen, logits)


def keep_top_k(logits: "torch.Tensor", k: int) -> "torch.Tensor":
    """Set all but the `k` largest logits of each row (B, V) to -inf; ties with the last one stay."""
    last = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < last, float("-inf"))


def keep_top_p(logits: "torch.Tensor", p: float) -> "torch.Tensor":
    """Set to -inf what lies outside the smallest set of most probable tokens that holds `p`, per row (B, V)."""
    ordered, order = logits.sort(dim=-1)  # ascending, so that the small tail is summed exactly
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


def keep_min_p(logits: "torch.Tensor", share: float) -> "torch.Tensor":
    """Set to -inf the tokens less probable than `share` times the best one, per row (B, V)."""
    probabilities = logits.softmax(dim=-1)
    floor = share * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, float("-inf"))


def _draw(logits: "torch.Tensor", uniforms: "torch.Tensor") -> "torch.Tensor":
    """Invert the distribution function of each row (B, V) at `uniforms` (B,), in float64."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # u < 1 in float32 leaves u * total below total in float64, so a token of probability 0 is never drawn.
    targets = uniforms.double() * cumulative[:, -1]
    return (cumulative <= targets[:, None]).sum(dim=-1)
