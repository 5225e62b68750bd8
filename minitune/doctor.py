"""Command: say why a training run, finished or failed, came out as it did: likely causes, their evidence, the remedies.

    python -m minitune.doctor runs/train
    python -m minitune.doctor runs/train --json

Only the files of the run are read, so it needs neither the model nor the data. The likeliest cause comes first; notes
are worth knowing, and no faults. Exit codes: 0 whatever is found; 2 where the folder is no run.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from minitune.cli import parse
from minitune.errors import ConfigError, run_command


@dataclass(frozen=True)
class DoctorConfig:
    """Which run."""

    run: tuple[str, ...]
    """The folder of a run, its --output."""
    json: bool = False
    """Print JSON instead of text."""


def main(argv: list[str] | None = None) -> None:
    """Read the run, print what was found."""
    description = __doc__.split("\n")[0]
    config = parse(DoctorConfig, argv, prog="python -m minitune.doctor", description=description, positional="run")
    if len(config.run) != 1:
        raise ConfigError(f"{len(config.run)} folders are given; the doctor sees one run at a time")
    from minitune.reporting.diagnosis import diagnose
    from minitune.reporting.page import visible
    from minitune.reporting.record import read_run

    found = diagnose(read_run(Path(config.run[0])))
    if config.json:
        findings = [{**asdict(one), "alarm": one.alarm} for one in found]
        print(json.dumps({"run": config.run[0], "findings": findings}, indent=2, ensure_ascii=False))
        return
    alarms = [one for one in found if one.alarm]
    if not alarms:
        print("no alarm: nothing in the run's files looks like a fault")
    for number, one in enumerate(alarms, 1):
        print(visible(f"{number}. {one.name}\n   evidence: {_line(one.evidence)}\n   remedy:   {_line(one.remedy)}"))
    for one in found[len(alarms) :]:
        print(visible(f"note: {one.name}: {_line(one.evidence)}; {_line(one.remedy)}"))


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run_command(main)
