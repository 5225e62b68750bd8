"""Batches of pairs and of judged examples, written out by hand, packed and not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data import batching
from minitune.data.batching import PreferenceBatch, collate, collate_preferences, efficiency, plan_items
from minitune.data.examples import Example
from minitune.data.preferences import Judged, Pair, with_mismatches


def example(prompt, answer, origin="rows:1"):
    """Return an example of two lists of ids."""
    return Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer), origin)


PAIRS = [
    Pair(example([1, 2], [3]), example([1, 2], [4, 5]), 0.5, (-1.0, -2.0)),
    Pair(example([6], [7, 8]), example([6], [9]), 2.0, (-3.0, -4.0)),
]
JUDGED = [
    Judged(example([1, 2], [3]), True, example([1, 2], [9, 8]), (-1.0, -2.0)),
    Judged(example([6], [7, 8]), False, example([6], [3]), (-3.0, -4.0)),
]
_ = -100


def rows(tensor, width):
    """Return the first places of each row; the rest must be padding."""
    assert tensor.shape[1] == 32
    return tensor[:, :width].tolist()


def test_unpacked_pairs_stand_in_neighbouring_rows():
    batch = collate_preferences([[pair] for pair in PAIRS], 0, packing=False)
    assert rows(batch.ids, 5) == [[1, 2, 3, 0, 0], [1, 2, 4, 5, 0], [6, 7, 8, 0, 0], [6, 9, 0, 0, 0]]
    assert rows(batch.targets, 5) == [[_, 3, _, _, _], [_, 4, 5, _, _], [7, 8, _, _, _], [9, _, _, _, _]]
    assert rows(batch.positions, 5) == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert rows(batch.owners, 5) == [[0, 0, 0, -1, -1], [1, 1, 1, 1, -1], [2, 2, 2, -1, -1], [3, 3, -1, -1, -1]]
    assert batch.ends.tolist() == [[0, 2], [1, 3], [2, 2], [3, 1]]
    assert (batch.target_count, batch.document_count) == (6, 4)
    assert batch.reference.tolist() == [-1, -2, -3, -4] and batch.reference.dtype == torch.float32
    assert batch.margins.tolist() == [0.5, 2] and batch.margins.dtype == torch.float32
    assert batch.desirable is None and batch.mismatched is None


def test_packed_pairs_lie_side_by_side():
    batch = collate_preferences([PAIRS], 0, packing=True)
    assert rows(batch.ids, 13) == [[1, 2, 3, 1, 2, 4, 5, 6, 7, 8, 6, 9, 0]]
    assert rows(batch.targets, 13) == [[_, 3, _, _, 4, 5, _, 7, 8, _, 9, _, _]]
    assert rows(batch.positions, 13) == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 0]]
    assert rows(batch.owners, 13) == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, -1]]
    assert batch.ends.tolist() == [[0, 2], [0, 6], [0, 9], [0, 11]]
    assert (batch.target_count, batch.document_count) == (6, 4)
    two_rows = collate_preferences([[pair] for pair in PAIRS], 0, packing=True)
    assert rows(two_rows.owners, 8) == [[0, 0, 0, 1, 1, 1, 1, -1], [2, 2, 2, 3, 3, -1, -1, -1]]
    assert two_rows.ends.tolist() == [[0, 2], [0, 6], [1, 2], [1, 4]]


def test_a_reference_is_there_for_all_or_for_none_and_no_margin_is_zero():
    bare = Pair(PAIRS[0].chosen, PAIRS[0].rejected)
    batch = collate_preferences([[PAIRS[1]], [bare]], 0, packing=False)
    assert batch.reference is None
    assert batch.margins.tolist() == [2, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_judged_examples_and_their_mismatched_answers(packing):
    layout = [JUDGED] if packing else [[item] for item in JUDGED]
    batch = collate_preferences(layout, 0, packing=packing)
    other = batch.mismatched
    assert batch.desirable.tolist() == [True, False] and batch.desirable.dtype == torch.bool
    assert batch.reference.tolist() == [-1, -3] and other.reference.tolist() == [-2, -4]
    if packing:
        assert rows(batch.ids, 7) == [[1, 2, 3, 6, 7, 8, 0]] and rows(other.ids, 7) == [[1, 2, 9, 8, 6, 3, 0]]
        assert rows(other.targets, 7) == [[_, 9, 8, _, 3, _, _]]
        assert rows(other.owners, 7) == [[0, 0, 0, 0, 1, 1, -1]] and other.ends.tolist() == [[0, 3], [0, 5]]
    else:
        assert rows(batch.ids, 4) == [[1, 2, 3, 0], [6, 7, 8, 0]]
        assert rows(other.ids, 4) == [[1, 2, 9, 8], [6, 3, 0, 0]]
        assert rows(other.owners, 4) == [[0, 0, 0, 0], [1, 1, -1, -1]] and other.ends.tolist() == [[0, 3], [1, 1]]
    assert (batch.target_count, other.target_count, other.document_count) == (3, 3, 2)
    assert batch.margins is None and other.mismatched is None


def test_supervised_batches_stay_as_they_were():
    batch = collate([[PAIRS[0].chosen]], 0)
    assert not isinstance(batch, PreferenceBatch)
    assert list(vars(batch)) == ["ids", "targets", "positions", "target_count", "document_count"]


LENGTHS = st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(1, 4))
def test_a_pair_is_never_split_and_fits_its_row(lengths, packing, batch_size):
    pairs = [Pair(*(example([1], [i] * (length - 1)) for length in two)) for i, two in enumerate(lengths)]
    plan = plan_items(pairs, batch_size=batch_size, max_length=20, packing=packing, seed=0, epoch=0)
    assert sorted(i for batch in plan for row in batch for i in row) == list(range(len(pairs)))
    for planned in plan:
        assert all(sum(map(sum, (lengths[i] for i in row))) <= 2 * 20 for row in planned)
        chosen = [[pairs[i] for i in row] for row in planned]
        batch = collate_preferences(chosen, 0, packing=packing)
        documents = [document for row in chosen for pair in row for document in pair.documents]
        assert len(batch.ids) == len(planned) * (1 if packing else 2)
        assert batch.document_count == len(documents) == len(batch.ends)
        for number, document in enumerate(documents):
            assert tuple(batch.ids[batch.owners == number].tolist()) == document.ids
            row, column = batch.ends[number].tolist()
            assert batch.owners[row, column] == number and batch.positions[row, column] == len(document.ids) - 1
        assert int((batch.owners == -1).sum()) == batch.ids.numel() - sum(len(d.ids) for d in documents)


def test_packed_pairs_fill_rows_of_twice_max_length():
    """Four pairs of 10 and 10 tokens: two fit a row of 2 x 20, so two rows instead of eight."""
    pairs = [Pair(example([1], [i] * 9), example([1], [-i] * 9)) for i in range(1, 5)]
    plan = plan_items(pairs, batch_size=2, max_length=20, packing=True, seed=0, epoch=0)
    assert [len(batch) for batch in plan] == [2]
    assert efficiency(plan, [20] * 4) == 1


def test_mismatches_leave_nothing_of_their_own_answer():
    items = [Judged(example([i], [100 + i] * i), True) for i in range(1, 6)]
    for i, item in enumerate(with_mismatches(items), 1):
        before = (i - 2) % 5 + 1
        assert item.mismatched.ids == (i, *[100 + before] * before)
        assert sum(item.mismatched.targets) == before and not item.mismatched.targets[0]


def swap_sides(monkeypatch):
    monkeypatch.setattr(Pair, "documents", property(lambda pair: (pair.rejected, pair.chosen)))


def count_the_prompt(monkeypatch):
    monkeypatch.setattr(batching, "shifted_targets", lambda example: [*example.ids[1:], -100])


def end_at_the_padding(monkeypatch):
    whole = batching.collate_documents
    monkeypatch.setattr(batching, "collate_documents", lambda *a: replace(whole(*a), ends=whole(*a).ends + 1))


@pytest.mark.parametrize("mutant", [swap_sides, count_the_prompt, end_at_the_padding])
def test_mutants_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    for test in (test_unpacked_pairs_stand_in_neighbouring_rows, test_packed_pairs_lie_side_by_side):
        with pytest.raises(AssertionError):
            test()
