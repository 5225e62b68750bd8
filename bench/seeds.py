"""Runs that differ in their seed: what is not yet in the file of results is done, and the table is printed."""

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from bench.measure import ROOT

Runs = list[dict[str, Any]]


def complete(
    name: str,
    about: str | None,
    run: Callable[..., dict[str, Any]],
    table: Callable[[Runs, int], str],
    argv: list[str] | None,
    seeds: int = 3,
    **variants: tuple[str, ...],
) -> int:
    """Do what is missing of all seeds and variants, keeping each result as it comes; print the table.

    Args:
        name: of the bench, its module and its files.
        about: what `--help` says.
        run: called with (variant, ..., seed, folder); returns a result that names its seed and variants.
        table: makes a text of the results and the number of seeds.
        argv: the command line.
        seeds: how many, where the command line does not say.
        variants: by the name that results have for them, what each seed is run with.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0, 1, ... of each kind of run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / name, help="where the runs go")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"{name}.json")
    options = parser.parse_args(argv)
    runs: Runs = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else []
    keys = ("seed", *variants)
    for seed, *chosen in product(range(options.seeds), *variants.values()):
        if not any([found[key] for key in keys] == [seed, *chosen] for found in runs):
            runs.append(run(*chosen, seed, options.folder))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
            print(table(runs, options.seeds), flush=True)
    print(table(runs, options.seeds))
    return 0
