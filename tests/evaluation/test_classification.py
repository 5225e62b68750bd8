"""Classification by generated answer: what counts as right, on a model whose answers are given."""

import pytest

from minitune.decoding import Answer
from minitune.errors import DataError
from minitune.evaluation import classification
from minitune.evaluation.classification import LabelledPrompt, classify

LABELS = ("positive", "negative")


@pytest.fixture
def answered(monkeypatch):
    """Let the model answer what a list says, in the order of the prompts."""

    def install(*answers: Answer):
        asked = {}

        def generate_texts(model, tokenizer, prompts, **options):
            asked.update(options, prompts=prompts)
            return list(answers)

        monkeypatch.setattr(classification, "generate_texts", generate_texts)
        return asked

    return install


def rows(*labels: str) -> list[LabelledPrompt]:
    return [LabelledPrompt(f"review {i}", label, f"file:{i}") for i, label in enumerate(labels)]


def test_case_and_punctuation_count_for_compliance_only(answered):
    asked = answered(
        Answer(" positive\n", 3, True),  # white space around it is not looked at
        Answer("Positive", 2, True),
        Answer("positive.", 3, True),
        Answer("positive", 16, False),  # cut off: more might have followed
        Answer("", 0, True),
        Answer("negative", 2, True),
        Answer("It is positive", 4, True),  # no label, however right it sounds
    )
    found = classify(None, None, rows(*["positive"] * 7), LABELS, max_new_tokens=16, batch_size=2)
    assert found.confusion == [[3, 1, 3], [0, 0, 0]]
    assert found.accuracy == 3 / 7
    assert found.format_compliance == pytest.approx(2 / 7)
    others = ("Positive", "positive.", "positive [cut off]", "", "It is positive")
    assert dict(found.other_answers) == dict.fromkeys(others, 1)
    assert asked["prompts"] == [f"review {i}" for i in range(7)]
    assert (asked["max_new_tokens"], asked["batch_size"], asked["raw"]) == (16, 2, False)
    assert "sampling" not in asked  # greedy


def test_labels_that_differ_in_case_only_are_matched_exactly(answered):
    answered(Answer("A", 1, True), Answer("a", 1, True), Answer("a.", 1, True))
    assert classify(None, None, rows("A", "A", "A"), ("A", "a")).confusion == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "labels, answer, read",
    [
        (("1", "0", "-1"), "-1.", "-1"),
        (("1", "0", "-1"), "**1**", "1"),
        (("1", "0"), "-1", None),  # another number, not a mark before it
        (("C", "C++"), "c++.", "C++"),
        (("C", "C++"), '"C"', "C"),
        (("positive", "negative"), "- positive", "positive"),
    ],
)
def test_marks_that_tell_labels_apart_are_part_of_them(answered, labels, answer, read):
    answered(Answer(answer, 3, True))
    counts = classify(None, None, rows(labels[0]), labels).confusion[0]
    assert (*labels, None)[counts.index(1)] == read


def test_rows_that_are_all_alike_give_f1_no_interval(answered):
    answered(*[Answer("positive", 1, True)] * 5)
    found = classify(None, None, rows(*["positive"] * 5), LABELS)
    assert (found.micro_f1, found.micro_f1_interval, found.macro_f1_interval) == (1.0, None, None)


def test_labels_are_matched_without_white_space_around_them(answered):
    answered(Answer("negative", 2, True))
    assert classify(None, None, rows("negative"), ("positive ", " negative")).accuracy == 1.0


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows to classify"):
        classify(None, None, [], LABELS)
