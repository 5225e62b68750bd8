"""`python -m bench.parts`: where a step of ours goes, by part, from torch's profiler.

An operation belongs to a part by its name and the shapes of its inputs: a matmul with a side as narrow as the
adapters' ranks is LoRA's, one with a side of the vocabulary is the head's. The step is the loop's own, paced as in
the comparisons; its times are self times of operations on the CPU, so they add up to the step.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.cases import CASES, RANK, Case
from bench.measure import ROOT, Worker

_MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"}
_ATTENTION = ("attention", "softmax", "masked_fill", "bmm", "where")
_OPTIMISER = ("adam", "_foreach", "norm_", "linalg_vector_norm", "stack")
_COPIES = {"copy_", "cat", "clone", "_to_copy", "contiguous", "to", "zeros", "zero_", "fill_", "index", "index_put_",
           "_index_put_impl_", "empty", "empty_strided", "split_with_sizes", "narrow", "zeros_like"}  # fmt: skip


def part_of(name: str, shapes: list, config: Any) -> str:
    """Return the part of a step to which the operation `name` with inputs of `shapes` belongs."""
    name = name.removeprefix("aten::").removeprefix("mkldnn::")
    sizes = [tuple(shape) for shape in shapes if shape and all(isinstance(size, int) for size in shape)]
    narrow = {rank * RANK for rank in (1, 2, 3)}
    widths = (1, config.hidden_size, config.intermediate_size)
    if any(word in name.lower() for word in _OPTIMISER):
        return "optimiser"
    if any(config.vocab_size in shape for shape in sizes) and name != "embedding":
        return "head matmuls" if name in _MATMULS else "cross-entropy"
    if any(word in name for word in _ATTENTION):
        return "attention"
    if name in _MATMULS:
        return "LoRA matmuls" if any(narrow & set(shape) for shape in sizes) else "base matmuls"
    if name in _COPIES:
        return "copies"
    if sizes and len(sizes[0]) == 3 and sizes[0][-1] not in widths:  # scores (B K, G n, S)
        return "attention"
    return "elementwise"


def totals(events: list, config: Any) -> dict[str, float]:
    """Return seconds by part of profiled operations, grouped by shapes."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.key.startswith(("aten::", "mkldnn::")):
            seconds[part_of(event.key, event.input_shapes, config)] += event.self_cpu_time_total / 1e6
        else:
            seconds["autograd and Python"] += event.self_cpu_time_total / 1e6
    return dict(seconds)


class _Profiled:
    """Stands in for the driver: two steps to warm up, then one under the profiler."""

    def __init__(self):
        self.round = 0

    def wait(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.round += 1
        if self.round == 3:
            self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profiler.__enter__()

    def report(self, **_: Any) -> None:
        if self.round == 3:
            self.profiler.__exit__(None, None, None)
            raise StopIteration


def profile_step(case: Case, cache: Path) -> dict[str, float]:
    """Return the seconds by part of one step of a case of kind lora or full."""
    from bench.worker import our_training
    from minitune.model.config import ModelConfig

    channel = _Profiled()
    try:
        our_training(case, cache, channel)
    except StopIteration:
        pass
    config = ModelConfig.from_hf(json.loads((cache / case.dtype / "config.json").read_text(encoding="utf-8")))
    return totals(channel.profiler.key_averages(group_by_input_shape=True), config)


def main(argv: list[str] | None = None) -> int:
    """Print the table for fp32 and bf16, or for the cases named."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    names = [case.name for case in CASES if case.kind in ("lora", "full")]
    parser.add_argument("cases", nargs="*", default=["lora-fp32", "lora-bf16"], metavar="CASE", help=", ".join(names))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model to train")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "bench", help="where weights and ids are put")
    options = parser.parse_args(argv)
    if set(options.cases) - set(names):
        parser.error(f"the cases are {', '.join(names)}")
    with Worker("prepare", {"model": options.model}, options.cache) as worker:
        worker.ready()
    for case in (case for case in CASES if case.name in options.cases):
        parts = profile_step(case, options.cache)
        whole = sum(parts.values())
        print(f"{case.name}, {case.batch} x {case.length}, one step of ours, profiled: {whole:.2f} s")
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {name:22} {seconds:8.3f} s  {seconds / whole:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
