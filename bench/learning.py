"""`python -m bench.learning`: does DPO learn what real pairs prefer? Held-out accuracy, and what was forgotten.

A seed draws the split, the order of the rows and the adapter anew. The pairs are those of dpo_en_demo.json (package
llamafactory) whose sides fit 512 tokens, about a third; a part of them is never trained on. Of these is counted how
often the chosen answer has the higher implicit reward, b (log p - log p_ref), after training, and how often the base
model gives it the higher log-probability. The interval is Wilson's over the held-out pairs of all seeds, some of which
are the same pairs: it is a little too narrow. Beside it stands the perplexity of general text, base and tuned. What is
done is not done again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench.seeds import complete

MODEL, TOKENS, WINDOW = "smollm2-135m-instruct", 16384, 512


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Return what one run came to on its held-out pairs."""
    from minitune.evaluation.perplexity import perplexity
    from minitune.loading import ModelOptions
    from minitune.reporting.journal import read_metrics
    from minitune.sources import fetch
    from minitune.training.config import EvaluationConfig, OptimizerConfig, TrainConfig
    from minitune.training.run import train

    output = folder / f"dpo-{seed}"
    config = TrainConfig(
        data=str(fetch("dpo-en-demo")), model=MODEL, objective="dpo", truncate="drop",
        validation_fraction=0.35, packing=False, batch_size=4, accumulation_steps=2, epochs=3.0, seed=seed,
        optimizer=OptimizerConfig(learning_rate=2e-4), evaluation=EvaluationConfig(every_steps=1000, samples=0),
        output=str(output), overwrite=True,
    )  # fmt: skip
    result = train(config)
    first, last = [line for line in read_metrics(output) if "validation_loss" in line]
    held = json.loads((output / "data.json").read_text(encoding="utf-8"))[0]["validation_examples"]
    text = fetch("wiki-demo").read_text(encoding="utf-8")
    scores = {}
    for name, adapter in (("base", None), ("tuned", str(output / "adapter"))):
        model, tokenizer = ModelOptions(model=MODEL, adapter=adapter).load()
        scores[f"{name}_perplexity"] = perplexity(model, tokenizer, text, window=WINDOW, max_tokens=TOKENS).perplexity
    return {
        "seed": seed, "held_out": held, "steps": result.steps, "seconds": result.seconds,
        "base_right": round(held * first["validation_prefers_chosen"]),
        "tuned_right": round(held * last["validation_accuracy"]),
        "tuned_prefers_chosen": round(held * last["validation_prefers_chosen"]),
        "margin": last["validation_margin"], "loss": last["validation_loss"], **scores,
    }  # fmt: skip


def table(runs: list[dict[str, Any]], wanted: int) -> str:
    """Return the runs as lines, and all together with intervals."""
    from minitune.evaluation.metrics import wilson_interval

    lines = [f"{'seed':>4}{'held out':>10}{'base':>8}{'tuned':>8}{'margin':>9}{'perplexity, base':>18}{'tuned':>8}"]
    for found in runs:
        base, tuned = (found[f"{name}_right"] / found["held_out"] for name in ("base", "tuned"))
        lines.append(
            f"{found['seed']:4}{found['held_out']:10}{base:8.1%}{tuned:8.1%}{found['margin']:9.3f}"
            f"{found['base_perplexity']:18.2f}{found['tuned_perplexity']:8.2f}"
        )
    held = sum(found["held_out"] for found in runs)
    for name in ("base", "tuned"):
        right = sum(found[f"{name}_right"] for found in runs)
        low, high = wilson_interval(right, held)
        lines.append(f"{name:5} {right} of {held} right, {right / held:.1%} (95% interval {low:.1%} to {high:.1%})")
    return "\n".join([*lines, f"{len(runs)} of {wanted} seeds"])


def main(argv: list[str] | None = None) -> int:
    """Do what is missing of all runs, print the table."""
    return complete("learning", __doc__, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
