"""Command: score answers with a reward model. Of pairs, also how often the chosen one has the higher reward.

python -m minitune.score --adapter runs/reward/adapter --data pairs.jsonl
python -m minitune.score --model REWARD_MODEL --data rows.jsonl --output rewards.jsonl
"""

import json
from dataclasses import dataclass
from statistics import mean

from minitune.cli import parse
from minitune.errors import check_counts, counted, run_command
from minitune.loading import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelOptions):
    """What to score, with which model."""

    data: str
    """Pairs, judged answers or chats: .jsonl, .json or .csv in any format that trains."""
    output: str | None = None
    """Write the rewards, a row for each row, to this JSONL file."""
    max_rows: int | None = None
    """Use only the first rows (default: all)."""
    batch_size: int = 16
    """Texts read at once."""

    def __post_init__(self):
        """Refuse counts without meaning."""
        check_counts(max_rows=self.max_rows, batch_size=self.batch_size)


def main(argv: list[str] | None = None) -> None:
    """Parse the options, read the data, load the model, score, print, write."""
    config = parse(ScoreConfig, argv, prog="python -m minitune.score", description=__doc__.split("\n")[0])
    from minitune.data.formats import file_kind, read_records
    from minitune.data.preference_formats import FORMATS_OF
    from minitune.evaluation.reward import score_records
    from minitune.files import atomic_file
    from minitune.sources import resolve

    path = resolve(config.data)
    rows = read_records(path, formats=FORMATS_OF[file_kind(path)])[: config.max_rows]
    model, tokenizer = config.load()
    rewards = iter(score_records(model, tokenizer, [side for row in rows for side in row.sides], config.batch_size))
    scores = [[next(rewards) for _ in row.sides] for row in rows]
    print(summary(scores))
    if config.output is None:
        return
    names = ("reward",) if len(scores[0]) == 1 else ("reward_chosen", "reward_rejected")
    with atomic_file(config.output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, found in zip(rows, scores, strict=True):
            file.write(json.dumps({"source": row.origin} | dict(zip(names, found, strict=True))) + "\n")
    print(f"written to {config.output}")


def summary(scores: list[list[float]]) -> str:
    """Say what the rewards are on average; of pairs [chosen, rejected], how often the chosen one is above the other.

    Equal rewards count as wrong; the interval is Wilson's, of 95%.
    """
    from minitune.evaluation.metrics import wilson_interval

    if len(scores[0]) == 1:
        return f"reward    mean {mean(found for (found,) in scores):.4g} of {counted(len(scores), 'answer')}"
    margins = [chosen - rejected for chosen, rejected in scores]
    right = sum(margin > 0 for margin in margins)
    low, high = wilson_interval(right, len(margins))
    return (
        f"accuracy  {right / len(margins):.1%}  (95% interval {low:.1%} to {high:.1%}; "
        f"chosen above rejected in {right} of {counted(len(margins), 'pair')})\n"
        f"margin    mean {mean(margins):.4g}"
    )


if __name__ == "__main__":
    run_command(main)
