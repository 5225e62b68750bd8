"""What fits: bisection against trying all, batch and length at their very limit, and remedies in their order."""

import dataclasses
from itertools import pairwise

import pytest

from minitune.model.config import ModelConfig
from minitune.planning.devices import DEVICES, device
from minitune.planning.fit import capacities, largest, remedies
from minitune.planning.run import COMPILER, MARGIN, PROCESS, Run

CONFIG = ModelConfig(6000, 128, 320, 3, 6, 2, 22, tie_embeddings=True, max_positions=700)
RUN = Run(CONFIG, "full", 8, 256, "float32", accumulation_steps=2)


@pytest.mark.parametrize("limit", range(0, 40))
@pytest.mark.parametrize("most", [1, 2, 7, 16, 33])
def test_the_largest_is_found(limit, most):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    assert largest(fits, most) == min(limit, most)
    assert max(tried) <= most and len(tried) <= 12


@pytest.mark.parametrize("cpu", [True, False])
def test_one_more_would_not_fit(cpu):
    memory = 120e6 + (PROCESS + 35e6 if cpu else 0)
    found = {one.method: one for one in capacities(RUN, memory, cpu=cpu)}
    one = found["lora"]
    run = dataclasses.replace(RUN, method="lora")
    needed = [dataclasses.replace(run, batch_size=one.batch + more).needed(cpu) for more in (0, 1)]
    assert needed[0] <= memory < needed[1]
    longer = [dataclasses.replace(run, length=one.length + more).needed(cpu) for more in (0, 1)]
    assert longer[0] <= memory and (longer[1] > memory or one.length == CONFIG.longest)
    if not cpu:  # there torch's compiler, which comes with it, outweighs what a model of this size saves
        assert found["lora, checkpointing"].batch > one.batch
    assert found["qlora"].needed < one.needed < found["full"].needed
    assert all(each.length <= CONFIG.longest for each in found.values())


def test_no_memory_fits_nothing():
    assert all(one.batch == one.length == 0 for one in capacities(RUN, 1e6, cpu=False))


def test_remedies_are_tried_in_order_until_it_fits():
    assert remedies(RUN, RUN.needed(False), cpu=False) == []
    every = remedies(RUN, 1, cpu=False)
    order = ["batch_size", "gradient_checkpointing", "optimizer.paged", "dtype", "optimizer adamw8bit",
             "fused_backward", "method lora", "method qlora", "max_length"]  # fmt: skip
    at = [next(place for place, name in enumerate(order) if f"--{name}" in one.change) for one in every]
    assert at == sorted(at) and len(set(at)) > 5
    assert all(before.needed > after.needed for before, after in pairwise(every))
    assert 2 in at and not any("paged" in one.change for one in remedies(RUN, 1, cpu=True))
    enough = remedies(RUN, every[2].needed, cpu=False)
    assert enough == every[:3]


def test_the_first_remedy_keeps_the_step():
    first = remedies(RUN, 1, cpu=False)[0]
    assert "--batch_size 1 --accumulation_steps 16" in first.change
    assert RUN.step_tokens == dataclasses.replace(RUN, batch_size=1, accumulation_steps=16).step_tokens


def test_a_change_that_saves_nothing_is_not_made():
    """One row a step has no earlier gradients to keep; two micro-batches of one row have."""
    run = dataclasses.replace(RUN, batch_size=2, length=1, accumulation_steps=1)
    halved = dataclasses.replace(run, batch_size=1, accumulation_steps=2)
    assert halved.needed(False) > run.needed(False)
    first = remedies(run, 1, cpu=False)[0]
    assert "--batch_size" not in first.change and first.needed < run.needed(False)


def test_paged_moments_cross_the_bus_and_are_in_memory_on_a_cpu():
    paged, moments = dataclasses.replace(RUN, paged=True), RUN.ledger().optimizer
    before, after = (run.step_seconds(device("H100-SXM")) for run in (RUN, paged))
    assert after[0] - before[0] == pytest.approx(after[1] - before[1]) == pytest.approx(2 * moments / 25e9)
    here = device("CPU-2-cores")
    assert paged.step_seconds(here) == RUN.step_seconds(here)
    assert paged.needed(True) == RUN.needed(True) and paged.needed(False) < RUN.needed(False)


@pytest.mark.parametrize("packing,rows", [(True, (4, 200)), (False, (8, 100))])
def test_sides_of_a_pair_lie_in_one_row_where_rows_are_packed(packing, rows):
    run = Run(CONFIG, "lora", 4, 100, packing=packing, documents=2)
    assert run.rows == rows and run.step_tokens == 800


def test_what_is_needed_says_what_is_not_the_tensors():
    counted = RUN.ledger()
    assert RUN.needed(True) == counted.total + counted.allocator + counted.library + PROCESS
    assert RUN.needed(False) == int(counted.total * MARGIN)
    lean = dataclasses.replace(RUN, gradient_checkpointing=True)
    assert lean.needed(True) == lean.ledger().resident + PROCESS + COMPILER


@pytest.mark.parametrize("one", DEVICES, ids=lambda one: one.name)
def test_seconds_are_operations_over_the_rate_and_bytes_over_the_bandwidth(one):
    low, high = RUN.step_seconds(one)
    (least, most), counted = one.shares("float32"), RUN.ledger()
    update = 2 * (counted.optimizer + counted.gradients + counted.weights) / one.bandwidth
    assert low == pytest.approx(RUN.flops() / one.float32 / most + update)
    assert high == pytest.approx(RUN.flops() / one.float32 / least + update)


def test_a_larger_share_of_a_faster_device_is_quicker():
    run = dataclasses.replace(RUN, dtype="bfloat16")
    assert run.step_seconds(device("H100-SXM"))[1] < run.step_seconds(device("L4"))[0]
