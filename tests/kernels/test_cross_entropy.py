"""Linear cross-entropy's kernel against the equation in fp64; soft-cap and ignored rows by torch's own functions."""

import functools

import pytest
import torch
import torch.nn.functional as F

from minitune.errors import ConfigError
from minitune.kernels import cross_entropy
from tests.kernels.proof import DEVICE, DTYPES, SIZES, check, draw, framed, gradients, mutant

KERNELS = ("cross_entropy_rows",)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's, for exp of far numbers


def eager(hidden, weight, targets, softcap=None):
    """Return the losses with the whole logits in memory, rounded where 16-bit matmuls round."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


def case(rows: int, vocabulary: int, width: int, dtype, ignored=False):
    hidden, weight = draw(rows, width, dtype=dtype), draw(vocabulary, width, dtype=dtype, seed=1, scale=0.4)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[0], targets[-1] = vocabulary - 1, 0
    if ignored:
        targets[::3] = -100
    return hidden, weight, targets


def run(kernel, rows, vocabulary, width, dtype, *, softcap=None, ignored=False, wanted=(True, True), pitch=0):
    hidden, weight, targets = case(rows, vocabulary, width, dtype, ignored)
    ours, theirs = (functools.partial(each, targets=targets, softcap=softcap) for each in (kernel, eager))
    check(ours, theirs, (framed(hidden, pitch), framed(weight, pitch)), wanted)


@pytest.fixture
def small_chunks(monkeypatch):
    """A chunk of 4 rows, so that a few rows are several chunks."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "GRAIN", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [*SIZES, 1025, 2500])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_vocabularies(small_chunks, dtype, vocabulary, softcap):
    run(cross_entropy.linear_cross_entropy, 8, vocabulary, 16, dtype, softcap=softcap)


@pytest.mark.parametrize("rows,wanted", [(n, (True, False)) for n in SIZES] + [(15, (True, True)), (17, (False, True))])
def test_rows(rows, wanted):
    run(cross_entropy.linear_cross_entropy, rows, 63, 15, DTYPES[1], wanted=wanted, ignored=rows > 1)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_row_of_many_blocks_and_strides(small_chunks, softcap):
    run(cross_entropy.linear_cross_entropy, 12, 20001, 8, torch.float32, softcap=softcap, ignored=True, pitch=3)


def test_every_row_weighted_alike():
    hidden, weight, targets = case(17, 65, 8, torch.float32)
    for each in (1.0, 0.25):
        upstream = torch.full((17,), each, device=DEVICE)
        ours, theirs = (
            gradients(functools.partial(function, targets=targets), (hidden, weight), (True, True), upstream)
            for function in (cross_entropy.linear_cross_entropy, eager)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ignored_rows_have_no_loss_and_no_gradient():
    hidden, weight, targets = case(9, 33, 8, torch.float32, ignored=True)
    hidden[0] = float("inf")  # whatever an ignored row holds
    out, dhidden, dweight = gradients(
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets), (hidden, weight), (True, False)
    ) + [None]
    assert dweight is None and (out[targets == -100] == 0).all() and (dhidden[targets == -100] == 0).all()
    assert out[targets != -100].isfinite().all() and (dhidden[targets != -100] != 0).all()


def test_a_target_that_is_no_token_gives_nan():
    hidden, weight, targets = case(5, 33, 8, torch.float32)
    targets[1], targets[3] = 33, -1
    losses = cross_entropy.linear_cross_entropy(hidden, weight, targets)
    assert losses.isnan().tolist() == [False, True, False, True, False]


def test_large_logits_do_not_overflow():
    hidden, weight, targets = case(5, 65, 8, torch.float32)
    losses = cross_entropy.linear_cross_entropy(hidden * 1000, weight, targets)
    torch.testing.assert_close(losses, eager(hidden * 1000, weight, targets))


def test_the_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: sizes.append(shape) or empty(*shape, **kind))
    monkeypatch.setattr(cross_entropy, "GRAIN", 16)
    hidden, weight, targets = case(40, 33, 8, torch.float32)
    gradients(lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets), (hidden, weight), (True, True))
    assert (16, 48) in sizes and all(len(shape) == 1 or shape[0] <= 16 for shape in sizes), sizes


@pytest.mark.parametrize(
    "change,text",
    [
        ({"hidden": draw(4, 8).double()}, "hidden is float64"),
        ({"weight": draw(9, 8).half()}, "weight is float16, but the kernel takes float32"),
        ({"weight": draw(9, 7)}, "weight has the shape (9, 7), but the kernel needs (any, 8)"),
        ({"targets": torch.zeros(4, dtype=torch.int32, device=DEVICE)}, "targets is int32, but the kernel takes int64"),
        ({"targets": torch.zeros(5, dtype=torch.int64, device=DEVICE)}, "targets has the shape (5,)"),
        ({"targets": torch.zeros(8, dtype=torch.int64, device=DEVICE)[::2]}, "targets has the strides (2,)"),
        ({"weight": draw(9, 8).to("meta")}, "weight is on meta"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_bad_input(change, text):
    right = {"hidden": draw(4, 8), "weight": draw(9, 8), "targets": torch.zeros(4, dtype=torch.int64, device=DEVICE)}
    with pytest.raises(ConfigError) as caught:
        cross_entropy.linear_cross_entropy(**{**right, **change})
    assert text in str(caught.value) and "\n" not in str(caught.value)


def mutant_case(module):
    module.CHUNK_BYTES, module.GRAIN = 1, 4
    run(module.linear_cross_entropy, 8, 9001, 8, torch.float32, softcap=3.0, ignored=True)


@pytest.mark.usefixtures("small_chunks")
def test_the_case_of_the_mutants_passes():
    mutant_case(cross_entropy)


MUTANTS = [
    ('tl.where(column < vocabulary, _cap(logit, cap, CAP), float("-inf"))', "_cap(logit, cap, CAP)"),
    ("total * tl.exp(top - new_top) + ", "total + "),
    ("kept = target != IGNORED", "kept = target == target"),
    ("column == target, 1.0", "column == target + 1, 1.0"),
    ("derivative *= 1.0 - (z / cap) * (z / cap)", "derivative *= 1.0"),
    ("dhidden * dlosses[:, None]", "dhidden * dlosses.mean()"),
    ("if not (dlosses == dlosses[0]).all():", "if False:"),
    ("tl.store(logits + column, derivative.to(logits.dtype.element_ty), mask=column < stride)",
     "tl.store(logits + column, derivative.to(logits.dtype.element_ty))"),
]  # fmt: skip


@pytest.mark.parametrize("old,new", MUTANTS)
def test_a_mutant_is_caught(tmp_path, old, new):
    wrong = mutant(cross_entropy, tmp_path, old, new)
    with pytest.raises(Exception) as caught:
        mutant_case(wrong)
    assert caught.type is AssertionError, caught.value
