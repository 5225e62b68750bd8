"""Objectives over preferences: a batch of pairs or judged answers -> (summed loss, number of them, metrics).

The log-probability of an answer is the sum of `linear_cross_entropy` over its target tokens, so the logits over the
vocabulary never exist whole. The reference is the same model with its adapter off, or log-probabilities that came with
the batch (`reference.py`). A second model in memory was rejected: it doubles the weights to hold the same numbers.
"""

import math

import torch

from minitune.data.batching import PreferenceBatch
from minitune.losses import preference as losses
from minitune.model.lora import adapter_disabled
from minitune.model.transformer import Transformer
from minitune.ops.cross_entropy import linear_cross_entropy
from minitune.training.config import REFERENCED, PreferenceOptions
from minitune.training.objectives import Metrics, Objective, final_hidden


def answer_log_probabilities(model: Transformer, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each document's log p of its targets, summed, (documents,) fp32 in nats, and their number (documents,)."""
    hidden, chosen = final_hidden(model, batch), batch.targets >= 0
    token_losses = linear_cross_entropy(
        hidden[chosen], model.head_weight, batch.targets[chosen], softcap=model.config.logits_softcap
    )
    counts = torch.bincount(batch.owners[chosen], minlength=batch.document_count)
    # Documents lie in the order of their numbers, so their tokens do: sums of slices, the same whatever lies beside.
    sums = torch.stack([-part.sum() for part in token_losses.split(counts.tolist())])
    return sums, counts


def reference_log_probabilities(model: Transformer, batch: PreferenceBatch) -> torch.Tensor:
    """Return what the reference gives each document, (documents,): from the batch, or by the model without adapter."""
    if batch.reference is not None:
        return batch.reference
    with torch.no_grad(), adapter_disabled(model):
        return answer_log_probabilities(model, batch)[0]


def preference_objective(kind: str, options: PreferenceOptions) -> Objective:
    """Return the objective of a name in `config.OBJECTIVES` other than sft, with resolved options."""
    if kind == "reward":
        return _reward
    if kind == "kto":
        return lambda model, batch: _kto(model, batch, options)
    return lambda model, batch: _pairs(model, batch, kind, options)


def undecided_loss(kind: str, options: PreferenceOptions, vocab_size: int) -> float:
    """Return the loss of a model that prefers no answer and, where answers are learned too, knows no token.

    Infinity for ipo, whose square grows with the spread of sound margins, and for cpo, whose margins are of whole sums.
    """
    if kind in ("ipo", "cpo"):
        return math.inf
    zero, beta = torch.zeros(1), options.beta
    by_kind = {
        "hinge": lambda: losses.hinge_loss(zero, beta),
        "kto": lambda: 0.5 * max(options.desirable_weight, options.undesirable_weight) * torch.ones(1),
        "simpo": lambda: losses.simpo_loss(zero, zero, beta, options.gamma),
        "orpo": lambda: beta * losses.odds_ratio_loss(zero - 1, zero - 1),
    }
    undecided = float(by_kind.get(kind, lambda: losses.bradley_terry_loss(zero, zero))())  # ln 2 for all the others
    return undecided + (options.sft_weight or 0.0) * math.log(vocab_size)


def _pairs(model, batch, kind: str, options: PreferenceOptions):
    sums, counts = answer_log_probabilities(model, batch)
    means = sums / counts
    referenced = kind in REFERENCED
    ratios = sums - reference_log_probabilities(model, batch) if referenced else sums
    measured = ratios / counts if options.length_normalized else means if kind in ("simpo", "orpo") else ratios
    chosen, rejected = measured[::2], measured[1::2]
    margin, beta = chosen - rejected, options.beta
    if kind in ("dpo", "cpo"):
        loss = losses.dpo_loss(margin, beta, options.label_smoothing)
    elif kind == "robust":
        loss = losses.robust_dpo_loss(margin, beta, options.label_smoothing)
    elif kind == "ipo":
        loss = losses.ipo_loss(margin, beta)
    elif kind == "hinge":
        loss = losses.hinge_loss(margin, beta)
    elif kind == "simpo":
        loss = losses.simpo_loss(chosen, rejected, beta, options.gamma)
    else:
        loss = beta * losses.odds_ratio_loss(means[::2], means[1::2])
    if options.sft_weight:
        loss = loss - options.sft_weight * means[::2]
    metrics = _side_metrics(beta * measured, sums, counts)
    if referenced:
        metrics["kl"] = _total(ratios)
    return loss.sum(), len(loss), metrics


def _kto(model, batch, options: PreferenceOptions):
    sums, counts = answer_log_probabilities(model, batch)
    ratios = sums - reference_log_probabilities(model, batch)
    with torch.no_grad():
        others = answer_log_probabilities(model, batch.mismatched)[0]
        others -= reference_log_probabilities(model, batch.mismatched)
    baseline = losses.kto_baseline(others)
    weights = options.desirable_weight, options.undesirable_weight
    loss = losses.kto_loss(ratios, batch.desirable, baseline, options.beta, *weights)
    metrics = {"kl": (float(baseline) * len(loss), len(loss))}
    for name, side in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
        metrics |= _one_side(name, options.beta * ratios[side], sums[side], counts[side])
    return loss.sum(), len(loss), metrics


def _reward(model, batch):
    hidden = final_hidden(model, batch)
    rewards = model.rewards(hidden[batch.ends[:, 0], batch.ends[:, 1]])  # (documents,)
    loss = losses.bradley_terry_loss(rewards[::2], rewards[1::2], batch.margins)
    lengths = torch.bincount(batch.owners[batch.targets >= 0], minlength=batch.document_count)
    metrics = _side_metrics(rewards, None, lengths)
    return loss.sum(), len(loss), metrics


def _total(values: torch.Tensor) -> tuple[float, int]:
    return float(values.detach().sum()), len(values)


def _one_side(name: str, rewards, sums, lengths) -> Metrics:
    """Return a side's mean reward, log-probability (of an answer, in nats) and length (in target tokens)."""
    metrics = {f"{name}_reward": _total(rewards), f"{name}_length": _total(lengths)}
    return metrics if sums is None else metrics | {f"{name}_log_probability": _total(sums)}


def _side_metrics(rewards, sums, lengths) -> Metrics:
    """Return what pairs are watched by; `rewards` (2 P,) alternates chosen and rejected, as all else does.

    The accuracy is also taken apart by which side is longer: one that lives on longer answers alone has learned length.
    """
    metrics: Metrics = {}
    for name, part in (("chosen", slice(0, None, 2)), ("rejected", slice(1, None, 2))):
        metrics |= _one_side(name, rewards[part], None if sums is None else sums[part], lengths[part])
    margin, longer = (rewards[::2] - rewards[1::2]).detach(), lengths[::2] - lengths[1::2]
    right = (margin > 0).float()
    metrics |= {"margin": _total(margin), "accuracy": _total(right)}
    metrics |= {
        "accuracy_chosen_longer": _total(right[longer > 0]),
        "accuracy_chosen_shorter": _total(right[longer < 0]),
    }
    if sums is not None:
        metrics["prefers_chosen"] = _total((sums[::2] > sums[1::2]).float())
    return metrics
