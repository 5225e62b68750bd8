"""What becomes of a run: its result, and the account of it that stays in its folder.

Before the first step the account reads what is to be measured and refuses what cannot be; in the end it measures the
weights that were kept, holds the run to its gates, and writes outcome.json and the report. The interval of the gain is
that of the fall of the loss a target, by a bootstrap over validation rows that draws the same rows before and after.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune import sources
from minitune.data.corpus import Corpus
from minitune.errors import ConfigError
from minitune.evaluation.bootstrap import paired_difference, ratio_of
from minitune.evaluation.comparison import FEWEST
from minitune.evaluation.perplexity import perplexity, read_text
from minitune.files import read_json
from minitune.model.transformer import Transformer
from minitune.reporting import watch
from minitune.reporting.evidence import data_facts, prepared_findings
from minitune.reporting.folder import write_outcome, write_run_files
from minitune.reporting.gates import GateOutcome, check, parse_gates, resolve
from minitune.reporting.journal import peak_memory_mb, read_rows_of
from minitune.reporting.record import GATED, MEASURES, gated
from minitune.reporting.report import write_report
from minitune.training.config import TrainConfig
from minitune.training.loop import Job, fit

WINDOW, TOKENS = 512, 8192  # of general text: short windows, so that few tokens give an interval too


@dataclass(frozen=True)
class TrainResult:
    """What came out. Losses are nats per target token; seconds are spent in training steps."""

    status: str
    folder: Path
    result: Path | None
    steps: int
    target_tokens: int
    seconds: float
    peak_rss_mb: float
    base_loss: float | None
    best_loss: float | None
    best_step: int | None
    parted_step: int | None = None
    """Where training and validation loss parted (see `watch.overfitting`)."""
    signal: int | None = None
    gain: dict[str, Any] | None = None
    """Of the best validation loss over the base's: {"value", "interval", "rows"}, by paired bootstrap over rows."""
    general: dict[str, Any] | None = None
    """Perplexity of general text: {"text", "tokens", "before", "after", "ratio"}."""
    movement: dict[str, float] | None = None
    """How far the trained weights went (see `watch.movement`), since the run was last begun or resumed."""
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    """What else was measured on the validation rows, with the weights that were kept."""
    gates: tuple[GateOutcome, ...] = ()
    """What became of `require`."""


class Account:
    """The account of one run.

    Raises ConfigError for a gate on what the run does not measure, and as `read_text` for the general text.
    """

    def __init__(self, config: TrainConfig):
        """Read the general text, and refuse, before the work, gates that could not be held."""
        self.config, general = config, config.evaluation.general
        self.text = None if general is None else read_text(sources.resolve(general))
        known = [*GATED, *(f"validation.{name}" for name in MEASURES if config.objective != "sft")]
        self.gates = parse_gates(config.require)
        for gate in self.gates:
            if resolve(gate.name, known).startswith("general.") and general is None:
                raise ConfigError(f"require is '{gate.text}', but evaluation.general is not set; name a text there")

    def begin(
        self, model: Transformer, tokenizer: Any, corpus: Corpus, guessing: float, environment: dict[str, Any]
    ) -> None:
        """Write what is known before the first step; `guessing` is the loss of a model that knows nothing."""
        options, facts = dataclasses.asdict(self.config), {}
        if not self.config.resume:
            facts = {"data": data_facts(corpus, tokenizer), "guessing": guessing}
            facts["lint"] = prepared_findings(corpus.files)
            facts["general"] = self._perplexity(model, tokenizer)
        write_run_files(Path(self.config.output), options, corpus.files, environment, facts)

    def _perplexity(self, model: Transformer, tokenizer: Any) -> dict[str, Any] | None:
        """Return the perplexity of the general text, where there is one."""
        if self.text is None:
            return None
        window, tokens = min(WINDOW, model.config.longest), self.config.evaluation.general_tokens or TOKENS
        found = perplexity(model, tokenizer, self.text, window=window, max_tokens=tokens)
        return {"value": found.perplexity, "interval": found.interval, "tokens": found.tokens, "window": window}

    def fit(self, job: Job, stopped: Callable[[], bool]) -> str:
        """Train to the end; of a run that fails, what it died of is left in its folder."""
        self.start = watch.sampled(job.parameters)
        try:
            return fit(job, stopped)
        except Exception as error:
            failed = {"status": "failed", "error": f"{type(error).__name__}: {error}", "steps": job.progress.step}
            write_outcome(job.checkpoints.parent, failed)
            raise

    def close(self, job: Job, status: str, result: Path | None, tokenizer: Any, signal: int | None) -> TrainResult:
        """Return what came out, and write it and, where the run came to its end, the report."""
        folder, progress, evaluations = job.checkpoints.parent, job.progress, job.progress.evaluations
        parted = watch.overfitting(evaluations)
        kept = next((e for e in evaluations if e["step"] == progress.best_step), {})
        outcome = TrainResult(
            status=status,
            folder=folder,
            result=result,
            steps=progress.step,
            target_tokens=progress.target_tokens,
            seconds=progress.seconds,
            peak_rss_mb=peak_memory_mb(),
            base_loss=next((e["validation_loss"] for e in evaluations if e["step"] == 0), None),
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            parted_step=parted and parted["step"],
            signal=signal if status == "stopped" else None,
            gain=_gain(folder, progress.best_step),
            general=result and self._general(folder, job.model, tokenizer),
            movement=watch.movement(self.start, job.parameters),
            validation={name: kept[f"validation_{name}"] for name in MEASURES if f"validation_{name}" in kept},
        )
        if result is not None:
            held = check(self.gates, gated(dataclasses.asdict(outcome), self.config.objective))
            outcome = dataclasses.replace(outcome, gates=tuple(held))
        write_outcome(folder, dataclasses.asdict(outcome))
        if result is not None:
            write_report(folder)
        return outcome

    def _general(self, folder: Path, model: Transformer, tokenizer: Any) -> dict[str, Any] | None:
        """Return general text's perplexity before and after; before is None where a run that was resumed lacks it."""
        after = self._perplexity(model, tokenizer)
        if after is None:
            return None
        before = read_json(folder / "facts.json", optional=True).get("general")
        same = before and (before["tokens"], before["window"]) == (after["tokens"], after["window"])
        ratio = after["value"] / before["value"] if same else None
        return {"text": self.config.evaluation.general, "before": before, "after": after, "ratio": ratio}


def _gain(folder: Path, best_step: int | None) -> dict[str, Any] | None:
    """Return by how much the loss per target fell, with its interval; None where rows' own losses are not known."""
    base, best = read_rows_of(folder, 0), read_rows_of(folder, best_step or 0)
    if not best_step or not best or len(base) != len(best):
        return None
    before, after = (ratio_of(*zip(*rows, strict=True)) for rows in (base, best))
    value, low, high = paired_difference(before, after)
    return {"value": value, "interval": (low, high) if len(best) >= FEWEST else None, "rows": len(best)}
