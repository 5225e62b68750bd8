"""The only training loop. Read it downward: `fit` goes from window to window, a window is several micro-batches
and one optimiser step, and between windows there are evaluations and checkpoints.

With sums over all micro-batches m of a window and the target tokens, or pairs, W_m in each, the gradient of a step is

    g = (sum_m grad L_m) / (sum_m W_m)

where L_m is a sum over targets. The usual mean of means, sum_m grad (L_m / W_m) / M, was rejected: it gives the
tokens of a short micro-batch more weight than those of a long one. A method is what trains, a task is the
objective; neither has a loop of its own.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune.data.batching import Batch
from minitune.errors import TrainingError
from minitune.model.transformer import Transformer
from minitune.reporting import watch
from minitune.reporting.journal import Journal, peak_memory_mb
from minitune.training.config import TrainConfig
from minitune.training.evaluate import validation_loss
from minitune.training.objectives import Objective, add_metrics, mean_metrics, to_device
from minitune.training.optimizer import Optimizer
from minitune.training.penalty import Penalty
from minitune.training.schedule import rate_factor
from minitune.training.state import Progress, checkpoints, save_best, save_checkpoint


@dataclass
class Job:
    """All that a run needs; `fit` changes the model, the optimiser and the progress.

    `stream(start)` yields micro-batches from number `start` on; `validation()` yields the validation batches,
    None where there are none; `sample()` answers the sample prompts. `guessing` is the loss of a model that knows
    nothing; with infinity no loss counts as divergence.
    """

    config: TrainConfig
    model: Transformer
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    objective: Objective
    stream: Callable[[int], Iterable[Batch]]
    total_batches: int
    validation: Callable[[], Iterable[Batch]] | None
    sample: Callable[[], list[dict[str, str]]]
    checkpoints: Path
    fingerprint: dict[str, Any]
    progress: Progress
    journal: Journal
    guessing: float = math.inf
    penalty: Penalty | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; the last window may be shorter."""
        return math.ceil(self.total_batches / self.config.accumulation_steps)


