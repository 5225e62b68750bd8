"""Launches of kernels/adamw8bit.py: each dtype of parameter, both roundings, a ragged size."""

from minitune.kernels.adamw8bit import BLOCKS, adamw8bit_update
from tests.kernels.compiled import Spec

_FLOATS = ("scale", "beta1", "rest1", "beta2", "rest2", "decay", "rate", "root", "eps")
_TABLES = ("signed_map", "signed_middle", "plain_map", "plain_middle", "first_absmax", "second_absmax")


def _spec(kind: str, gradient: str, stochastic: bool = False, ragged: tuple = ("seed",)) -> Spec:
    signature = {"parameter": f"*{kind}", "gradient": f"*{gradient}", "first": "*u8", "second": "*u8"}
    signature |= dict.fromkeys(_TABLES, "*fp32") | {"n": "i32", "seed": "i32"} | dict.fromkeys(_FLOATS, "fp32")
    case = f"{kind} {gradient}" + " stochastic" * stochastic + " ragged" * ("n" in ragged)
    constants = {"STOCHASTIC": stochastic, "BLOCKS": BLOCKS}
    return Spec(adamw8bit_update, case, signature, constants, num_warps=4, ragged=ragged)


SPECS = [
    _spec("fp32", "fp32"),
    _spec("bf16", "bf16"),
    _spec("bf16", "bf16", stochastic=True),
    _spec("fp32", "fp32", ragged=("n", "seed")),
]
