"""Launches of kernels/swiglu.py: contiguous tensors (one long row) and the halves of a joint projection."""

from minitune.kernels.swiglu import BLOCK, glu_backward, glu_forward
from tests.kernels.compiled import Spec

_NAMES = {glu_forward: ("gate", "up", "y"), glu_backward: ("dy", "gate", "up", "dgate", "dup")}
_STRIDES = {glu_forward: ("gate_stride", "up_stride"), glu_backward: ("dy_stride", "gate_stride", "up_stride")}


def _spec(kernel, kind: str, gelu: bool, ragged: bool = False) -> Spec:
    integers = (*_STRIDES[kernel], "width", "blocks")
    signature = dict.fromkeys(_NAMES[kernel], f"*{kind}") | dict.fromkeys(integers, "i32")
    case = f"{kind} {'gelu' if gelu else 'silu'}" + " ragged" * ragged
    odd = integers if ragged else ("blocks",)
    return Spec(kernel, case, signature, {"GELU": gelu, "BLOCK": BLOCK}, num_warps=4, ragged=odd)


SPECS = [
    *(_spec(kernel, "bf16", gelu) for kernel in (glu_forward, glu_backward) for gelu in (False, True)),
    _spec(glu_backward, "fp32", True),
    *(_spec(kernel, "fp16", False, ragged=True) for kernel in (glu_forward, glu_backward)),
]
