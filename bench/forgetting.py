"""`python -m bench.forgetting`: what each means against forgetting keeps, and what it costs.

SmolLM2-135M-Instruct learns to label film reviews, in some ways that differ in one thing. Each is measured on the same
test rows (accuracy, Wilson's interval) and by the perplexity of general text (`wiki_demo.txt`), which no variant reads:
the Fisher information comes from `c4_demo.jsonl`, rehearsal from `alpaca_en_demo.json`. Each runs in a process of its
own, whose peak memory and processor seconds up to the end of training are told (loading and validation included; on a
busy machine the clock tells more of the others). That includes making the Fisher information where it was not kept yet,
so a row of its own makes it first. What is done is not done again; a variant that fails stops the bench.
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.seeds import complete

SIZES = {"train_rows": 480, "validation_rows": 24, "test_rows": 400, "perplexity_tokens": 8192}
COMMON = "--max_length 192 --batch_size 3 --accumulation_steps 1 --evaluation.every_steps 1000 --evaluation.samples 0"
LORA = "--lora.rank 16 --lora.alpha 32 --optimizer.learning_rate 1e-3"
FULL = "--method full --optimizer.learning_rate 3e-5"
EWC = "--penalty ewc --penalty.text c4-demo --penalty.tokens 8192"
VARIANTS: dict[str, str | None] = {  # None: the model as it is
    "base": None,
    "LoRA": LORA,
    "Fisher information, LoRA": f"{LORA} {EWC}",
    "LoRA, EWC 100": f"{LORA} {EWC} --penalty.strength 100",
    "LoRA, rehearsal 20%": f"{LORA} --rehearsal alpaca-en-demo --truncate drop",
    "LoRA, L2 0.01": f"{LORA} --penalty l2 --penalty.strength 0.01",
    "LoRA, lower half frozen": f"{LORA} --freeze_layers 15",
    "LoRA, EWC 1000": f"{LORA} {EWC} --penalty.strength 1000",
    "LoRA, EWC 10": f"{LORA} {EWC} --penalty.strength 10",
    "full": FULL,
    "Fisher information, full": f"{FULL} {EWC}",
    "full, EWC 100": f"{FULL} {EWC} --penalty.strength 100",
    "full, L2 1": f"{FULL} --penalty l2 --penalty.strength 1",
    "full, lower half frozen": f"{FULL} --freeze_layers 15",
    "last 4 layers": "--method last_layers --last_layers 4 --optimizer.learning_rate 1e-4",
}


def run(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return what a variant came to, from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(measure, variant, seed, folder).result()
    return {"variant": variant, "seed": seed, "date": time.strftime("%Y-%m-%d"), "sizes": SIZES, **found}


def measure(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a variant and measure it; of the Fisher information, only make it."""
    import torch

    from examples.sentiment import DemoConfig, Measured, split_reviews, write_rows
    from minitune.cli import parse
    from minitune.sources import fetch
    from minitune.training.config import TrainConfig
    from minitune.training.run import train

    output = folder / f"{variant.replace(' ', '-').replace(',', '').replace('%', '')}-{seed}"
    config = DemoConfig(output=str(output), seed=seed, **SIZES)
    model, reviews, text = (fetch(name) for name in (config.model, "movie-reviews", "wiki-demo"))
    splits = split_reviews(reviews, config)
    files = {name: write_rows(rows, output / "data" / f"{name}.jsonl") for name, rows in splits.items()}
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    options = VARIANTS[variant]
    if options is None:
        return result | general_loss(model, text)
    for name in ("alpaca-en-demo", "c4-demo"):
        fetch(name)
    words = f"{options} {COMMON} --model {config.model} --data {files['train']} --seed {seed} --overwrite"
    words += f" --validation {files['validation']} --output {output / 'train'}"
    plan = parse(TrainConfig, words.split(), prog="forgetting", description="")
    if variant.startswith("Fisher"):
        return result | make_information(plan)
    began = time.process_time()
    trained = train(plan)
    result |= {
        "cpu_seconds": time.process_time() - began,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "peak_rss_mb": trained.peak_rss_mb,
    }
    result |= {"command": options, "best_loss": trained.best_loss, "base_loss": trained.base_loss}
    adapter = trained.result if trained.result.name == "adapter" else None
    measured = Measured(model if adapter else trained.result, splits, text, config)
    found = measured.tuned(adapter)
    return result | {name: value for name, value in found.items() if name != "predicted"}


def general_loss(model: Path, text: Path) -> dict[str, Any]:
    """Return the perplexity of general text under a model as it is, as `examples.sentiment` measures it."""
    from examples.sentiment import WINDOW
    from minitune.evaluation.perplexity import perplexity
    from minitune.loading import ModelOptions

    known, tokenizer = ModelOptions(model=str(model)).load()
    tokens = SIZES["perplexity_tokens"]
    found = perplexity(known, tokenizer, text.read_text(encoding="utf-8"), window=WINDOW, max_tokens=tokens)
    return {"perplexity": found.perplexity}


def make_information(plan: Any) -> dict[str, Any]:
    """Make the Fisher information of a plan, or find it made; its seconds, and the peak memory of this process."""
    from minitune.checkpoint.load import load_model, load_tokenizer
    from minitune.device import choose_device, choose_dtype
    from minitune.reporting.journal import peak_memory_mb
    from minitune.training.penalty import build_penalty
    from minitune.training.run import choose_parameters
    from minitune.training.state import base_fingerprint

    device, plan = choose_device("cpu"), plan.resolved()
    model = load_model(plan.model, dtype=choose_dtype("auto", device), device=device)
    start, tokenizer = base_fingerprint(model), load_tokenizer(plan.model)
    parameters = choose_parameters(model, plan)
    began, cpu = time.monotonic(), time.process_time()
    said = build_penalty(model, parameters, plan.penalty, tokenizer, start, tokenizer.pad_id or 0)[1]
    print(said, file=sys.stderr)
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    return spent | {"peak_rss_mb": peak_memory_mb()}


def table(runs: list[dict[str, Any]], wanted: int) -> str:
    """Return the runs as a Markdown table: what each reaches, keeps and costs."""
    lines = ["| variant | seed | accuracy (95% interval) | perplexity | of the base's | CPU s | peak MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    base = {found["seed"]: found["perplexity"] for found in runs if found["variant"] == "base"}
    for found in runs:
        reached, kept, share = "", "", ""
        if "accuracy" in found:
            low, high = found["accuracy_interval"]
            reached = f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        if "perplexity" in found:
            kept = f"{found['perplexity']:.2f}"
            share = f"{found['perplexity'] / base[found['seed']] - 1:+.1%}" if found["seed"] in base else ""
        pace = f"{found['cpu_seconds']:.0f}" if "cpu_seconds" in found else ""
        peak = f"{found['peak_rss_mb']:,.0f}" if "peak_rss_mb" in found else ""
        lines.append(f"| {found['variant']} | {found['seed']} | {reached} | {kept} | {share} | {pace} | {peak} |")
    return "\n".join([*lines, f"\n{len(runs)} of {wanted * len(VARIANTS)} runs"])


def main(argv: list[str] | None = None) -> int:
    """Do what is missing of all runs, print the table."""
    return complete("forgetting", __doc__, run, table, argv, seeds=1, variant=tuple(VARIANTS))


if __name__ == "__main__":
    sys.exit(main())
