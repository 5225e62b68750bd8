"""Schedules against closed forms written out by hand, and their corners."""

import pytest

from minitune.training.config import ScheduleConfig
from minitune.training.schedule import rate_factor


def curve(total, **options):
    schedule = ScheduleConfig(**options)
    return [rate_factor(step, total, schedule) for step in range(total)]


def test_warmup_rises_in_equal_parts_and_its_first_step_moves():
    assert curve(10, kind="constant", warmup=0.4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_linear():
    assert curve(5, kind="linear", warmup=0.0, final_ratio=0.5) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_cosine():
    # cos(pi/4) = 0.70710678; halves: (1 + c) / 2
    assert curve(4, kind="cosine", warmup=0.0) == pytest.approx([1, 0.85355339, 0.5, 0.14644661])
    assert curve(4, kind="cosine", warmup=0.0, final_ratio=0.2)[2] == pytest.approx(0.6)


def test_cosine_starts_where_warmup_ends():
    assert curve(8, kind="cosine", warmup=0.5) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.85355339, 0.5, 0.14644661]
    )  # fmt: skip


def test_wsd_is_stable_and_decays_at_the_end():
    assert curve(10, kind="wsd", warmup=0.2, decay=0.4) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_every_rate_of_every_length_is_above_zero_and_at_most_the_peak(kind, total):
    rates = curve(total, kind=kind, warmup=0.1)
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1


def test_against_the_schedules_of_transformers():
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = optimization.get_cosine_schedule_with_warmup(optimizer, 10, 50)
    theirs = []
    for _ in range(50):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # Theirs warms up from 0, ours from the first share: the same curve one step later.
    ours = curve(50, kind="cosine", warmup=0.2)
    assert ours[:10] == pytest.approx(theirs[1:11])
    assert ours[10:] == pytest.approx(theirs[10:])
