"""Plans, packing and tensors, against definitions computed the slow way."""

import time
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.batching import collate, efficiency, mix, mixed_counts, plan_batches, shuffled
from minitune.data.examples import Example
from minitune.errors import ConfigError

LENGTHS = st.lists(st.integers(2, 40), max_size=60)


def example(length, start=1, origin="rows:1"):
    """Return an example of `length` different ids from `start` on, every other one a target."""
    targets = [False] + [i % 2 == 0 for i in range(1, length)]
    return Example(tuple(range(start, start + length)), tuple(targets), origin)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_every_example_once_and_no_row_over_length(lengths, packing, batch_size, seed, epoch):
    options = {"batch_size": batch_size, "max_length": 40, "packing": packing, "seed": seed}
    plan = plan_batches(lengths, epoch=epoch, **options)
    rows = [row for batch in plan for row in batch]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert sum(len(batch) < batch_size for batch in plan) <= 1
    assert packing or all(len(row) == 1 for row in rows)
    assert plan == plan_batches(lengths, epoch=epoch, **options)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_packing_leaves_no_two_rows_that_fit_in_one(lengths):
    plan = plan_batches(lengths, batch_size=1, max_length=40, packing=True, seed=0, epoch=0)
    sums = [sum(lengths[i] for i in batch[0]) for batch in plan]
    assert all(one + other > 40 for one, other in combinations(sums, 2))


def test_best_fit_takes_the_fullest_row():
    # 6 and 5 open a row each; 4 fits both and fills that of 6; 3 and 2 then fill that of 5. Worst-fit puts 4
    # beside 5 and 3 beside 6, which leaves no room for 2; in the order given, 2 and 3 would share a row.
    plan = plan_batches([2, 3, 4, 5, 6], batch_size=1, max_length=10, packing=True, seed=3, epoch=0)
    assert sorted(sorted(batch[0]) for batch in plan) == [[0, 1, 3], [2, 4]]


def test_packing_is_fast_and_full():
    draws = shuffled(1000, "lengths")
    lengths = [5 + draws[i % 1000] for i in range(100_000)]
    start = time.perf_counter()
    plan = plan_batches(lengths, batch_size=8, max_length=2048, packing=True, seed=0, epoch=0)
    assert time.perf_counter() - start < 5  # 0.6 s on a loaded core
    assert sum(map(len, plan)) <= 1.01 * sum(lengths) / 2048 + 1
    assert efficiency(plan, lengths) > 0.98


def test_a_half_empty_row_does_not_widen_a_batch_of_its_like():
    # Six documents of 6 tokens pack into no row of 10 together; four of 5 pack in pairs: rows of 6 and of 10.
    plan = plan_batches([6] * 6 + [5] * 4, batch_size=2, max_length=10, packing=True, seed=0, epoch=0)
    assert efficiency(plan, [6] * 6 + [5] * 4) == 1


def test_sorted_batches_waste_little():
    lengths = [5 + i for i in shuffled(1000, "lengths")]
    plan = plan_batches(lengths, batch_size=8, max_length=2048, packing=False, seed=0, epoch=0)
    unsorted = [[[i] for i in range(at, at + 8)] for at in range(0, 1000, 8)]
    assert efficiency(plan, lengths) > 0.95 > 0.7 > efficiency(unsorted, lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_order_depends_on_seed_and_epoch_alone(packing):
    lengths = [2 + i % 30 for i in range(200)]
    options = {"batch_size": 4, "max_length": 32, "packing": packing}
    plans = [plan_batches(lengths, seed=s, epoch=e, **options) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]
    assert plans[0] == plan_batches(list(lengths), seed=0, epoch=0, **options)


@pytest.mark.parametrize("packing", [True, False])
def test_other_rows_meet_in_another_epoch(packing):
    plans = [
        plan_batches([8] * 400, batch_size=4, max_length=32, packing=packing, seed=0, epoch=epoch) for epoch in (0, 1)
    ]
    meetings = [{frozenset(sum(batch, [])) for batch in plan} for plan in plans]
    assert len(meetings[0] & meetings[1]) < len(plans[0]) / 10


def test_shuffle_is_the_same_everywhere():
    # From the definition: sort by random.Random(blake2b(repr(key))), whose sequence Python promises to keep.
    import hashlib
    import random

    digest = hashlib.blake2b(b"(7, 1, 'rows')", digest_size=16).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    marks = [generator.random() for _ in range(10)]
    assert shuffled(10, 7, 1, "rows") == [i for _, i in sorted(zip(marks, range(10), strict=True))]


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match="an example of 9 tokens is over max_length 8"):
        plan_batches([3, 9], batch_size=1, max_length=8, packing=True, seed=0, epoch=0)
    with pytest.raises(ConfigError, match="batch_size 0"):
        plan_batches([3], batch_size=0, max_length=8, packing=True, seed=0, epoch=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from([0, 3]))
