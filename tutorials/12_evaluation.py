# %% [markdown]
"""# 12. Evaluation: what each number says, and what it hides

A score is a claim about answers. Here each one is computed by hand, next to the engine's. Then we look for the answers
that it gets wrong, for a score that nobody has seen fail is not understood:

1. right or wrong: exact match, accuracy, F1
2. words in common: ROUGE and BLEU, and a lie that scores better than the truth
3. perplexity, and a falsehood that reads better than a fact
4. calibration: is it right as often as it is sure?
5. luck: pass@k, and how far a score can be trusted at all
6. two models on the same rows
7. two judges: agreement beyond chance
8. a model as judge, asked in both orders

Open this file in VS Code or Jupyter and run it cell by cell, or run it as a whole:

    python tutorials/12_evaluation.py
"""

# %%
import itertools
import math
import random
from collections import Counter

import torch

import minitune
from minitune.endpoint import Reply
from minitune.evaluation.agreement import agreement
from minitune.evaluation.answers import Duel
from minitune.evaluation.bleu import bleu_statistics, tokenize_13a
from minitune.evaluation.bootstrap import interval, mean_of, paired_difference
from minitune.evaluation.calibration import calibration_statistics
from minitune.evaluation.comparison import mcnemar
from minitune.evaluation.judge import differences
from minitune.evaluation.judging import pairwise_result, pairwise_verdicts
from minitune.evaluation.metrics import accuracy, confusion_matrix, macro_f1, micro_f1, wilson_interval
from minitune.evaluation.perplexity import perplexity
from minitune.evaluation.rouge import rouge, words
from minitune.evaluation.rubric import read_rubric
from minitune.evaluation.text_metrics import exact_match, pass_at_k
from minitune.evaluation.verdicts import read_verdict
from minitune.sources import fetch

assert [1, 2, 3, 4, 5, 6, 7, 8] == list(range(1, 9))


def check(name, by_hand, engine, tolerance=1e-9):
    """Print and assert that two numbers or lists of numbers are the same, up to rounding."""
    by_hand, engine = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (by_hand, engine))
    assert by_hand.shape == engine.shape, f"{name}: {tuple(by_hand.shape)} against {tuple(engine.shape)}"
    error = (by_hand - engine).abs().max().item()
    value = f"{by_hand.item():.6f} and {engine.item():.6f}" if by_hand.dim() == 0 else f"{by_hand.numel()} numbers"
    print(f"  agree: {name}, {value}")
    assert error <= tolerance, f"{name}: {error:.1e} apart"


# %% [markdown]
"""## 1. Right or wrong

Ten reviews, of which eight are positive. One model has learned to say "positive" and nothing else. The other one tells
them apart, with three errors.

The first model is right 8 times of 10, the second 7 times. Accuracy says that the parrot is better. F1 of a label is

    F1 = 2 TP / (2 TP + FP + FN)        TP: rightly said, FP: wrongly said, FN: missed

and macro-F1 is the mean over labels, so that a rare label counts as much as a frequent one. The parrot has F1 = 16 / 18
for "positive" and 0 for "negative".
"""

# %%
print("== 1. Right or wrong")
labels = ["positive", "negative"]
right = ["positive"] * 8 + ["negative"] * 2
parrot = ["positive"] * 10
second = ["negative"] * 3 + ["positive"] * 5 + ["negative"] * 2
scores = {}
for name, answers in (("parrot", parrot), ("second", second)):
    f1 = []
    for label in labels:
        tp = sum(a == r == label for a, r in zip(answers, right, strict=True))
        fp = sum(a == label != r for a, r in zip(answers, right, strict=True))
        fn = sum(r == label != a for a, r in zip(answers, right, strict=True))
        f1.append(2 * tp / (2 * tp + fp + fn))
    matches = sum(exact_match(a, [r]) for a, r in zip(answers, right, strict=True))
    confusion = confusion_matrix(right, answers, labels)
    scores[name] = matches / 10, sum(f1) / 2
    print(f"  {name}: accuracy {scores[name][0]}, F1 {f1[0]:.3f} and {f1[1]:.3f}, macro {scores[name][1]:.3f}")
    check("accuracy", matches / 10, accuracy(confusion))
    check("macro-F1", sum(f1) / 2, macro_f1(confusion))
    check("micro-F1, which is accuracy where every answer is a label", matches / 10, micro_f1(confusion))
assert scores["parrot"][0] == 8 / 10 and scores["second"][0] == 7 / 10
assert scores["parrot"][1] == 16 / 18 / 2 and scores["second"][1] > scores["parrot"][1]
print("  accuracy prefers the parrot, macro-F1 the other one")

