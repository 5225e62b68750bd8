"""Launches of kernels/norm.py: a head, an odd width, those of 135M to 405B models."""

from minitune.kernels.norm import rms_norm_backward, rms_norm_forward, tiling
from tests.kernels.compiled import Spec


def _forward(kind: str, width: int, offset: float = 0.0, **more) -> Spec:
    plan = tiling(width, 16 if kind == "fp32" else 32)
    signature = dict.fromkeys(("x", "weight", "y"), f"*{kind}") | {"scale": "*fp32", "x_stride": "i32", "rows": "i32"}
    return Spec(
        rms_norm_forward, f"{kind} {width}" + " offset" * bool(offset),
        signature | {"width": "i32", "eps": "fp32"},
        {"OFFSET": offset, "ROWS": plan["ROWS"], "BLOCK": plan["BLOCK"]}, num_warps=plan["num_warps"], **more,
    )  # fmt: skip


def _backward(kind: str, width: int, train: bool, offset: float = 0.0, **more) -> Spec:
    plan = tiling(width, 16)
    signature = dict.fromkeys(("dy", "x", "weight", "dx"), f"*{kind}") | {"scale": "*fp32", "sums": "*fp32"}
    return Spec(
        rms_norm_backward, f"{kind} {width}" + " trained" * train + " offset" * bool(offset),
        signature | dict.fromkeys(("dy_stride", "x_stride", "rows", "width"), "i32"),
        {"OFFSET": offset, "SUM": train, "ROWS": plan["ROWS"], "BLOCK": plan["BLOCK"]}, num_warps=plan["num_warps"],
        **more,
    )  # fmt: skip


SPECS = [
    *(_forward("bf16", width) for width in (128, 4096, 8192, 16384)),
    _forward("bf16", 2304, 1.0),
    _forward("fp32", 4096),
    _forward("fp32", 16384),
    _forward("bf16", 63, ragged=("x_stride", "width", "rows")),
    _backward("bf16", 4096, False),
    _backward("bf16", 16384, False),
    _backward("fp32", 16384, False),
    *(_backward("bf16", width, True) for width in (128, 4096, 8192)),
    _backward("bf16", 2304, True, 1.0),
    _backward("fp32", 8192, True),
    _backward("bf16", 63, True, ragged=("x_stride", "dy_stride", "width", "rows")),
]
