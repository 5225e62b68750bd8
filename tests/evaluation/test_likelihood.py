"""Likelihoods and multiple choice against transformers, and lm-evaluation-harness's definitions worked by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.data.examples import Example
from minitune.errors import CheckpointError, DataError
from minitune.evaluation import likelihood
from minitune.evaluation.choices import Question, encode_choice, measure_choices, read_choices, score_choices
from minitune.evaluation.likelihood import likelihoods


@pytest.fixture(scope="module")
def own(roomy):
    return load_model(roomy, dtype=torch.float32), load_tokenizer(roomy)


@pytest.fixture
def plain(roomy):
    """The tokenizer without its chat template."""
    tokenizer = load_tokenizer(roomy)
    tokenizer.chat_template = None
    return tokenizer


def examples() -> list[Example]:
    found = []
    for length in (5, 40, 12, 90, 2):
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        targets = [False] + [place % 3 > 0 for place in range(1, length)]
        found.append(Example(tuple(ids), tuple(targets), f"row {length}"))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_text_scores_as_in_transformers(own, peer, batch_size, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 7)  # a text's targets span several
    heard = []
    found = likelihoods(own[0], examples(), batch_size=batch_size, on_batch=heard.append)
    assert sum(heard) == 5
    for example, score in zip(examples(), found, strict=True):
        with torch.no_grad():
            log_p = peer[0](torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        places = [place for place, target in enumerate(example.targets) if target]
        picked = [log_p[place - 1, example.ids[place]].item() for place in places]
        assert score.log_probability == pytest.approx(sum(picked), rel=1e-5)
        assert score.tokens == len(places)
        assert score.right == sum(log_p[place - 1].argmax().item() == example.ids[place] for place in places)


def test_what_cannot_be_scored_is_named(own):
    with pytest.raises(DataError, match="row 9: 1025 tokens with its answer, but the model reads at most 1024"):
        likelihoods(own[0], [Example((1,) * 1025, (False,) + (True,) * 1024, "row 9")])
    with pytest.raises(DataError, match="row 9: an answer without a token"):
        likelihoods(own[0], [Example((1, 2), (False, False), "row 9")])


def test_a_model_that_computes_no_numbers_scores_nothing(roomy):
    broken = load_model(roomy, dtype=torch.float32)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="row 5: the model gives its answer no finite log-probability"):
        likelihoods(broken, examples())


def test_a_choice_is_encoded_as_lm_evaluation_harness_does(own, plain):
    row = Question("x:1", "2 + 2 =  ", ("4", "five"), 0)
    example = encode_choice(plain, row, "five")
    # White space at the end of the context belongs to the continuation, which begins with a space of its own.
    scored = plain.decode([id for id, target in zip(example.ids, example.targets, strict=True) if target])
    assert (plain.decode(example.ids), scored) == ("2 + 2 =   five", "   five")
    assert list(example.ids) == plain.encode("2 + 2 =   five")


def test_with_a_template_the_choice_is_the_answer_alone(own):
    _, tokenizer = own
    row = Question("x:1", "Which?", ("yes", "no"), 0)
    turns = Question("x:1", ({"role": "user", "content": "Which?"},), ("yes", "no"), 0)
    example = encode_choice(tokenizer, row, "yes")
    assert example == encode_choice(tokenizer, turns, "yes")
    scored = [id for id, target in zip(example.ids, example.targets, strict=True) if target]
    assert tokenizer.decode(scored, skip_special=False) == "yes"
    assert example.targets[-1] and example.ids[-1] not in tokenizer.end_ids


@pytest.mark.parametrize("template", [True, False])
def test_choices_are_ranked_as_transformers_ranks_them(own, plain, peer, template):
    model, tokenizer = own[0], own[1] if template else plain
    texts = ("cat", "a longer answer", "ü!", "0")
    rows = [Question(f"x:{n}", f"Question {n}?", texts, n % 4) for n in range(6)]
    scores = []
    for row in rows:
        found = []
        for choice in texts:
            example = encode_choice(tokenizer, row, choice)
            ids, start = torch.tensor([example.ids]), example.targets.index(True)
            with torch.no_grad():
                logits = peer[0](ids).logits[0, start - 1 : -1]
            found.append(-F.cross_entropy(logits, ids[0, start:], reduction="sum").item())
        scores.append(found)
    expected = measure_choices(scores, [texts] * 6, [row.answer for row in rows])
    measured = score_choices(model, tokenizer, rows, batch_size=5)
    for name in ("accuracy", "accuracy_norm", "accuracy_bytes"):
        assert measured[name].right == expected[name].right
    assert measured["calibration_error"].statistics.value == pytest.approx(
        expected["calibration_error"].statistics.value, abs=1e-5
    )


def test_the_three_normalisations_by_hand():
    # Choices of 1 character in 1 byte, 2 in 4 bytes, 8 in 8. Plain: -3 > -4 > -5. By characters: -3, -2, -0.625.
    choices = ("a", "éé", "abcdefgh")
    scores = (-3.0, -4.0, -5.0)
    for answer, right in ((0, (True, False, False)), (2, (False, True, True))):
        found = measure_choices([scores], [choices], [answer])
        assert tuple(found[name].right[0] for name in ("accuracy", "accuracy_norm", "accuracy_bytes")) == right
    # Plain -2 wins; by characters -2 against -2.1; by bytes -2 against -1.05.
    split = measure_choices([(-2.0, -4.2, -99.0)], [choices], [1])
    assert [split[name].right[0] for name in ("accuracy", "accuracy_norm", "accuracy_bytes")] == [False, False, True]
    short = measure_choices([(-1.0, -2.4)], [("a", "abc")], [1])  # -1 against -0.8, each character counted once
    assert short["accuracy_norm"].right == short["accuracy_bytes"].right == (True,)
    tie = measure_choices([(-1.0, -1.0)], [("x", "y")], [0])
    assert tie["accuracy"].right == (True,)  # the first of equals, as numpy's argmax has it
    assert tie["calibration_error"].statistics.value == pytest.approx(0.5)  # sure by a half, and right


def test_confidence_is_the_softmax_over_choices():
    found = measure_choices([(math.log(3.0), 0.0), (0.0, math.log(3.0))], [("x", "y")] * 2, [0, 0])
    assert found["calibration_error"].statistics.value == pytest.approx(abs(0.5 - 0.75))


GOOD = {"prompt": "Which?", "choices": ["yes", "no"], "answer": 1, "id": 7}


def test_rows_are_read_with_an_answer_by_number_or_text(tmp_path):
    path = tmp_path / "quiz.jsonl"
    turns = [{"role": "user", "content": "Which?"}]
    path.write_text("\n".join(map(json.dumps, [GOOD, GOOD | {"answer": "no"}, GOOD | {"prompt": turns}])))
    rows = read_choices(path)
    assert [row.answer for row in rows] == [1, 1, 1]
    assert rows[2].prompt == tuple(turns)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"answer": 2}, "answer' is none of the choices"),
        ({"answer": -1}, "answer' is none of the choices"),
        ({"answer": True}, "answer' is none of the choices"),
        ({"answer": "maybe"}, "answer' is none of the choices"),
        ({"answer": None}, "answer' is none of the choices"),
        ({"choices": ["yes"]}, "no list of two texts"),
        ({"choices": "yes, no"}, "no list of two texts"),
        ({"choices": ["yes", " "]}, "no list of two texts"),
        ({"choices": ["yes", "yes"], "answer": 0}, "a choice is given twice"),
        ({"prompt": " "}, "a row without a question"),
        ({"prompt": 3}, "'prompt' is an int, not text"),
        ({"prompt": []}, "'prompt' is not a list of turns"),
    ],
)
def test_a_bad_row_is_named_and_the_others_counted(tmp_path, change, line):
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, GOOD | change, GOOD | change])))
    with pytest.raises(DataError, match=f"quiz.jsonl:2: .*{line}.*1 more such row"):
        read_choices(path)


def test_a_row_that_lacks_a_field_is_named(tmp_path):
    path = tmp_path / "quiz.jsonl"
    for name, line in (("prompt", "'prompt' is missing"), ("choices", "'choices' is no list"), ("answer", "none of")):
        bad = {key: value for key, value in GOOD.items() if key != name}
        path.write_text("\n".join(map(json.dumps, [GOOD, bad])))
        with pytest.raises(DataError, match=f"quiz.jsonl:2: .*{line}"):
            read_choices(path)