# %% [markdown]
"""## 2. Words in common

Where many answers are right, no exact match will do. ROUGE counts words that answer and reference share, each at most
as often as the other text has it (Lin 2004):

    P = shared / words of the answer,   R = shared / words of the reference,   F = 2 P R / (P + R)

BLEU multiplies the precisions of one to four words in a row, and punishes answers that are too short (Papineni et al.
2002):

    BLEU = 100 min(1, e^(1 - r/c)) (p_1 p_2 p_3 p_4)^(1/4)       c, r: words of the answer, of the reference

Now a reference, and two answers: one puts a "not" into it, the other says the same in other words.
"""

# %%
print("== 2. Words in common")
reference = "The drug is safe for children and it should be given with food."
lie = "The drug is not safe for children and it should be given with food."
truth = "Kids can take this medicine without danger, preferably at mealtimes."


def rouge_1(answer):
    """ROUGE-1 by hand."""
    ours, theirs = words(answer), words(reference)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    p, r = shared / len(ours), shared / len(theirs)
    return 2 * p * r / (p + r) if shared else 0.0


def rouge_l(answer):
    """ROUGE-L by hand: the most words in the same order that both share, from those of all shorter beginnings."""
    ours, theirs = words(answer), words(reference)
    best = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, j in itertools.product(range(len(ours)), range(len(theirs))):
        best[i + 1][j + 1] = best[i][j] + 1 if ours[i] == theirs[j] else max(best[i][j + 1], best[i + 1][j])
    p, r = best[-1][-1] / len(ours), best[-1][-1] / len(theirs)
    return 2 * p * r / (p + r) if p else 0.0


def bleu(answer):
    """BLEU by hand, for an answer that shares at least four words in a row with the reference."""
    ours, theirs = tokenize_13a(answer), tokenize_13a(reference)
    product = 1.0
    for n in (1, 2, 3, 4):
        grams, others = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (ours, theirs))
        product *= sum((grams & others).values()) / sum(grams.values())
    return 100 * min(1, math.exp(1 - len(theirs) / len(ours))) * product ** (1 / 4)


for name, answer in (("lie", lie), ("truth", truth)):
    found = rouge(answer, [reference])
    print(f"  {name:5}: ROUGE-1 {found['rouge1'].f:.3f}, ROUGE-L {found['rougeL'].f:.3f}   {answer}")
    check(f"ROUGE-1 of the {name}", rouge_1(answer), found["rouge1"].f)
    check(f"ROUGE-L of the {name}", rouge_l(answer), found["rougeL"].f)
check("BLEU of the lie", bleu(lie), bleu_statistics([lie], [[reference]]).value)

# %% [markdown]
"""The lie shares 13 of its 14 words with the reference, all in order: F = 26 / 27, and BLEU 80. The truth shares no
word, and scores 0. A score of words in common measures words in common. It is of use where answers are long, many and
written in the same way; it is not a measure of truth. For single rows it can be the opposite.
"""

# %%
assert len(words(lie)) == 14 and len(words(reference)) == 13
assert math.isclose(rouge_1(lie), 26 / 27) and rouge_1(truth) == 0 and round(bleu(lie)) == 80
print(f"  the lie scores {rouge_1(lie):.3f}, the truth {rouge_1(truth):.3f}")

# %% [markdown]
"""## 3. Perplexity

Perplexity is e to the mean loss per token: among how many equally likely tokens the model could as well have chosen.
The first token of a text has nothing before it, and is not scored. Bits per byte divides by the text's bytes instead,
so that models with other tokenizers compare:

    perplexity = e^(loss / tokens)          bits per byte = loss / (ln 2 bytes)

We ask SmolLM2 for four sentences: two that are false, one that goes round in circles, and one that is true.
"""

# %%
print("== 3. Perplexity")
NAME = "smollm2-135m-instruct"
fetch(NAME)  # does nothing when the model is here already
model = minitune.load_model(NAME, dtype="float32")
tokenizer = minitune.load_tokenizer(NAME)
sentences = {
    "false": "The capital of Australia is Sydney, which is the largest city in the United States.",
    "false, again": "Two plus two is five, and two plus two is five, and two plus two is five.",
    "says nothing": "The sky is green because the grass is green, and the grass is green because the sky is green.",
    "true": "Canberra, not Sydney, is where Australia's parliament sits.",
}
perplexities = {}
for name, text in sentences.items():
    ids = tokenizer.encode(text)
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)  # (T - 1, V)
    losses = [-log_p[i, token].item() for i, token in enumerate(ids[1:])]
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    found = perplexity(model, tokenizer, text)
    perplexities[name] = found.perplexity
    print(f"  {name:12}: {found.perplexity:6.1f}   {text}")
    check("loss", sum(losses) / len(losses), found.loss, 1e-4)  # the engine sums in 32 bits
    check("bits per byte", sum(losses) / math.log(2) / size, found.bits_per_byte, 1e-4)
    assert math.isclose(found.perplexity, math.exp(found.loss))