def test_collate_is_the_documents_laid_end_to_end(row_lengths, pad_id):
    start, rows = 1, []
    for row in row_lengths:
        rows.append([example(length, start + 20 * i) for i, length in enumerate(row)])
        start += 200
    batch = collate(rows, pad_id)
    width = next(w for w in range(32, 10_000, 32) if w >= max(sum(row) for row in row_lengths))
    assert batch.ids.shape == batch.targets.shape == batch.positions.shape == (len(rows), width)
    learned = 0
    for b, row in enumerate(rows):
        at = 0
        for document in row:
            for i in range(len(document.ids)):
                last = i == len(document.ids) - 1
                due = -100 if last or not document.targets[i + 1] else document.ids[i + 1]
                learned += due != -100
                assert batch.ids[b, at + i] == document.ids[i]
                assert batch.positions[b, at + i] == i
                assert batch.targets[b, at + i] == due
            at += len(document.ids)
        assert (batch.ids[b, at:] == pad_id).all()
        assert (batch.targets[b, at:] == -100).all()
        assert (batch.positions[b, at:] == 0).all()
    assert batch.target_count == learned
    assert batch.document_count == sum(map(len, row_lengths))


def test_a_target_with_the_padding_id_is_still_learned():
    batch = collate([[Example((5, 6, 0), (False, True, True), "a")], [example(6)]], pad_id=0)
    assert batch.targets[0].tolist() == [6, 0] + [-100] * 30
    assert batch.target_count == 2 + 2


def sources(*sizes):
    """Return one source for each size, its examples named by source and row."""
    return [[example(2, origin=f"{s}:{i}") for i in range(size)] for s, size in enumerate(sizes)]


def test_without_weights_every_row_comes_once():
    parts = sources(5, 3)
    mixed = mix([(part, None) for part in parts], seed=0)
    assert sorted(e.origin for e in mixed) == sorted(e.origin for part in parts for e in part)


def test_weights_are_shares_of_an_epoch():
    assert mixed_counts([900, 100], [1, 1]) == [500, 500]
    assert mixed_counts([10, 10, 10], [1, 1, 2]) == [8, 7, 15] or mixed_counts([10, 10, 10], [1, 1, 2]) == [7, 8, 15]
    assert mixed_counts([7, 3], [7, 3]) == [7, 3]
    assert sum(mixed_counts([101, 57, 3], [0.1, 0.2, 0.3])) == 161


def test_over_the_epochs_every_row_of_a_source_comes_equally_often():
    parts = sources(9, 3)
    weighted = list(zip(parts, (1, 2), strict=True))  # 4 of 9 and 8 of 3 in each epoch of 12
    epochs = [[e.origin for e in mix(weighted, seed=5, epoch=epoch)] for epoch in range(9)]
    assert all(sum(name.startswith("0:") for name in epoch) == 4 for epoch in epochs)
    assert all(len(epoch) == 12 for epoch in epochs)
    for epoch in epochs:  # over-sampling spreads evenly within an epoch too: 8 of 3 rows is 2 or 3 (or 4) each
        counts = Counter(name for name in epoch if name.startswith("1:"))
        assert len(counts) == 3 and max(counts.values()) <= 4
    seen = Counter(name for epoch in epochs for name in epoch)
    assert {seen[f"0:{i}"] for i in range(9)} == {4}
    assert {seen[f"1:{i}"] for i in range(3)} == {24}
    assert epochs[0] == [e.origin for e in mix(weighted, seed=5)]
    assert epochs[0] != [e.origin for e in mix(weighted, seed=6)]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), None])
def test_weights_must_be_above_zero(weight):
    with pytest.raises(ConfigError, match="weight .* of data source 2: must be a number above 0"):
        mix(list(zip(sources(2, 2), (1, weight), strict=True)), seed=0)