class StopSignal:
    """SIGTERM and SIGINT turned into a wish to stop; a second SIGINT interrupts at once. A context manager."""

    number: int | None = None

    def __enter__(self) -> "StopSignal":
        """Take over both signals; outside the main thread Python hears none, and none is taken."""
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        self.before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        """Give them back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Tell whether a signal has come."""
        return self.number is not None

    def _receive(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def fit(job: Job, stopped: Callable[[], bool] = lambda: False) -> str:
    """Train from `job.progress` to the end; returns "finished", "no improvement" or "stopped".

    Between any two micro-batches `stopped()` is asked; when true, the state is saved and the loop left.

    Raises:
        TrainingError: the loss or a gradient is not finite, or the run diverges. Nothing is saved then.
    """
    progress, batches = job.progress, iter(job.stream(job.progress.batches))
    job.model.train()
    while True:
        if progress.micro == 0 and not stopped():
            verdict = _between_steps(job, stopped)
            if verdict:
                return verdict
        if stopped():
            _save(job)
            return "stopped"
        began = time.monotonic()
        _accumulate(job, next(batches))
        whole = progress.micro == job.config.accumulation_steps or progress.batches == job.total_batches
        line = _update(job) if whole else {}
        progress.seconds += time.monotonic() - began
        if whole:
            _record(job, line)


def _between_steps(job: Job, stopped: Callable[[], bool]) -> str | None:
    """Evaluate and save where it is due; return why the run ends here, if it does."""
    progress, config = job.progress, job.config
    done = progress.step == job.total_steps
    every = config.evaluation.every_steps or max(1, round(job.total_steps / 5))
    if job.validation and (done or progress.step % every == 0) and not _evaluated(progress):
        if not _evaluate(job, stopped):
            return None
    tired = _tired(progress, config.evaluation.patience)
    every = config.checkpoint.every_steps or min(200, max(1, round(job.total_steps / 10)))
    if done or tired or (progress.step and progress.step % every == 0):
        _save(job)
    if tired:
        job.journal.say(f"step {progress.step}: no better loss in evaluation.patience evaluations; stopping here")
    return "finished" if done else "no improvement" if tired else None


def _accumulate(job: Job, batch: Batch) -> None:
    """Add the gradient of one micro-batch's summed loss."""
    progress = job.progress
    batch = to_device(batch, job.model.device)
    loss_sum, weight, metrics = job.objective(job.model, batch)
    value = float(loss_sum.detach())
    if not math.isfinite(value):
        where = watch.bad_weight(job.model) or watch.bad_activation(job.model, batch) or "the loss alone"
        raise _not_finite(job, f"the loss is {value}", where)
    if job.config.fused_backward:
        job.optimizer.begin(weight, _rate(job))
    loss_sum.backward()
    progress.window_loss += value
    progress.window_weight += weight
    progress.tokens += int((batch.positions > 0).sum()) + batch.document_count  # padding is at position 0
    progress.target_tokens += batch.target_count
    add_metrics(progress.window_metrics, metrics)
    progress.micro += 1
    progress.batches += 1


def _update(job: Job) -> dict[str, float]:
    """Close the window: one optimiser step with the gradient per target token; returns its metrics."""
    progress = job.progress
    weight = progress.window_weight
    price = {} if job.penalty is None else {"penalty": job.penalty.add(weight)}
    norm = job.optimizer.average(weight)
    if not math.isfinite(norm):
        where = watch.bad_gradient(job.parameters) or "the gradients' norm alone"
        raise _not_finite(job, f"the gradient norm is {norm}", where)
    rate = _rate(job)
    job.optimizer.clip(norm)
    job.optimizer.step(rate)
    metrics = mean_metrics(progress.window_metrics) | price
    metrics |= {"loss": progress.window_loss / weight, "learning_rate": rate, "grad_norm": norm}
    progress.step += 1
    progress.since_loss += progress.window_loss
    progress.since_weight += weight
    progress.micro, progress.window_loss, progress.window_weight, progress.window_metrics = 0, 0.0, 0, {}
    return metrics


def _rate(job: Job) -> float:
    """Return the learning rate of this step."""
    factor = rate_factor(job.progress.step, job.total_steps, job.config.schedule)
    return job.config.optimizer.learning_rate * factor


def _record(job: Job, metrics: dict[str, float]) -> None:
    """Write a step's line; stop a run whose loss is worse than guessing for several steps after it was better."""
    progress = job.progress
    speed = {
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "target_tokens": progress.target_tokens,
        "target_tokens_per_second": progress.target_tokens / progress.seconds,
        "seconds": progress.seconds,
        "peak_rss_mb": peak_memory_mb(),
    }
    job.journal.step({"step": progress.step, **metrics, **speed})
    progress.high_losses, progress.started_low = watch.divergence(
        metrics["loss"], job.guessing, progress.high_losses, progress.started_low
    )
    if progress.high_losses >= watch.PATIENCE:
        raise TrainingError(
            f"step {progress.step}: the run diverged: the loss is {metrics['loss']:.2f}, worse than guessing, for "
            f"{watch.PATIENCE} steps; lower optimizer.learning_rate ({job.config.optimizer.learning_rate:g}), a "
            f"third is a good try{_kept(job)}"
        )


def _evaluate(job: Job, stopped: Callable[[], bool]) -> bool:
    """Measure the validation loss, answer the samples, keep the best weights; False when stopped meanwhile."""
    progress = job.progress
    device = job.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        measured = validation_loss(job.model, job.validation(), job.objective, stopped)
        if measured is None:
            return False
        loss, metrics, rows = measured
        samples = job.sample()
    training = progress.since_loss / progress.since_weight if progress.since_weight else None
    progress.since_loss, progress.since_weight = 0.0, 0
    line = {"step": progress.step, "validation_loss": loss, "training_loss": training}
    line |= {f"validation_{name}": value for name, value in metrics.items()}
    progress.evaluations.append(line)
    job.journal.evaluation({**line, "samples": samples})
    if progress.step and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        save_best(job.checkpoints, job.parameters, progress.step)
    if progress.step in (0, progress.best_step):
        job.journal.rows(progress.step, rows)
    for warning in watch.preferences(progress.evaluations[0], line):
        job.journal.say(f"step {progress.step}: {warning}")
    parted = watch.overfitting(progress.evaluations)
    if parted:
        job.journal.say(
            f"over-fitting: since step {parted['step']} the validation loss has risen from "
            f"{parted['validation_loss']:.4f} to {loss:.4f} while the training loss fell from "
            f"{parted['training_loss']:.4f} to {training:.4f}; the weights of step {parted['step']} are kept as best"
        )
    return True


def _tired(progress: Progress, patience: int | None) -> bool:
    """Tell whether the last `patience` evaluations, this one included, were all worse than the best."""
    if patience is None or progress.best_step is None or not _evaluated(progress):
        return False
    return sum(evaluation["step"] > progress.best_step for evaluation in progress.evaluations) >= patience


def _evaluated(progress: Progress) -> bool:
    """Tell whether this very step has been evaluated."""
    return bool(progress.evaluations) and progress.evaluations[-1]["step"] == progress.step


def _save(job: Job) -> None:
    """Write a checkpoint of this moment."""
    keep = job.config.checkpoint.keep
    save_checkpoint(job.checkpoints, job.parameters, job.optimizer, job.progress, job.fingerprint, keep)


def _not_finite(job: Job, what: str, where: str) -> TrainingError:
    """Return the error for a number that is none, with the step and the first tensor at fault."""
    rate = job.config.optimizer.learning_rate
    return TrainingError(
        f"step {job.progress.step + 1}: {what}; first bad tensor: {where}; "
        f"lower optimizer.learning_rate ({rate:g}) or check the base model's weights{_kept(job)}"
    )


def _kept(job: Job) -> str:
    """Say what is left of the run, the last checkpoint is untouched, and how to begin again in its folder."""
    folders = checkpoints(job.checkpoints)
    left = f"the last good checkpoint is {folders[-1]}" if folders else "no checkpoint was written yet"
    return f"; {left}; to begin again in {job.checkpoints.parent}, add --overwrite"
