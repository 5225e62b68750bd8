"""The bench of forgetting: every variant is a run that would begin, and the table says what each keeps and costs."""

import pytest

from bench.forgetting import COMMON, SIZES, VARIANTS, table
from examples.sentiment import DemoConfig
from minitune.cli import parse
from minitune.training.config import TrainConfig


@pytest.mark.parametrize("variant", [name for name, options in VARIANTS.items() if options])
def test_a_variant_is_a_run(variant):
    plan = parse(TrainConfig, f"{VARIANTS[variant]} {COMMON} --data rows.jsonl".split(), prog="x", description="")
    plan = plan.resolved()
    assert ("EWC" in variant or "Fisher" in variant) == (plan.penalty.kind == "ewc")
    assert "EWC" not in variant or plan.penalty.strength == float(variant.split()[-1])
    assert ("L2" in variant) == (plan.penalty.kind == "l2")
    assert ("half" in variant) == (plan.freeze_layers == 15) and ("full" in variant) == (plan.method == "full")
    assert ("rehearsal" in variant) == (plan.data[-1].share == 0.2)


def test_enough_rows_are_measured():
    assert DemoConfig(**SIZES).test_rows >= 400


def test_the_table_compares_with_the_base_of_the_same_seed():
    measured = {"accuracy": 0.5, "accuracy_interval": (0.4, 0.6), "peak_rss_mb": 1234.5}
    runs = [
        {"variant": "base", "seed": 0, **measured, "perplexity": 20.0},
        {"variant": "LoRA", "seed": 0, **measured, "perplexity": 25.0, "cpu_seconds": 30.4, "steps": 20},
        {"variant": "LoRA", "seed": 1, **measured, "perplexity": 25.0, "cpu_seconds": 30.4, "steps": 20},
        {"variant": "Fisher information, LoRA", "seed": 0, "cpu_seconds": 60.0, "peak_rss_mb": 2000.0},
    ]
    lines = table(runs, 2).split("\n")
    assert lines[3] == "| LoRA | 0 | 50.0% (40.0% to 60.0%) | 25.00 | +25.0% | 30 | 1,234 |"
    assert "| 25.00 |  |" in lines[4] and "| 60 | 2,000" in lines[5]
    assert lines[-1] == f"4 of {2 * len(VARIANTS)} runs"
