"""BLEU and chrF against sacrebleu: on random texts, on its own examples, and with faults planted."""

import random

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from minitune.evaluation import bleu, chrf
from minitune.evaluation.bleu import bleu_statistics, sentence_bleu, tokenize_13a
from minitune.evaluation.chrf import chrf_plus_plus_statistics, chrf_statistics

WORDS = ["the", "Cat", "sat", "on", "a", "mat", "3.5", "1,000", "don't", "über", "e-mail", "5-6", "(so)", "...", "end.",
         "&quot;x&amp;", "a/b", "[1]", "-\n", "<skipped>", "猫", "$9", "~", "\t"]  # fmt: skip


def text(draw: random.Random) -> str:
    return draw.choice([" ", "  ", "\n"]).join(draw.choices(WORDS, k=draw.randrange(14))) + draw.choice(["", "\n", "."])


def corpus(seed: int, rows: int = 12, references: int = 1) -> tuple[list[str], list[list[str]]]:
    """Answers that share words with their references, and some that share none or are empty."""
    draw = random.Random(seed)
    texts = [[text(draw) for _ in range(references)] for _ in range(rows)]
    answers = []
    for row in texts:
        words = row[0].split(" ")
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        answers.append(draw.choice([" ".join(words), " ".join(words), row[-1], text(draw), ""]))
    return answers, texts


def streams(references: list[list[str]]) -> list[list[str]]:
    """sacrebleu takes the first references of all rows, then the second ones."""
    return [list(one) for one in zip(*references, strict=True)]


PEERS = {
    "bleu": (bleu_statistics, BLEU),
    "chrf": (chrf_statistics, CHRF),
    "chrf++": (chrf_plus_plus_statistics, lambda: CHRF(word_order=2)),
}


def largest_difference(name: str, seeds=range(25), references: int = 1) -> float:
    own, peer = PEERS[name]
    found = []
    for seed in seeds:
        answers, texts = corpus(seed, 1 + seed % 12, references)
        found.append(abs(own(answers, texts).value - peer().corpus_score(answers, streams(texts)).score))
    return max(found)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("references", [1, 3])
def test_a_corpus_scores_as_in_sacrebleu(name, references):
    assert largest_difference(name, references=references) < 1e-9


def test_the_peers_are_run_as_they_are_by_default():
    (_, bleu_peer), (_, chrf_peer), (_, plus) = PEERS.values()
    answers, texts = corpus(0)
    signatures = []
    for peer in (bleu_peer(), chrf_peer(), plus()):
        peer.corpus_score(answers, streams(texts))
        signatures.append(str(peer.get_signature()).rsplit("|", 1)[0])
    assert signatures == [
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp",
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no",
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no",
    ]


@pytest.mark.parametrize("references", [1, 2])
def test_sentences_score_as_in_sacrebleu(references):
    peer = BLEU(effective_order=True)
    for seed in range(20):
        for answer, texts in zip(*corpus(seed, 6, references), strict=True):
            assert sentence_bleu(answer, texts) == pytest.approx(peer.sentence_score(answer, texts).score, abs=1e-9)


def test_the_tokenizer_is_13a():
    draw, peer = random.Random(1), Tokenizer13a()
    for _ in range(300):
        line = "".join(draw.choices([*map(chr, range(32, 127)), "é", "—", "\n", "&lt;", "1", "2"], k=30))
        assert tokenize_13a(line) == peer(line.rstrip()).split(), line


def test_sacrebleus_own_cases():
    # sacrebleu's test_bleu.py: 1-gram answers have no 4-grams, and are scored by the effective order alone.
    assert bleu_statistics(["this is a very nice test"], [["this is a very nice test"]]).value == pytest.approx(100)
    assert bleu_statistics(["test"], [["test"]]).value == 0
    assert sentence_bleu("test", ["test"]) == pytest.approx(100)
    # test_chrf.py: equal texts score 100, disjoint ones 0, and white space does not count.
    assert chrf_statistics(["abcdefg"], [["abcdefg"]]).value == pytest.approx(100)
    assert chrf_statistics(["a b c d e f"], [["abcdef"]]).value == pytest.approx(100)
    assert chrf_statistics(["a"], [["b"]]).value == 0


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5, 2 of 4 and 1 of 3 n-grams match; as long as the reference, so BP = 1.
    found = bleu_statistics(["the cat sat on a mat"], [["the cat sat on the mat"]])
    assert found.rows.tolist() == [[6, 6, 5, 3, 2, 1, 6, 5, 4, 3]]
    assert found.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


@pytest.mark.parametrize("name", PEERS)
def test_the_corpus_is_no_mean_of_its_rows(name):
    answers, texts = corpus(3)
    own = PEERS[name][0](answers, texts)
    assert abs(own.value - own.score(own.rows).mean()) > 0.1


@pytest.mark.parametrize(
    "name, part, planted",
    [
        ("bleu", (bleu, "_ENTITIES"), ()),
        ("bleu", (bleu, "_SPLITS"), bleu._SPLITS[:3]),
        ("bleu", (bleu, "tokenize_13a"), str.split),
        ("chrf", (chrf, "BETA"), 1),
        ("chrf", (chrf, "CHARACTERS"), 5),
        ("chrf++", (chrf, "_split"), lambda word: [word]),
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, name, part, planted):
    monkeypatch.setattr(*part, planted)
    assert largest_difference(name) > 1e-3


def test_scores_map_many_resamples_at_once():
    answers, texts = corpus(5)
    for own, _ in PEERS.values():
        found = own(answers, texts)
        weights = torch.randint(0, 3, (4, len(answers)), generator=torch.Generator().manual_seed(0)).double()
        together = found.score(weights @ found.rows)
        apart = [found.score(one @ found.rows).item() for one in weights]
        assert together.tolist() == pytest.approx(apart)
