"""Launches of kernels/cross_entropy.py: vocabularies of 260 to 256,000, with and without cap and gradient."""

from minitune.kernels.cross_entropy import cross_entropy_rows, tiling
from tests.kernels.compiled import Spec


def _spec(kind: str, vocabulary: int, cap: bool = False, gradient: bool = True) -> Spec:
    plan = tiling(vocabulary)
    signature = {"logits": f"*{kind}", "targets": "*i64", "losses": "*fp32", "stride": "i32", "vocabulary": "i32"}
    return Spec(
        cross_entropy_rows, f"{kind} {vocabulary}" + " cap" * cap + " forward" * (not gradient),
        signature | {"cap": "fp32"}, {"CAP": cap, "GRADIENT": gradient, "BLOCK": plan["BLOCK"]},
        num_warps=plan["num_warps"], ragged=() if vocabulary % 16 == 0 else ("vocabulary",),
    )  # fmt: skip


SPECS = [
    _spec("bf16", 128256),
    _spec("bf16", 50257),
    _spec("bf16", 256000, cap=True),
    _spec("bf16", 49152, gradient=False),
    _spec("fp32", 128256, cap=True),
    _spec("fp16", 260),
]