# %% [markdown]
"""The true sentence is by far the least likely one: its perplexity is more than 5 times that of any other. Perplexity
measures how usual a text is, and falsehoods can be said in usual words. Compare models by it on the same text, to see
what a fine-tune has forgotten. Never compare texts by it to see which is right.
"""

# %%
others = [value for name, value in perplexities.items() if name != "true"]
assert perplexities["true"] > 5 * max(others)
print("  the fact reads worst")

# %% [markdown]
"""## 4. Calibration

A model that says "positive" with probability 0.9 should be right 9 times of 10. The expected calibration error puts
answers into bins by their confidence, and averages how far each bin's accuracy is from its confidence, weighted by its
rows (Guo et al. 2017):

    ECE = sum of n_b / N |right_b / n_b - confidence_b / n_b|

Ten answers: five with 0.95, of which 3 are right, and five with 0.55, of which 3 are right.
"""

# %%
print("== 4. Calibration")
confidences = [0.95] * 5 + [0.55] * 5
hits = [True, True, True, False, False] * 2
by_hand = 5 / 10 * abs(3 / 5 - 0.95) + 5 / 10 * abs(3 / 5 - 0.55)
check("ECE", by_hand, calibration_statistics(confidences, hits).value)
shy = calibration_statistics([0.6] * 10, hits)
check("ECE of one that always says 0.6", 0.0, shy.value)
assert (confidences[0], confidences[-1], sum(hits) / 10, 9 / 10) == (0.95, 0.55, 0.6, 0.9)
assert math.isclose(by_hand, 0.2) and hits[:5].count(True) == 3

# %% [markdown]
"""0.2, for all the confidence in the first five. A model that says 0.6 for everything is perfectly calibrated, and of
no use. Calibration is a question beside accuracy, never instead of it.

## 5. Luck

Asked ten times, a model solves a problem three times. How likely is it that one of 2 answers is right? Not
1 - 0.7^2, which draws the same answer twice. Count the pairs instead (Chen et al. 2021, equation 1):

    pass@k = 1 - C(n - c, k) / C(n, k)          here 1 - 21 / 45
"""

# %%
print("== 5. Luck")
tries = [True] * 3 + [False] * 7
pairs = list(itertools.combinations(tries, 2))
check("pass@2", sum(any(pair) for pair in pairs) / len(pairs), pass_at_k(10, 3, 2))
assert len(pairs) == 45 and sum(not any(pair) for pair in pairs) == 21 and math.comb(10, 2) == 45
assert pass_at_k(10, 3, 2) > 1 - 0.7**2
print(f"  by pairs {pass_at_k(10, 3, 2):.4f}, by 1 - 0.7^2 {1 - 0.7**2:.4f}")

# %% [markdown]
"""Luck is in every score. 14 of 20 rows right is 70%, but the next 20 rows will give another number. The bootstrap asks
the rows themselves: draw 20 of them with replacement, many times, and look at the middle 95% of the scores (Efron &
Tibshirani 1993). A formula says the same of a share without drawing (Wilson 1927):

    (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)       z = 1.96

With 20 rows the truth may be 50% or 85%. With 2,000 it is known to 2 points.
"""

# %%
rows = [1.0] * 14 + [0.0] * 6
lots = random.Random(0)
draws = sorted(sum(lots.choices(rows, k=20)) / 20 for _ in range(20_000))
low, high = interval(mean_of(rows), resamples=20_000)
check("bootstrap, low", draws[500], low, 0.051)  # a score is a multiple of 1/20
check("bootstrap, high", draws[-500], high, 0.051)
z, n, p = 1.959964, 20, 0.7
middle, spread = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
edges = middle - spread / (1 + z * z / n), middle + spread / (1 + z * z / n)
check("Wilson", edges, wilson_interval(14, 20), 1e-6)
print(f"  14 of 20: bootstrap {low:.2f} to {high:.2f}, Wilson {edges[0]:.3f} to {edges[1]:.3f}")
low, high = wilson_interval(1_400, 2_000)
assert edges[0] < 0.5 and edges[1] > 0.85 and (0.50, 0.85) == (50 / 100, 85 / 100) and 0.7 == 70 / 100
assert 1_400 / 2_000 == 0.7 and high - 0.7 < 2 / 100 and round(z, 2) == 1.96 and 95 / 100 == 1 - 2 * 500 / 20_000

