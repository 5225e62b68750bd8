"""`python -m bench.step`: a whole QLoRA step on a random Llama-3-8B, beside transformers + PEFT + bitsandbytes.

Batch 2 x 2048, gradient checkpointing, adapters of rank 16 on all linear layers, bf16 arithmetic over NF4 with double
quantisation. Both sides draw the same weights and ids, each in a process of its own (`bench.worker`), and take turns.
Peak memory is what torch's allocator held on the device; the bars are ratios, ours / peer. Where the peer cannot run,
ours is measured alone and the ratios are "not measured".

Without a GPU the same is done with a random model of SmolLM2's shape, 4 x 256, and peak memory is the process's: it
shows that the bench works, and says nothing about the bars. Random weights need the same operations as trained ones.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.cases import RANK, SHAPES, Case
from bench.measure import ROOT, Worker, WorkerError, judge
from minitune.planning.flops import step_flops

GPU = Case("step-llama-3-8b", "transformers + PEFT + bitsandbytes NF4", "bitsandbytes", "bfloat16", "qlora", batch=2,
           length=2048, checkpointing=True, shape="llama-3-8b", device="cuda", time_least=0.6,
           memory_least=0.7)  # fmt: skip
CPU = dataclasses.replace(GPU, name="step-smollm2", batch=4, length=256, checkpointing=False, shape="smollm2",
                          device="cpu", time_least=None, memory_least=None)  # fmt: skip


def compare(case: Case, cache: Path, *, runs: int, warmups: int, seconds: float) -> dict[str, Any]:
    """Return both sides' answers, round by round; a side that fails has `not_measured` instead.

    No round begins after `seconds`; what is known then is kept.
    """
    deadline, fields = time.monotonic() + seconds, dataclasses.asdict(case)
    answers: dict[str, list] = {"ours": [], "peer": []}
    lost: dict[str, str] = {}
    versions: dict[str, str] = {}
    workers = {side: Worker(side, fields, cache, limit=seconds) for side in answers}
    try:
        for number in range(-1, warmups + runs):
            for side, worker in workers.items():
                if side in lost:
                    continue
                worker.limit = deadline - time.monotonic()
                if worker.limit <= 0:
                    lost.setdefault(side, "time was up")
                    continue
                try:
                    answer = worker.ready() if number < 0 else worker.round()
                except WorkerError as error:
                    lost[side] = "time was up" if time.monotonic() > deadline else str(error)[:300]
                    continue
                if number < 0:
                    versions |= answer["versions"]
                else:
                    answers[side].append(answer)
    finally:
        for worker in workers.values():
            worker.__exit__()
    sides = {side: side_result(rounds, warmups, lost.get(side)) for side, rounds in answers.items()}
    return {"case": {k: v for k, v in fields.items() if v is not None}, "versions": versions, **sides}


def side_result(rounds: list[dict[str, Any]], warmups: int, lost: str | None) -> dict[str, Any]:
    """Condense a side's rounds: seconds after the warm-ups, losses, peak memory in MB.

    Where the time ended sooner, all rounds but the first count, which compiles and allocates.
    """
    warmups = max(1, min(warmups, len(rounds) - 1))
    counted = rounds[warmups:]
    if not counted:
        return {"not_measured": lost or "no round was counted"}
    memory = "device_mb" if "device_mb" in counted[0] else "peak_mb"
    return {
        "seconds": [round(answer["seconds"], 4) for answer in counted],
        "losses": [round(answer["loss"], 5) for answer in rounds],
        "tokens": counted[0]["tokens"],
        "peak_mb": round(max(answer[memory] for answer in rounds), 1),
        "memory": memory,
        "warmups": warmups,
        **({"ended_early": lost} if lost else {}),
    }


def ratios(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Return ours / peer of time and peak memory with verdicts; "not measured" where a side is missing or differs."""
    ours, peer = result["ours"], result["peer"]
    why = ours.get("not_measured") or peer.get("not_measured")
    if not why and not abs(ours["losses"][0] - peer["losses"][0]) <= case.tolerance:
        why = f"loss of step 1 is {ours['losses'][0]:.5f} against {peer['losses'][0]:.5f}"
    if not why and ours["tokens"] != peer["tokens"]:
        why = f"{ours['tokens']} tokens a round against {peer['tokens']}"
    if why:
        return {"not_measured": why}
    pairs = {
        "time": (statistics.median(ours["seconds"]) / statistics.median(peer["seconds"]), case.time_least),
        "memory": (ours["peak_mb"] / peer["peak_mb"], case.memory_least),
    }
    return {
        name: {"ratio": ratio, "bar": bar, "verdict": judge(ratio, bar, None)} for name, (ratio, bar) in pairs.items()
    }


