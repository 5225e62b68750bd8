"""Why a run came out as it did: rules over its files, each a function of a Run -> Finding or None; the first named is
the likeliest. Rules of the data are in `diagnosis_data`; these are of how the run ended, its course, its result.

A course is judged from the base's validation loss, or that of the first step if it was higher, to the median of the
last fifth of the steps, since single steps are single batches. Thresholds and their reasons:

    RISE 1.05       validation may wander by 1% (`watch.MARGIN`); 5% above the best is a turn
    GIVEN_BACK 0.02 and gives back a fiftieth of what was gained: where a loss fell from 4 to 0.1, 0.12 is no harm
    FLAT 0.02       a fall below 2% is within what other batches give
    THROWN 1.15     training loss 15% above its start: no batch order does that to a model that was left in its basin
    STILL 1e-3      trained weights that moved by less than a thousandth of themselves have not been trained; an
                    adapter moves by a tenth, a model that trains whole by a hundredth
    CLIPPED 10      half of the steps' gradients are over ten times the limit: the limit and not the gradient decides
                    the step, which AdamW makes up for and SGD does not
    FORGOTTEN 1.2   perplexity of general text up by a fifth is forgetting, by a twentieth worth a note: the bounds of
                    `minitune.evaluate --general`
    FULL 0.9        of the machine's memory in use when the run was last heard of
    FEW_STEPS 10    a rate that warms up and decays within fewer has hardly moved anything
    LONE 8          targets in a step, below which the gradient is mostly that of single words
Rejected: a model that reads the curves and writes its opinion, which could not say what it rests on.
"""

import math
from statistics import median
from typing import Any

from minitune.errors import MEMORY_KNOBS, counted
from minitune.reporting import diagnosis_data, watch
from minitune.reporting.findings import COURSE, END, NOTE, RESULT, Finding, ranked
from minitune.reporting.record import Run

RISE, FLAT, THROWN, STILL, CLIPPED, FORGOTTEN, FULL, FEW_STEPS, LONE = 1.05, 0.02, 1.15, 1e-3, 10, 1.2, 0.9, 10, 8
NOTICED, GIVEN_BACK = 1.05, 0.02
_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "MemoryError")


def diagnose(run: Run) -> list[Finding]:
    """Return what was found, the likeliest cause first; notes, which are no faults, last."""
    found = [finding for rule in (*RULES, *diagnosis_data.RULES) if (finding := rule(run))]
    return sorted(found, key=lambda finding: -finding.strength)


