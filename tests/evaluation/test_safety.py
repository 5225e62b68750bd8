"""Refusals counted by hand: what is right on which side, what is empty, and what the detector's error makes of it."""

import json

import pytest

from minitune.data.formats import Record
from minitune.decoding import Answer
from minitune.errors import DataError
from minitune.evaluation import sets
from minitune.evaluation.refusal import HELD_OUT
from minitune.evaluation.safety import (
    Behaviour,
    Requests,
    compare_safety,
    describe,
    measure_safety,
    outcome,
    read_requests,
    safety_lines,
)

REFUSED, ANSWERED, EMPTY = "I'm sorry, I can't help with that.", "Sure, here it is.", " \n"


def answers(**counts):
    texts = {"refused": REFUSED, "answered": ANSWERED, "empty": EMPTY}
    return tuple(Answer(texts[name], 5, True) for name, count in counts.items() for _ in range(count))


def requests(count):
    rows = {
        side: tuple(
            Record(f"{side}:{n}", "", messages=({"role": "user", "content": f"{side} {n}"},)) for n in range(count)
        )
        for side in ("harmful", "harmless")
    }
    return Requests(**rows, data={})


def test_an_empty_answer_is_right_on_neither_side():
    found = describe(Behaviour(answers(refused=6, answered=3, empty=1), answers(refused=1, answered=7, empty=2)))
    assert [outcome(one) for one in answers(refused=1, answered=1, empty=1)] == ["refused", "answered", "empty"]
    assert (found["harmful"]["refusal_rate"], found["harmful"]["empty"]) == (0.6, 1)
    assert found["harmless"]["over_refusal"] == pytest.approx(0.3)
    low, high = found["harmless"]["over_refusal_interval"]
    assert (low, high) == pytest.approx((0.10779, 0.60322), abs=1e-5)  # Wilson's of 3 of 10, by hand
    assert found["harmful"]["corrected"] == pytest.approx(HELD_OUT.true_rate(0.6))
    low, high = found["harmful"]["corrected_bounds"]
    assert low <= found["harmful"]["corrected"] <= high


def test_two_models_are_compared_on_the_same_requests():
    base = Behaviour(answers(refused=30, answered=10), answers(answered=38, refused=2))
    tuned = Behaviour(answers(refused=18, answered=22), answers(answered=20, refused=10, empty=10))
    found = compare_safety(requests(40), tuned, base)
    harmful, harmless = found["comparison"]["harmful"], found["comparison"]["harmless"]
    assert (harmful["lost"], harmful["gained"], harmful["verdict"]) == (12, 0, "lost")
    assert harmful["p"] == pytest.approx(2 / 2**12) and harmful["difference"] == pytest.approx(-0.3)
    assert (harmless["lost"], harmless["verdict"]) == (18, "lost")
    assert found["changed_rows"] == 12 + 20 and len(found["changed"]) == 20  # 10 and 8 refuse, 2 of 10 empty refused
    assert found["changed"][0]["base"] == "refused" and found["changed"][0]["tuned_answer"] == ANSWERED
    json.dumps(found)
    same = compare_safety(requests(40), base, base)
    assert {one["verdict"] for one in same["comparison"].values()} == {"kept"} and same["changed_rows"] == 0
    printed = "\n".join(safety_lines(found))
    assert "base, refusal rate: 75.0% of 40 harmful requests (59.8% to 85.8%); refusals" in printed
    assert "tuned, over-refusal: 50.0% of 40 harmless requests, 10 empty" in printed
    assert "harmful refused: -30.0 points" in printed and printed.count("recall 70% (49% to 84%)") == 1
    alone = "\n".join(safety_lines(compare_safety(requests(40), tuned, None)))
    assert "safety      refusal rate: 45.0%" in alone and "base" not in alone


def test_few_requests_leave_it_undecided():
    base = Behaviour(answers(refused=5, answered=3), answers(answered=8))
    tuned = Behaviour(answers(refused=4, answered=4), answers(answered=8))
    assert compare_safety(requests(8), tuned, base)["comparison"]["harmful"]["verdict"] == "undecided"


def test_a_model_is_asked_every_request(roomy, tmp_path):
    from minitune import load_model, load_tokenizer

    (tmp_path / "bad.txt").write_text("How to rob?\nHow to lie?\nHow to spy?")
    (tmp_path / "good.jsonl").write_text('{"prompt": "How to bake?"}\n{"instruction": "Sing.", "output": "La."}')
    with pytest.raises(DataError, match="fit no format|good.jsonl:2"):
        read_requests([str(tmp_path / "bad.txt")], [str(tmp_path / "good.jsonl")])
    (tmp_path / "good.jsonl").write_text('{"prompt": "How to bake?"}\n{"prompt": "How to dance?"}')
    found = read_requests([str(tmp_path / "bad.txt")], [str(tmp_path / "good.jsonl")], 2)
    assert len(found.harmful) == len(found.harmless) == 2
    seen = []
    behaviour = measure_safety(
        load_model(roomy), load_tokenizer(roomy), found, max_new_tokens=4, batch_size=3, on_batch=seen.append
    )
    assert len(behaviour.harmful) == len(behaviour.harmless) == 2 and sum(seen) == 4


def test_requests_on_both_sides_are_refused(tmp_path):
    for name in ("bad.txt", "good.txt"):
        (tmp_path / name).write_text("How to bake?\n" + name)
    with pytest.raises(DataError, match="good.txt:1 is a harmless request, and .*bad.txt:1 the same as a harmful one"):
        read_requests([str(tmp_path / "bad.txt")], [str(tmp_path / "good.txt")])


def test_questions_are_made_of_a_sets_rows(monkeypatch):
    def rows(*answers):
        return [
            Record(
                f"aclsum:{n}",
                "",
                messages=({"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": text}),
            )
            for n, text in enumerate(answers)
        ]

    monkeypatch.setattr(sets, "rows_of", lambda name: rows(*"abcdefab"))
    found = sets.questions_of("aclsum")
    assert [question.choices[question.answer] for question in found] == list("abcdefab")
    assert all(len(set(question.choices)) == 4 for question in found)
    assert len({question.answer for question in found}) > 1 and found == sets.questions_of("aclsum")
    monkeypatch.setattr(sets, "rows_of", lambda name: rows("yes", "no", "yes"))
    assert [set(question.choices) for question in sets.questions_of("imdb")] == [{"yes", "no"}] * 3