def flops(case: Case) -> float:
    """Return the operations of one step, as `planning/flops.py` counts them."""
    from minitune.model.config import ModelConfig

    config = ModelConfig.from_hf({"model_type": "llama", **SHAPES[case.shape]})
    return step_flops(config, [case.length] * case.batch, case.batch * (case.length - 1), method="lora",
                      rank=RANK, checkpointing=case.checkpointing)  # fmt: skip


def table(case: Case, result: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [f"QLoRA step, random {case.shape}, {case.batch} x {case.length}, {case.dtype}, on {case.device}"
             + (", checkpointing" if case.checkpointing else "")]  # fmt: skip
    for side, name in (("ours", "minitune"), ("peer", case.title)):
        one = result[side]
        if "not_measured" in one:
            lines.append(f"{name}: not measured: {one['not_measured']}")
            continue
        median, best = statistics.median(one["seconds"]), min(one["seconds"])
        what = "device" if one["memory"] == "device_mb" else "resident"
        lines.append(
            f"{name}: {median:.3f} s/step (best {best:.3f}, {len(one['seconds'])} steps), {one['tokens'] / median:.0f} "
            f"tokens/s, {result['flops'] / median / 1e12:.2f} TFLOP/s, peak {one['peak_mb']:,.0f} MB {what}"
        )
    for name in ("time", "memory"):
        one = result["ratios"].get(name)
        if one is None:
            lines.append(f"{name}, ours / peer: not measured ({result['ratios']['not_measured']})")
        else:
            bar = "no bar" if one["bar"] is None else f"bar {one['bar']}x: {one['verdict']}"
            lines.append(f"{name}, ours / peer: {one['ratio']:.2f}x ({bar})")
    if case.device == "cpu":
        lines.append("no GPU here: a small model on the CPU; the bars are for Llama-3-8B on a GPU and are not measured")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compare, print, write JSON; 1 where our side could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="of the random model (default: llama-3-8b on a GPU, else smollm2)")
    add("--runs", type=int, default=5, help="steps of each side that count (default 5)")
    add("--warmups", type=int, default=2, help="steps before them (default 2)")
    add("--seconds", type=float, default=300, help="end after this long with what there is (default 300)")
    add("--cache", type=Path, default=ROOT / "runs" / "bench", help="where logs are put")
    add("--output", type=Path, default=ROOT / "runs" / "bench" / "step.json")
    options = parser.parse_args(argv)
    from bench.timing import device_facts, on_gpu

    case = GPU if on_gpu() else CPU
    if options.shape and options.shape != case.shape:
        case = dataclasses.replace(case, shape=options.shape, name=f"step-{options.shape}", time_least=None,
                                   memory_least=None)  # fmt: skip
        case = dataclasses.replace(case, length=min(case.length, SHAPES[options.shape]["max_position_embeddings"]))
    result = compare(case, options.cache, runs=options.runs, warmups=options.warmups, seconds=options.seconds)
    result |= {"date": f"{datetime.date.today()}", "device": device_facts(), "flops": flops(case)}
    result["ratios"] = ratios(case, result)
    print(table(case, result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return int("not_measured" in result["ours"])


if __name__ == "__main__":
    sys.exit(main())