# %% [markdown]
"""## 6. Two models

The base has 14 of 20 rows right, the tuned model 19. Their intervals overlap, so is it nothing? The rows are the same!
On 14 rows both are right, on 1 both are wrong, and of the other 5 the tuned model has gained all. If both were equally
good, each of these rows would be a coin's toss. The exact test for this asks how likely the tosses are (McNemar 1947):

    p = min(1, 2 sum of C(b + c, i) / 2^(b + c) for i up to min(b, c))       b gained, c lost

5 of 5 is 2 / 32 = 0.0625: not yet a proof, but far from what the overlap suggests. One more row, 6 of 6, would do:
2 / 64 = 0.03125. The paired bootstrap draws the same rows for both models, and leaves out 0 here.
"""

# %%
print("== 6. Two models")
base = [True] * 14 + [False] * 6
tuned = [True] * 19 + [False]
gained = sum(t and not b for t, b in zip(tuned, base, strict=True))
lost = sum(b and not t for t, b in zip(tuned, base, strict=True))
tosses = list(itertools.product([0, 1], repeat=5))
as_rare = sum(sum(toss) in (0, 5) for toss in tosses) / len(tosses)
check("McNemar", as_rare, mcnemar(gained, lost))
alone = [wilson_interval(sum(one), 20) for one in (base, tuned)]
difference, low, high = paired_difference(mean_of(tuned), mean_of(base))
print(f"  base {alone[0][0]:.2f} to {alone[0][1]:.2f}, tuned {alone[1][0]:.2f} to {alone[1][1]:.2f}: they overlap")
print(f"  the difference is {difference:.2f}, {low:.2f} to {high:.2f}; p = {as_rare}")
assert alone[0][1] > alone[1][0] and low > 0 and (gained, lost) == (5, 0) and sum(tuned) == 19
assert as_rare == 2 / 32 == 0.0625 and mcnemar(6, 0) == 2 / 64 == 0.03125 and sum(base) == 14

# %% [markdown]
"""The two tests disagree: with so few rows the bootstrap's interval is too narrow. That is why minitune names the test,
and takes the exact one where answers are right or wrong.

## 7. Two judges

Two people compare 20 pairs of answers. Both say "the first" 16 times, and they say the same on 14 pairs. 70% sounds
good. But people who toss coins that fall so 80% of the time agree on 0.8^2 + 0.2^2 = 68% by chance. Kappa is what is
left, as a share of what could be (Cohen 1960):

    kappa = (observed - chance) / (1 - chance)           here 0.02 / 0.32 = 0.0625
"""

# %%
print("== 7. Two judges")
one = ["first"] * 13 + ["first"] * 3 + ["second"] * 3 + ["second"]
two = ["first"] * 13 + ["second"] * 3 + ["first"] * 3 + ["second"]
observed = sum(a == b for a, b in zip(one, two, strict=True)) / 20
chance = sum(one.count(side) / 20 * two.count(side) / 20 for side in ("first", "second"))
found = agreement(one, two, ("first", "second"))
check("kappa", (observed - chance) / (1 - chance), found.kappa)
low, high = found.kappa_interval
print(f"  agreed {observed:.2f}, by chance {chance:.2f}, kappa {found.kappa:.4f} ({low:.2f} to {high:.2f})")
assert observed == 0.7 == 14 / 20 == 70 / 100 and one.count("first") == two.count("first") == 16 and 80 / 100 == 0.8
assert math.isclose(chance, 0.68) and 68 / 100 == 0.68 and math.isclose(found.kappa, 0.0625)
assert math.isclose(observed - chance, 0.02) and math.isclose(1 - chance, 0.32) and low < 0 < high
assert math.isclose(0.8**2 + 0.2**2, chance)

# %% [markdown]
"""## 8. A model as judge

A language model can compare answers, for little money. Here are six questions with a right and a wrong answer each. We
ask SmolLM2 which is better, "A" or "B", and read the probabilities of the two letters:

    d(x, y) = log p("A") - log p("B")         x shown as answer A, y as answer B

d > 0 is a verdict for the place A. Asked once, with the right answer first, it looks like a perfect judge: 6 of 6.
"""

