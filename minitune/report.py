"""Command: write a run's report anew, with what was measured since, and hold it to gates.

    python -m minitune.evaluate --adapter runs/train/adapter --classify test.jsonl --labels yes,no \\
        --output runs/train/evaluations/test.json
    python -m minitune.report runs/train --require "accuracy>=0.85" --require "accuracy.low>=0.8"

Every result of `minitune.evaluate` in the run's folder `evaluations` is read into `report.md` and `report.html`. Exit
codes: 0 written, and every gate passed; 2 a mistake in the input; 3 written, but a gate does not hold.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from minitune.cli import parse
from minitune.errors import ConfigError, run_command
from minitune.reporting.gates import check, gathered, parse_gates, verdict


@dataclass(frozen=True)
class ReportConfig:
    """Which run."""

    run: tuple[str, ...]
    """The folder of a run, its --output."""
    require: tuple[str, ...] | str = ()
    """Exit with code 3 unless these hold, as accuracy>=0.85; can be repeated."""


def main(argv: list[str] | None = None) -> int:
    """Write both reports, print where they are and what became of the gates; returns the exit code."""
    arguments, description = gathered(sys.argv[1:] if argv is None else argv), __doc__.split("\n")[0]
    config = parse(ReportConfig, arguments, prog="python -m minitune.report", description=description, positional="run")
    gates = parse_gates(config.require)
    if len(config.run) != 1:
        raise ConfigError(f"{len(config.run)} folders are given; a report is of one run")
    from minitune.reporting.record import gated, read_run
    from minitune.reporting.report import write_report

    folder = Path(config.run[0])
    run = read_run(folder)
    for path in write_report(folder):
        print(f"written: {path}")
    return verdict(check(gates, gated(run.outcome, run.options["objective"]) | {"evaluations": run.measured}))


if __name__ == "__main__":
    run_command(main)
