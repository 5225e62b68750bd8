"""ROUGE against the package rouge-score, and an example worked by hand."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from minitune.evaluation import rouge as module
from minitune.evaluation.rouge import KINDS, rouge, rouge_l, rouge_lsum, rouge_n

WORDS = [
    "the",
    "Cat",
    "sat",
    "on",
    "a",
    "mat",
    "3.5",
    "don't",
    "über",
    "ber",
    "snake_case",
    "snake",
    "e-mail",
    "it's,",
    "...",
    "END",
]


def text(draw: random.Random) -> str:
    """A few lines of few words, so that much repeats and subsequences tie; now and then nothing."""
    lines = [" ".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(draw.randrange(1, 4))]
    return draw.choice(["\n", "\n\n", " "]).join(lines)


def pairs(seed: int, count: int = 150) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [(text(draw), text(draw)) for _ in range(count)]


def disagreements(seed: int) -> int:
    scorer, wrong = RougeScorer(list(KINDS)), 0
    for answer, reference in pairs(seed):
        peer, own = scorer.score(reference, answer), rouge(answer, [reference])
        wrong += any(own[kind] != pytest.approx(tuple(peer[kind]), abs=1e-12) for kind in KINDS)
    return wrong


@pytest.mark.parametrize("seed", range(4))
def test_every_kind_equals_rouge_score(seed):
    assert disagreements(seed) == 0


def test_of_several_references_the_best_counts_as_in_rouge_score():
    draw, scorer = random.Random(9), RougeScorer(list(KINDS))
    for _ in range(50):
        answer, references = text(draw), [text(draw) for _ in range(3)]
        peer, own = scorer.score_multi(references, answer), rouge(answer, references)
        assert all(own[kind] == pytest.approx(tuple(peer[kind]), abs=1e-12) for kind in KINDS)


def test_by_hand():
    # "the cat sat" of "the cat sat on the mat": 3 of 3 words, 3 of 6; "the" matches once, not twice.
    assert rouge_n("the cat sat", "the cat sat on the mat", 1) == pytest.approx((1, 1 / 2, 2 / 3))
    assert rouge_n("the the the", "the cat", 1) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert rouge_n("police kill the gunman", "police killed the gunman", 2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # Lin 2004, section 3.1: against "police killed the gunman", "police kill the gunman" shares 3 of 4 in order,
    # "the gunman kill police" 2 of 4.
    assert rouge_l("police kill the gunman", "police killed the gunman").f == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman").f == pytest.approx(2 / 4)
    # Section 3.2: w1..w5 against "w1 w2 w6 w7 w8" and "w1 w3 w8 w9 w5": the union is w1 w2 w3 w5, so R = 4/5, P = 4/10.
    found = rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    assert found[:2] == pytest.approx((4 / 10, 4 / 5))


@pytest.mark.parametrize("answer, reference", [("", "a b"), ("a b", ""), ("...", "a"), ("кот", "кот")])
def test_nothing_to_compare_scores_zero(answer, reference):
    assert set(rouge(answer, [reference]).values()) == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    "name, planted",
    [
        ("words", lambda text: text.split()),
        ("words", lambda text: module.re.findall(r"\w+", text.lower())),
        ("_subsequence", lambda first, second: [i for i, word in enumerate(first) if word in second]),
        ("_score", None),
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, name, planted):
    if name == "_score":
        right = module._score
        planted = lambda matches, ours, theirs: right(matches, theirs, ours)  # noqa: E731 - P and R exchanged
    monkeypatch.setattr(module, name, planted)
    assert disagreements(0)