def losses(run: Run) -> tuple[float, float] | None:
    """Return the loss at the start and the training loss at the end; None of a run under five steps."""
    values = [step["loss"] for step in run.steps]
    if len(values) < 5:
        return None
    return max(values[0], run.base_loss or 0), median(values[-max(3, len(values) // 5) :])


def is_flat(run: Run) -> bool:
    """Tell whether neither training nor validation loss fell by more than noise."""
    found = losses(run)
    base, best = run.base_loss, run.best
    if best is not None and base:
        return best["validation_loss"] > base * (1 - FLAT)
    return found is not None and found[1] > found[0] * (1 - FLAT)


def _rate(run: Run) -> float:
    return run.options["optimizer"].get("learning_rate") or math.nan


def _again(run: Run) -> str:
    return f"python -m minitune.train --output {run.folder} --resume"


def failure(run: Run) -> Finding | None:
    """A run that stopped with an error, by what it said."""
    if run.outcome.get("status") != "failed":
        return None
    error = run.outcome.get("error", "")
    thrown = losses(run)
    kinds = {
        "divergence": (("the run diverged",), f"lower optimizer.learning_rate ({_rate(run):g}), a third is a good try"),
        "numbers that are none": (("the loss is", "gradient norm is"), "where a weight is at fault, the base is "
                                  "damaged: fetch it again; else lower optimizer.learning_rate, or use dtype float32"),
        "out of memory": (_MEMORY, MEMORY_KNOBS),
        "disk full": (("No space left", "Errno 28"), f"free some space, then go on with: {_again(run)}"),
    }  # fmt: skip
    if any(mark in error for mark in kinds["numbers that are none"][0]) and thrown and thrown[1] > thrown[0] * THROWN:
        remedy = kinds["divergence"][1]
        evidence = f"outcome.json: {error}; before, the training loss rose from {thrown[0]:.3f} to {thrown[1]:.3f}"
        return Finding("divergence", evidence, remedy, ranked(END))
    for name, (marks, remedy) in kinds.items():
        if any(mark in error for mark in marks):
            return Finding(name, f"outcome.json: {error}", remedy, ranked(END))
    remedy = f"see to what the error names, then go on with: {_again(run)}"
    return Finding("the run failed", f"outcome.json: {error}", remedy, ranked(END))


def interruption(run: Run) -> Finding | None:
    """A run that was stopped, or ended without a word."""
    last = run.steps[-1] if run.steps else {"step": 0}
    steps = counted(last["step"], "step")
    if run.running:
        remedy = "wait for its end; what is said here is of the beginning"
        return Finding("the run still goes on", f"metrics.jsonl: {steps} so far", remedy, ranked(NOTE))
    if run.outcome.get("status") == "stopped":
        where = f"outcome.json: stopped by signal {run.outcome.get('signal')} after {steps}, with its state saved"
        return Finding("the run was stopped", where, f"go on with: {_again(run)}", ranked(END))
    old = not run.facts and (run.folder / "report.md").is_file()  # a finished run of an older version
    if run.outcome or old:
        return None
    memory, used = run.environment.get("memory_mb"), last.get("peak_rss_mb", 0)
    if memory and used >= FULL * memory:
        evidence = f"metrics.jsonl: {used:,.0f} MB of {memory:,.0f} MB were in use at step {last['step']}, then nothing"
        return Finding("killed for its memory", evidence, f"{MEMORY_KNOBS}; then start again", ranked(END))
    evidence = f"metrics.jsonl ends after {steps}, and there is no outcome.json: it was killed, or the machine went"
    return Finding("the run was killed", evidence, f"go on with: {_again(run)}", ranked(END))


def rate_too_high(run: Run) -> Finding | None:
    """Training loss that ends above its start, or was thrown far above it."""
    found = losses(run)
    if not found or run.outcome.get("status") == "failed" or run.options["objective"] != "sft":
        return None
    start, end = found
    values = [step["loss"] for step in run.steps]
    high, at = max((median(values[i : i + 3]), i) for i in range(len(values) - 2))
    if end < start * THROWN and high < start * 2:
        return None
    evidence = (
        f"metrics.jsonl: the training loss began at {start:.3f}, was {high:.3f} around step {at + 2} and ended at "
        f"{end:.3f}, with a peak rate of {_rate(run):g}"
    )
    if end < start and at < len(values) / 5 and run.options.get("schedule", {}).get("warmup") == 0:
        remedy = "set schedule.warmup (0.05 is the default), so that the first steps are small ones"
        return Finding("no warm-up", evidence, remedy, ranked(COURSE, 0.9))
    remedy = f"lower optimizer.learning_rate from {_rate(run):g}, to a third or a tenth"
    return Finding("learning rate too high", evidence, remedy, ranked(COURSE, 0.9))


def nothing_trained(run: Run) -> Finding | None:
    """A loss that stays where it was because the weights did."""
    movement = run.outcome.get("movement")
    if not movement or not run.steps or not is_flat(run):
        return None
    share = movement["update"] / max(movement["weight"], 1e-30)
    if share >= STILL:
        return None
    limit = run.options["optimizer"].get("max_grad_norm")
    norms = [step["grad_norm"] for step in run.steps]
    moved = f"outcome.json: the trained weights moved by {share:.1g} of themselves in {counted(len(norms), 'step')}"
    if max(norms) == 0:
        remedy = "the loss does not depend on what trains: choose other modules or parameters (method, pattern)"
        return Finding("nothing trained", f"metrics.jsonl: every gradient was 0; {moved}", remedy, ranked(COURSE, 1))
    if limit and run.options["optimizer"].get("kind") == "sgd" and median(norms) > CLIPPED * limit:
        evidence = f"metrics.jsonl: half of the gradient norms were over {median(norms):.3g}, cut to {limit:g}; {moved}"
        return Finding("clipped at every step", evidence, "raise optimizer.max_grad_norm to 1", ranked(COURSE, 1))
    evidence = f"{moved}, at a peak rate of {_rate(run):g}; the loss stayed where it was"
    remedy = (
        "raise optimizer.learning_rate tenfold; usual are 1e-4 to 5e-4 for adapters and 1e-5 to 5e-5 for all weights"
    )
    return Finding("learning rate too low", evidence, remedy, ranked(COURSE, 1))


def few_steps(run: Run) -> Finding | None:
    """A run that was over before it began, or saw little of its data."""
    if run.outcome.get("status") not in ("finished", None) or not run.steps:
        return None
    last = run.steps[-1]
    seen = last["tokens"] / max(run.data.get("tokens") or last["tokens"], 1)
    remedy = "raise max_steps, or give epochs instead; lower accumulation_steps gives more steps of the same rows"
    if last["step"] < FEW_STEPS:
        return Finding("too few steps", f"metrics.jsonl: {counted(last['step'], 'step')}", remedy, ranked(COURSE, 0.8))
    if seen < 0.5:
        evidence = f"metrics.jsonl: {last['step']} steps saw {last['tokens']:,} of {run.data['tokens']:,} tokens"
        return Finding("too few steps", evidence, remedy, ranked(COURSE, 0.2))
    return None


def small_steps(run: Run) -> Finding | None:
    """Steps of a handful of targets."""
    if len(run.steps) < FEW_STEPS or run.options["objective"] != "sft":
        return None
    each = run.steps[-1]["target_tokens"] / run.steps[-1]["step"]
    if each >= LONE:
        return None
    return Finding(
        "batch too small",
        f"metrics.jsonl: {each:.1f} target tokens a step; the loss of a step says little and its gradient wanders",
        "raise accumulation_steps (or batch_size), so that a step has some dozens of targets",
        ranked(COURSE, 0.1),
    )


def overfitting(run: Run) -> Finding | None:
    """Validation loss that rises while the training loss falls."""
    parted = watch.overfitting(run.evaluations)
    if not parted:
        return None
    last = run.evaluations[-1]
    rise = last["validation_loss"] / parted["validation_loss"]
    evidence = (
        f"metrics.jsonl: after step {parted['step']} the validation loss rose from {parted['validation_loss']:.3f} to "
        f"{last['validation_loss']:.3f}, while the training loss fell from {parted['training_loss']:.3f} to "
        f"{last['training_loss']:.3f}"
    )
    lost = last["validation_loss"] - parted["validation_loss"]
    gained = max((run.base_loss or 0) - parted["validation_loss"], 0)
    epochs = run.options.get("epochs")
    fewer = f"fewer epochs ({epochs:g} were done), " if epochs and epochs > 1 else ""
    remedy = (
        f"{fewer}more data, a lower rank or learning rate, or dropout; the weights of step {parted['step']} are kept"
    )
    alarm = rise >= RISE and lost >= GIVEN_BACK * gained
    return Finding("over-fitting", evidence, remedy, ranked(RESULT, 0.9) if alarm else ranked(NOTE, rise - 1))


def forgetting(run: Run) -> Finding | None:
    """Perplexity of general text that rose."""
    ratio, general = run.general.get("ratio") or 0, run.general
    verdicts = [(name, one["forgetting"].get("verdict")) for name, one in run.measured.items()
                if isinstance(one.get("forgetting"), dict)]  # fmt: skip
    measured = next((entry for entry in verdicts if entry[1] in ("forgotten", "slightly forgotten")), None)
    if ratio >= NOTICED:
        before, after = general["before"]["value"], general["after"]["value"]
        evidence = f"the perplexity of {general['text']} went from {before:.2f} to {after:.2f} ({ratio - 1:+.0%})"
        evidence = f"outcome.json: {evidence}"
    elif measured:
        evidence = f"evaluations/{measured[0]}.json: the verdict on general text and questions is: {measured[1]}"
    else:
        return None
    alarm = ratio >= FORGOTTEN or measured and measured[1] == "forgotten"
    return Finding(
        "forgetting",
        evidence,
        "mix general rows in (rehearsal, a fifth is usual), hold the weights to their start (penalty), lower the rate "
        "or the epochs, or train an adapter of lower rank instead of all weights",
        ranked(RESULT, 0.3 + ratio / 4) if alarm else ranked(NOTE, 0.9),
    )


def endless_answers(run: Run) -> Finding | None:
    """Sampled answers that go on where the expected one ended."""
    best = run.best
    found = [sample for sample in (best or {}).get("samples", ()) if isinstance(sample, dict) and "ended" in sample]
    limit = run.options.get("evaluation", {}).get("sample_tokens") or 0
    short = [sample for sample in found if 2 * sample["expected_tokens"] <= limit]
    endless = [sample for sample in short if not sample["ended"]]
    if run.data.get("asked", 0) < run.data.get("documents", 1) or len(short) < 2 or len(endless) < 0.6 * len(short):
        return None
    return Finding(
        "EOS never learned",
        f"metrics.jsonl: {len(endless)} of {counted(len(short), 'sampled answer')} at step {best['step']} had not "
        f"ended after {limit} tokens, where at most {max(s['expected_tokens'] for s in short)} were expected",
        "train longer; check that the model generates with the tokenizer whose end-of-turn token was trained",
        ranked(RESULT, 0.6),
    )


def no_gain(run: Run) -> Finding | None:
    """A validation loss that no step lowered."""
    base, best = run.base_loss, run.best
    if not base or not best or best["validation_loss"] < base:
        return None
    return Finding(
        "no gain",
        f"metrics.jsonl: the validation loss was {base:.4f} before training and {best['validation_loss']:.4f} at best",
        "check that training and validation rows ask and answer alike; give more rows, or fewer steps at a lower rate",
        ranked(RESULT, 0.2),
    )


def empty_base(run: Run) -> Finding | None:
    """A base that predicts no better than by chance."""
    base, guessing = run.base_loss, run.facts.get("guessing")
    if run.options["objective"] != "sft" or not base or not guessing or base < guessing:
        return None
    return Finding(
        "the base knows nothing",
        f"metrics.jsonl: its validation loss is {base:.2f}, and guessing would have {guessing:.2f} (facts.json)",
        "check that tokenizer and weights belong together, and that the weights are trained ones",
        ranked(COURSE, 0.5),
    )


def preference_warnings(run: Run) -> Finding | None:
    """What preferences are known to go wrong by."""
    best = run.best
    warnings = watch.preferences(run.evaluations[0], best) if best and run.options["objective"] != "sft" else []
    if not warnings:
        return None
    found, _, remedy = warnings[0].partition("; ")
    name = "chosen answers unlearned" if "collapsed" in found else "length learned for quality"
    return Finding(name, f"metrics.jsonl: {found}", remedy, ranked(RESULT, 0.95))


def clipping(run: Run) -> Finding | None:
    """Gradients far beyond the limit."""
    limit: Any = run.options["optimizer"].get("max_grad_norm")
    norms = [step["grad_norm"] for step in run.steps if "grad_norm" in step]
    if not limit or not norms or median(norms) < CLIPPED * limit:
        return None
    clipped = sum(norm > limit for norm in norms)
    evidence = (
        f"metrics.jsonl: {clipped} of {counted(len(norms), 'step')} were clipped, half from over {median(norms):.3g}"
    )
    return Finding("gradients clipped", f"{evidence} to {limit:g}", "see whether the loss jumps", ranked(NOTE, 0.3))


RULES = (failure, interruption, rate_too_high, nothing_trained, few_steps, small_steps, overfitting, forgetting,
         endless_answers, no_gain, empty_base, preference_warnings, clipping)  # fmt: skip
