"""What devices can do at most, by their vendors' data sheets, and which share of it a training step gets.

The peaks are those of dense matrices with sums in fp32 (data sheets like to print twice as much, for sparse ones), and
for float32 those of plain fp32, which is what torch uses unless it is told otherwise. No step reaches a peak. So times
are ranges: the operations over the peak, divided by a share of 25 to 50%, which is what well-tuned training of
models of 1 billion parameters and more is reported to reach; small models and short rows stay below. It was not
measured here. For the CPU it was: 16 to 29% in bf16 and 52 to 66% in fp32 (`bench/results/2026-11-22.json`, the share
of the floor in the cases of SmolLM2 135M). A single number was rejected: it would be wrong for nearly everyone.

There are no prices here, since they age in weeks.
"""

from dataclasses import dataclass

from minitune.errors import ConfigError, nearest

DATE = "2026-11-22"


@dataclass(frozen=True)
class Device:
    """A device: rates in operations and bytes a second, memory in bytes; `utilisation` by dtype, as (least, most)."""

    name: str
    bfloat16: float | None
    """None: it has no units for it."""
    float32: float
    bandwidth: float
    memory: float | None
    """Of the data sheet, with 10^9 bytes a GB: it means 2^30, and the difference is left to the driver. None: asked."""
    source: str
    utilisation: tuple[tuple[float, float], tuple[float, float]] = ((0.25, 0.5), (0.25, 0.5))
    """Of bfloat16 and of float32."""

    def rate(self, dtype: str) -> float:
        """Return the peak for bfloat16 or float32; ConfigError where the device has none."""
        rate = self.bfloat16 if dtype == "bfloat16" else self.float32
        if rate is None:
            raise ConfigError(f"{self.name} has no units for bfloat16; plan with --dtype float32")
        return rate

    def shares(self, dtype: str) -> tuple[float, float]:
        """Return the least and the largest share of the peak that a step is expected to get."""
        return self.utilisation[0 if dtype == "bfloat16" else 1]


def _gpu(name: str, bfloat16: float | None, float32: float, bandwidth: float, memory: float, source: str) -> Device:
    """Return a device from its data sheet's TFLOPS, GB/s and GB."""
    rate = None if bfloat16 is None else bfloat16 * 1e12
    return Device(name, rate, float32 * 1e12, bandwidth * 1e9, memory * 1e9, source)


_SHEET, _PAPER = "NVIDIA data sheet", "NVIDIA architecture white paper"
DEVICES = (
    _gpu("H100-SXM", 989.4, 67.0, 3350, 80, f"{_SHEET}, H100 Tensor Core GPU"),
    _gpu("H100-PCIe", 756.0, 51.0, 2000, 80, f"{_SHEET}, H100 Tensor Core GPU"),
    _gpu("H200", 989.4, 67.0, 4800, 141, f"{_SHEET}, H200 Tensor Core GPU"),
    _gpu("A100-40GB", 312.0, 19.5, 1555, 40, f"{_SHEET}, A100 Tensor Core GPU"),
    _gpu("A100-80GB", 312.0, 19.5, 1935, 80, f"{_SHEET}, A100 Tensor Core GPU (PCIe; SXM has 2,039 GB/s)"),
    _gpu("L40S", 362.05, 91.6, 864, 48, f"{_SHEET}, L40S"),
    _gpu("L4", 121.0, 30.3, 300, 24, f"{_SHEET}, L4 Tensor Core GPU"),
    _gpu("A10G", 70.0, 35.0, 600, 24, f"{_SHEET}, A10G (AWS g5)"),
    _gpu("T4", None, 8.1, 300, 16, f"{_SHEET}, T4 Tensor Core GPU"),
    _gpu("RTX-3090", 71.0, 35.6, 936, 24, f"{_PAPER}, GA102"),
    _gpu("RTX-4090", 165.2, 82.6, 1008, 24, f"{_PAPER}, Ada"),
    _gpu("RTX-5090", 209.5, 104.8, 1792, 32, f"{_PAPER}, RTX Blackwell"),
    Device(
        "CPU-2-cores", 1.9e12, 3.1e11, 2.5e10, None,
        "measured: Xeon with AMX at 2.1 GHz, 2 threads, best of matmuls of 2,048 (bench/results/2026-11-22.json)",
        ((0.16, 0.29), (0.52, 0.66)),
    ),
)  # fmt: skip


def device(name: str) -> Device:
    """Return the device of that name, in any case; ConfigError for an unknown one, with the nearest."""
    known = {one.name.lower(): one for one in DEVICES}
    if name.lower() not in known:
        begun = [one.name for one in DEVICES if one.name.lower().startswith(name.lower())]
        close = nearest(name.upper(), [one.name.upper() for one in DEVICES])
        hint = f"; there are {', '.join(begun or (one.name for one in DEVICES))}"
        raise ConfigError(f"no device is called {name!a}{hint if begun or not close else close}")
    return known[name.lower()]
