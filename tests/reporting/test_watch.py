"""What a loop must notice: divergence, over-fitting, and the first tensor that is no number."""

import math

import pytest
import torch

from minitune.reporting import watch


def strikes(losses, vocab_size=100):
    high, low = 0, False
    for loss in losses:
        high, low = watch.divergence(loss, math.log(vocab_size), high, low)
    return high


def test_divergence_needs_several_steps_above_the_line_after_one_below():
    line = math.log(100) + 1
    assert strikes([3.0] + [line + 0.1] * 5) == watch.PATIENCE
    assert strikes([3.0] + [line + 0.1] * 4 + [3.0]) == 0, "a spike that passes"
    assert strikes([line + 1] * 50) == 0, "a random model starts high: that is no divergence"
    assert strikes([3.0] * 50) == 0


def curve(training, validation):
    return [
        {"step": 10 * i, "training_loss": t, "validation_loss": v}
        for i, (t, v) in enumerate(zip(training, validation, strict=True))
    ]


@pytest.mark.parametrize(
    "training,validation,step",
    [
        ([None, 3.0, 2.0, 1.5, 1.0], [3.0, 2.5, 2.2, 2.3, 2.5], 20),
        ([None, 3.0, 2.0, 1.5, 1.0], [3.0, 2.5, 2.2, 2.1, 2.5], None),  # one rise is not a trend
        ([None, 3.0, 2.0, 2.1, 2.2], [3.0, 2.5, 2.2, 2.3, 2.5], None),  # both rise: something else
        ([None, 3.0, 2.0, 1.5, 1.0], [3.0, 2.5, 2.2, 2.201, 2.202], None),  # noise
        ([None, 3.0], [3.0, 2.5], None),
        ([], [], None),
    ],
)
def test_overfitting(training, validation, step):
    found = watch.overfitting(curve(training, validation))
    assert (found and found["step"]) == step


def test_gradients_are_searched_from_the_head_down():
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("first", "middle", "last")}
    assert watch.bad_gradient(parameters) is None
    for name in ("first", "middle"):
        parameters[name].grad = torch.tensor([0.0, float("inf")])
    assert watch.bad_gradient(parameters) == "gradient of middle"


def evaluation(step, **measured):
    return {"step": step} | {f"validation_{name}": value for name, value in measured.items()}


def test_chosen_answers_that_are_unlearned():
    first = evaluation(0, chosen_log_probability=-100.0, chosen_length=50.0)
    assert watch.preferences(first, evaluation(9, chosen_log_probability=-124.0, chosen_length=50.0)) == []
    (warning,) = watch.preferences(first, evaluation(9, chosen_log_probability=-130.0, chosen_length=50.0))
    assert "from -2.00 to -2.60 nats a token" in warning


@pytest.mark.parametrize("longer, shorter, said", [(0.9, 0.2, "longer"), (0.3, 0.8, "shorter"), (0.9, 0.6, None)])
def test_a_margin_that_is_length_alone(longer, shorter, said):
    first = evaluation(0, accuracy_chosen_longer=longer, accuracy_chosen_shorter=shorter)
    last = {**first, "step": 9}
    assert watch.preferences(first, first) == [], "before training there is nothing to warn of"
    warnings = watch.preferences(first, last)
    assert [f"{said} answers are being learned" in warning for warning in warnings] == ([True] if said else [])


def test_other_runs_have_no_such_warnings():
    assert watch.preferences(evaluation(0), evaluation(5)) == []
