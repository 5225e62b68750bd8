"""Launches of kernels/nf4.py: plain and double-quantised scales, small and large blocks, whole and ragged sizes."""

from minitune.kernels.nf4 import BLOCK, nf4_dequantize, nf4_quantize
from tests.kernels.compiled import Spec

SCALES = {
    True: {"absmax": "*u8", "nested": "*fp32", "offset": "*fp32", "scale_map": "*fp32"},
    False: dict.fromkeys(("absmax", "nested", "offset", "scale_map"), "*fp32"),
}


def _dequantize(kind: str, block_size: int, nested: bool, ragged: tuple = ()) -> Spec:
    signature = {"packed": "*u8", **SCALES[nested], "codes": "*fp32", "out": f"*{kind}", "n": "i32"}
    constants = {"NESTED": nested, "BLOCK_SIZE": block_size, "BLOCK": BLOCK}
    case = f"{kind} {block_size}" + " nested" * nested + " ragged" * bool(ragged)
    return Spec(nf4_dequantize, case, signature, constants, num_warps=4, ragged=ragged)


def _quantize(kind: str, block_size: int) -> Spec:
    signature = {"x": f"*{kind}", "middle": "*fp32", "order": "*i32", "packed": "*u8", "absmax": "*fp32", "n": "i32"}
    constants = {"BLOCK_SIZE": block_size, "BLOCKS": max(BLOCK // 4 // block_size, 1)}
    return Spec(nf4_quantize, f"{kind} {block_size}", signature, constants, num_warps=4)


SPECS = [
    _dequantize("bf16", 64, True),
    _dequantize("fp16", 64, False),
    _dequantize("fp32", 64, True),
    _dequantize("bf16", 32, True),
    _dequantize("bf16", 4096, False),
    _dequantize("bf16", 64, True, ("n",)),
    *(_quantize(kind, 64) for kind in ("bf16", "fp16", "fp32")),
    _quantize("fp32", 32),
    _quantize("fp32", 4096),
]
