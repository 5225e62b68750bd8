"""Launches of kernels/rope.py: many heads, few heads, an odd head width, both directions."""

from minitune.kernels.rope import rope_turn, tiling
from tests.kernels.compiled import Spec

_STRIDES = [f"{tensor}_{axis}" for tensor in "xy" for axis in ("batch", "time", "head")]


def _spec(kind: str, heads: int, width: int, sign: int = 1, ragged: tuple = ("length", "heads")) -> Spec:
    plan = tiling(heads, width)
    signature = {"x": f"*{kind}", "y": f"*{kind}", "cos": "*fp32", "sin": "*fp32"}
    signature |= dict.fromkeys((*_STRIDES, "length", "heads"), "i32")
    constants = {"SIGN": sign, **{name: plan[name] for name in ("HALF", "HEADS", "BLOCK")}}
    case = f"{kind} {heads}x{width}" + " back" * (sign < 0)
    return Spec(rope_turn, case, signature, constants, num_warps=plan["num_warps"], ragged=ragged)


SPECS = [
    _spec("bf16", 32, 128),
    _spec("bf16", 32, 128, -1),
    _spec("bf16", 9, 64),
    _spec("fp32", 32, 128),
    _spec("bf16", 32, 80),
    _spec("fp16", 3, 6, 1, (*_STRIDES, "length", "heads")),
]