# %%
print("== 8. A model as judge")
questions = {
    "What is the capital of France?": ("Paris.", "London."),
    "What is 2 + 2?": ("4.", "7."),
    "Name a fruit.": ("An apple.", "A chair."),
    "Is the sun a star?": ("Yes, it is.", "No, it is a planet."),
    "Translate 'dog' into French.": ("Chien.", "Chat."),
    "How many days has a week?": ("Seven.", "Twelve."),
}
answers = [list(pair) for pair in questions.values()]
found = differences(model, tokenizer, list(questions), answers)
for question, one in zip(questions, found, strict=True):
    print(f"  right answer first: d {one[0, 1]:+.3f}, last: d {one[1, 0]:+.3f}   {question}")
once = sum(one[0, 1] > 0 for one in found)
assert once == len(found) == 6

# %% [markdown]
"""Now the other way round, with the right answer as B. d is above zero again, all 6 times. The judge says "A", whatever
it is shown. Its verdicts follow the place (Zheng et al. 2023), and the 6 of 6 were ours, not its own.

So a verdict counts only where both orders agree, and is a tie where it turns with the order. The share of verdicts that
follow the place is reported as position bias: here 100%, and the win rate of the right answers is 50%, as it should be
for a judge that tells nothing apart.
"""

# %%
back = sum(one[1, 0] > 0 for one in found)
assert back == 6
duels = [Duel(q, *(Reply(text, True) for text in pair)) for q, pair in questions.items()]
letters = [tuple("A" if one[order] > 0 else "B" for order in ((0, 1), (1, 0))) for one in found]
result = pairwise_result(duels, letters)
share, rate = result["position_bias"]["value"], result["wins"]["win_rate"]["value"]
follow = sum(first == second for first, second in letters) / 6
check("position bias", follow, share)
check("win rate", sum(0.5 if a == b else float(a == "A") for a, b in letters) / 6, rate)
assert share == 100 / 100 and rate == 50 / 100
print(f"  follow the place: {share:.0%}, win rate of the right answers: {rate:.0%}")

# %% [markdown]
"""A larger judge that writes its verdict is asked in the same way. What it writes has to be read strictly. A last line
of a defined form is a verdict. Anything else is none: it is counted, and scores nothing.

A judge that we simulate shows that the numbers can be trusted. It knows the better answer, but in 30% of the pairs it
takes the first one whatever it is, and one reply of 20 is nonsense. 400 pairs later:
"""

# %%
for text in ("Paris is right.\nVERDICT: A", "I would say A.", "VERDICT: A\nOr B?", "VERDICT: A\nVERDICT: B"):
    verdict = read_verdict(Reply(text, True), ("A", "B", "TIE"))
    print(f"  {text!r} -> {verdict if isinstance(verdict, str) else f'no verdict: {verdict.kind}'}")
lots = random.Random(0)
duels = [Duel("?", *(Reply(text, True) for text in lots.sample([f"good {i}", f"bad {i}"], 2))) for i in range(400)]
lazy = {i for i in range(400) if lots.random() < 0.3}


def biased_judge(conversations):
    """Answer as that judge would."""
    replies = []
    for conversation in conversations:
        first = conversation[0]["content"].split("[Answer A]\n")[1].split("\n")[0]
        letter = "A" if int(first.split()[1]) in lazy or first.startswith("good") else "B"
        replies.append(Reply("Nice weather." if lots.random() < 1 / 20 else f"VERDICT: {letter}", True))
    return replies


verdicts = pairwise_verdicts(duels, read_rubric(), biased_judge)
result = pairwise_result(duels, verdicts)
whole = [i for i, both in enumerate(verdicts) if all(isinstance(one, str) for one in both)]
check("position bias", sum(i in lazy for i in whole) / len(whole), result["position_bias"]["value"])
truly = sum(0.5 if i in lazy else float(duels[i].tuned.text.startswith("good")) for i in whole) / len(whole)
check("win rate", truly, result["wins"]["win_rate"]["value"])
low, high = result["position_bias"]["interval"]
print(f"  judged {result['judged']} of 400, no verdict: {result['missing']}")
print(f"  follow the place: {result['position_bias']['value']:.1%}, 95% interval {low:.1%} to {high:.1%}")
assert low < 30 / 100 == 0.3 < high and 30 < result["without_verdict"] < 50 and len(duels) == 400 and 1 / 20 == 0.05

# %% [markdown]
"""The bias comes out as it was put in, and no nonsense was counted as a vote.

What to remember: look at answers before scores; name the test; give the interval; ask a judge in both orders, and
check it against people's votes (`python -m minitune.evaluate --blind.prompts ... --judge.votes ...`).
"""

# %%
print("== every number agreed")
