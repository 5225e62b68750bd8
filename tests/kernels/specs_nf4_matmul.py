"""Launches of kernels/nf4_matmul.py: each plan that 16-bit and fp32 inputs can get, with and without low-rank term."""

from minitune.kernels.nf4_matmul import nf4_matmul, nf4_matmul_backward, nf4_matvec, plan
from tests.kernels.compiled import Spec
from tests.kernels.specs_nf4 import SCALES


def _signature(names: tuple, kind: str, nested: bool, integers: tuple) -> dict[str, str]:
    scales = {"packed": "*u8", **SCALES[nested], "codes": "*fp32"}
    return dict.fromkeys(names, f"*{kind}") | scales | dict.fromkeys(integers, "i32")


def _matvec(kind: str, n: int, k: int, rank: int = 0, block_size: int = 64, nested: bool = True) -> Spec:
    sizes = plan(1, n, k, block_size)
    signature = _signature(("x", "u", "b", "y"), kind, nested, ("n", "row_words", "rank")) | {"scaling": "fp32"}
    constants = {"NESTED": nested, "BLOCK_SIZE": block_size, "BN": sizes.BN, "WORDS": sizes.BK // 8, "BR": rank}
    return Spec(nf4_matvec, f"{kind} {n}x{k} r{rank} b{block_size}", signature, constants, num_warps=4)


def _tiles(kind: str, m: int, rank: int = 0, block_size: int = 64, nested: bool = True) -> Spec:
    sizes = plan(m, 4096, 4096, block_size)
    integers = ("m", "n", "row_bytes", "x_stride", "span", "rank")
    signature = _signature(("x", "u", "b", "y"), kind, nested, integers) | {"scaling": "fp32"}
    constants = {"NESTED": nested, "BLOCK_SIZE": block_size, "BR": rank} | {s: getattr(sizes, s) for s in _TILE}
    return Spec(
        nf4_matmul, f"{kind} m{m} r{rank} b{block_size}", signature, constants, num_warps=4, ragged=("m", "rank")
    )


def _backward(kind: str, m: int, block_size: int = 64, nested: bool = True) -> Spec:
    sizes = plan(m, 4096, 4096, block_size, backward=True)
    integers = ("m", "n", "row_bytes", "dy_stride", "span")
    signature = _signature(("dy", "dx"), kind, nested, integers)
    constants = {"NESTED": nested, "BLOCK_SIZE": block_size} | {s: getattr(sizes, s) for s in _TILE}
    return Spec(nf4_matmul_backward, f"{kind} m{m} b{block_size}", signature, constants, num_warps=4, ragged=("m",))


_TILE = ("BM", "BN", "BK")
SPECS = [
    _matvec("bf16", 4096, 4096),
    _matvec("bf16", 28672, 8192),
    _matvec("bf16", 28672, 8192, rank=16),
    _matvec("fp16", 4096, 4096, block_size=32, nested=False),
    _matvec("fp32", 4096, 4096, rank=16, block_size=4096),
    *(_tiles(kind, m, rank) for kind in ("bf16", "fp16") for m in (16, 64) for rank in (0, 16)),
    _tiles("bf16", 64, 64, block_size=4096, nested=False),
    _tiles("bf16", 64, 16, block_size=32),
    *(_backward(kind, m) for kind in ("bf16", "fp16") for m in (16, 64)),
    _backward("bf16", 64, block_size=32, nested=False),
]
