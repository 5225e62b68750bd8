"""Files to a corpus: which examples are trained, which held out, and what is left out of both."""

import json

import pytest

from minitune.data.corpus import Encoding, Source, load_corpus
from minitune.data.examples import row_origin
from minitune.data.splits import split_by_hash
from minitune.errors import DataError


def held_out(name, fractions):
    """Whether a question goes to validation, by the rule of splits.py alone."""
    return bool(split_by_hash([name], fractions, 0, lambda question: question)["validation"])


@pytest.fixture
def questions():
    """Forty questions with whether each is held out."""
    fractions = {"training": 0.7, "validation": 0.3}
    return {f"question {i}": held_out(f"question {i}", fractions) for i in range(40)}


def load(path, tokenizer, **encoding):
    return load_corpus([Source(str(path))], [], tokenizer, Encoding(**encoding), held_out=0.3)


def write(path, questions, length):
    """Write rows whose answers have as many tokens (bytes) as `length` says of each question."""
    rows = [{"prompt": q, "completion": "a" * length(held)} for q, held in questions.items()]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("over_long", [True, False])
def test_a_part_whose_rows_are_all_dropped_is_empty(tmp_path, tokenizers, questions, over_long):
    path = write(tmp_path / "a.jsonl", questions, lambda held: 90 if held == over_long else 3)
    count = list(questions.values()).count(not over_long)
    assert 0 < count < len(questions)
    if not over_long:
        with pytest.raises(DataError, match="no row is left to train on"):
            load(path, tokenizers["plain"], max_length=40, truncate="drop")
        return
    corpus = load(path, tokenizers["plain"], max_length=40, truncate="drop")
    assert (len(corpus.training[0][0]), len(corpus.validation)) == (count, 0)
    assert corpus.files[0]["training_examples"] == count and corpus.files[0]["validation_examples"] == 0


def test_rows_are_held_out_by_their_question_whatever_their_windows(tmp_path, tokenizers, questions):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": q + " word" * (3 + i % 5)}) for i, q in enumerate(questions)))
    corpus = load(path, tokenizers["plain"], max_length=12, truncate="split")
    learned, held = ({row_origin(e) for e in part} for part in (corpus.training[0][0], corpus.validation))
    assert learned and held and not learned & held, "windows of one row stand on one side"
    assert learned | held == {f"{path}:{line}" for line in range(1, 41)}
    assert len(corpus.training[0][0]) > len(learned)


def test_rows_of_one_line_are_split_one_by_one(tmp_path, tokenizers, questions):
    lines = write(tmp_path / "a.jsonl", questions, lambda held: 3)
    array = tmp_path / "a.json"
    array.write_text(json.dumps([json.loads(line) for line in lines.read_text().splitlines()]))
    by_line, by_row = (load(path, tokenizers["plain"], max_length=60) for path in (lines, array))
    assert [e.ids for e in by_row.validation] == [e.ids for e in by_line.validation]
    assert len(by_line.validation) == sum(questions.values())
