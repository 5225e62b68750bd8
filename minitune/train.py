"""Command: fine-tune a model.

    python -m minitune.train --data rows.jsonl                        # LoRA, all defaults
    python -m minitune.train --config full --data rows.jsonl          # a recipe, with options on top
    python -m minitune.train --output runs/train --resume             # go on after an interruption

    python -m minitune.train --data rows.jsonl --require "best_loss<=1.2" --require "gain.low>0"

Exit codes: 0 finished; 2 a mistake in the input, said in one line; 3 finished, but a --require does not hold; 143 after
SIGTERM and 130 after Ctrl-C, both with the state saved, so that --resume goes on where it stopped.
"""

import sys
from pathlib import Path

from minitune.cli import parse
from minitune.errors import run_command
from minitune.reporting.gates import gathered, verdict
from minitune.training.config import TrainConfig


def main(argv: list[str] | None = None) -> int:
    """Parse the options, train, say where the result is; returns the exit code."""
    arguments = gathered(sys.argv[1:] if argv is None else argv)
    prog, description = "python -m minitune.train", "Fine-tune a language model."
    config = parse(TrainConfig, arguments, prog=prog, description=description)
    saved = Path(config.output) / "config.yaml"
    if config.resume and saved.is_file():
        config = parse(TrainConfig, ["--config", str(saved), *arguments], prog=prog, description=description)
    from minitune.training.run import train  # imports torch: --help and bad options must not wait for it

    result = train(config)
    if result.signal is not None:
        print(f"stopped and saved; go on with: {prog} --output {result.folder} --resume", file=sys.stderr)
        return 128 + result.signal
    print(f"{result.status}: {result.result}\nreport: {result.folder / 'report.md'}, report.html")
    return verdict(result.gates)


if __name__ == "__main__":
    run_command(main)
