"""Ways of asking: what is asked, which way is chosen by which rows, and what may not be chosen by."""

import json

import pytest

from minitune.data.formats import Record
from minitune.errors import ConfigError, DataError
from minitune.evaluation.choices import Question
from minitune.evaluation.classification import LabelledPrompt
from minitune.evaluation.prompting import (
    Chosen,
    Search,
    Way,
    choose,
    default_ways,
    examples,
    question_of,
    read_ways,
    reworded,
    search_of,
    stops,
)
from minitune.evaluation.scores import Measured, mean_of, share


def turns(*pairs):
    return tuple({"role": role, "content": text} for role, text in pairs)


def labelled(number, label=None, system="Sort."):
    prompt = turns(("system", system), ("user", f"Text {number} {{}}"))
    return LabelledPrompt(prompt, label or ("odd" if number % 2 else "even"), f"rows:{number}")


def test_a_question_keeps_its_text_and_its_answer_in_every_way():
    row, shots = labelled(1), [labelled(2), labelled(3)]
    way = Way("w", "Say odd or even: {}!", None, 2)
    found = reworded(row, way, shots, chat=True)
    assert found.label == "odd" and found.origin == "rows:1"
    assert found.prompt == turns(
        ("system", "Sort."),
        ("user", "Say odd or even: Text 2 {}!"), ("assistant", "even"),
        ("user", "Say odd or even: Text 3 {}!"), ("assistant", "odd"),
        ("user", "Say odd or even: Text 1 {}!"),
    )  # fmt: skip
    assert reworded(row, Way("none", "{}", ""), chat=True).prompt == turns(("user", "Text 1 {}"))
    assert reworded(row, Way("own", "{}", "New."), chat=True).prompt[0]["content"] == "New."
    assert reworded(row, Way("same"), chat=True) == row


def test_chats_of_several_turns_texts_and_choices_are_asked_in_another_way_too():
    chat = Record(
        "r:1", "", messages=turns(("user", "Hi."), ("assistant", "Hello."), ("user", "A?"), ("assistant", "B."))
    )
    shot = Record("r:2", "", messages=turns(("user", "C?"), ("assistant", "D.")))
    found = reworded(chat, Way("w", "Q: {}", "S", 1), [shot], chat=True)
    assert [turn["content"] for turn in found.messages] == ["S", "Q: C?", "D.", "Hi.", "Hello.", "Q: A?", "B."]
    text, before = (
        Record("t:1", "", prompt="One:", completion=" two"),
        Record("t:2", "", prompt="Ten: ", completion="11"),
    )
    found = reworded(text, Way("w", "{}", "Count.", 1), [before], chat=True)
    assert (found.prompt, found.completion) == ("Count.\n\nTen: 11\n\nOne:", " two")
    question = Question("q:1", "Why?", ("this", "that"), 1)
    assert question_of(question) == ("Why?", "that")
    assert reworded(question, Way("w", "Q: {}"), chat=False).prompt == "Q: Why?"
    assert reworded(question, Way("w", "Q: {}", "S"), chat=True).prompt == turns(("system", "S"), ("user", "Q: Why?"))


def test_the_best_way_on_the_validation_rows_is_chosen_and_its_examples_are_not_asked():
    ways = (Way("plain"), Way("good", "good {}", None, 2), Way("also", "good {}"), Way("long", "good {}", None, 4))
    seen = []

    def measure(rows, stop):
        seen.append([row.origin for row in rows])
        asked = [row.prompt[-1]["content"].startswith("good") for row in rows]
        return {"length": Measured(mean_of([9.0] * len(rows)), better=None), "accuracy": share(asked)}

    said = []
    search = Search(ways, tuple(labelled(n) for n in (1, 3, 5, 2, 4, 6)))
    chosen = choose(search, measure, chat=True, say=said.append)
    assert chosen.way == ways[1]  # the first of the three that are right everywhere
    assert [row.origin for row in chosen.shots] == ["rows:1", "rows:2", "rows:3", "rows:4"]  # of each label in turn
    assert seen == [["rows:5", "rows:6"]] * 4 and chosen.rows == 2
    assert dict(chosen.tried)["plain, 0 examples"] == {"accuracy": 0.0}
    assert said[1] == "  good, 2 examples: accuracy 1"
    asked = chosen.ask(labelled(8), chat=True)
    assert [turn["content"] for turn in asked.prompt[1:]] == [
        "good Text 1 {}", "odd", "good Text 2 {}", "even", "good Text 8 {}",
    ]  # fmt: skip
    assert json.loads(json.dumps(chosen.described()))["validation_rows"] == 2


def test_an_answer_after_examples_in_a_text_ends_where_the_next_one_would_begin():
    shots = [LabelledPrompt("Text 2:", "even", "r:2", True), LabelledPrompt("Text 3:", "odd", "r:3", True)]
    rows = [LabelledPrompt(f"Text {n}:", "odd", f"r:{n}", True) for n in (5, 7)]
    seen = []

    def measure(rows, stop):
        seen.append(stop)
        return {"accuracy": share([bool(stop)] * len(rows))}

    search = Search((Way("plain"), Way("shown", shots=2)), tuple(rows))
    chosen = choose(search, measure, chat=True, shots=shots)
    assert seen == [(), ("\n\n",)] and chosen.stop == ("\n\n",)
    assert stops([labelled(1)]) == () == Chosen(Way("plain"), tuple(shots)).stop  # chats have turns, none has examples
    assert stops([Record("r", "", prompt="a", completion="one\n\ntwo")]) == ()  # it is part of answers here


def test_ways_that_do_not_fit_are_left_out_and_examples_are_not_asked_again():
    def measure(rows, stop):
        if len(rows[0].prompt) > 4:
            raise DataError("prompt 1 has 9 tokens")
        return {"accuracy": share([True] * len(rows))}

    said, ways = [], (Way("long", shots=2), Way("short"))
    rows = (labelled(1), labelled(2), labelled(1, system="Again."), labelled(4))
    chosen = choose(Search(ways, rows), measure, chat=True, say=said.append)
    assert chosen.way.name == "short" and chosen.rows == 1  # the third asks what the first one shows
    assert said[0] == "  long, 2 examples: left out (prompt 1 has 9 tokens)"
    assert dict(chosen.tried)["long, 2 examples"] == {}
    with pytest.raises(DataError, match="every validation row asks what one of the examples asks"):
        choose(Search(ways, rows[:3]), measure, chat=True)
    with pytest.raises(ConfigError, match="length: more is neither good nor bad"):
        choose(Search((Way("a"),), rows), lambda *_: {"length": Measured(mean_of([1.0]), better=None)}, chat=True)


def test_metrics_that_should_be_low_count_as_such_and_ties_go_to_the_next():
    ways = (Way("a"), Way("b", "b{}"), Way("c", "c{}"))
    scores = {"T": (1.0, 3.0), "b": (1.0, 2.0), "c": (0.0, 9.0)}

    def measure(rows, stop):
        first, loss = scores[rows[0].prompt[-1]["content"][0]]
        return {"first": Measured(mean_of([first])), "loss": Measured(mean_of([loss]), better="lower")}

    assert choose(Search(ways, (labelled(1),)), measure, chat=True).way.name == "b"


def test_rows_to_choose_by_must_not_be_test_rows():
    test = [labelled(n) for n in range(5)]
    with pytest.raises(DataError, match=r"rows:3 asks what the test row rows:3 asks, and 1 more rows do"):
        search_of(None, [labelled(n, system="Other.") for n in (7, 3, 4, *range(20, 40))], test)
    assert len(search_of(None, [labelled(n) for n in range(20, 40)], test, ("odd", "even")).ways) == 9
    with pytest.raises(DataError, match="8 validation rows and up to 8 are shown"):
        search_of(None, [labelled(n) for n in range(20, 28)], test)


def write(tmp_path, *rows):
    path = tmp_path / "ways.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_ways_come_from_a_file(tmp_path):
    path = write(tmp_path, {"user": "{}?", "system": ""}, {"user": "Label {}.", "name": "label", "shots": 3})
    assert [(w.name, w.user, w.system, w.shots) for w in read_ways(path)] == [
        ("{}?", "{}?", "", 0), ("label", "Label {}.", None, 3),
    ]  # fmt: skip
    one = write(tmp_path, {"user": "{}?"})
    given = search_of(one, [], [labelled(1)])
    assert choose(given, None, chat=True) == Chosen(given.ways[0])  # nothing is measured to take the only way
    assert [way.name for way in search_of(one, [labelled(2)], [labelled(1)]).ways] == ["as the rows ask", "{}?"]
    assert search_of(None, [], [labelled(1)]) is None
    assert len(default_ways()) == 3


@pytest.mark.parametrize(
    "rows, line",
    [
        ([{"user": "no mark"}], r"ways.jsonl:1: 0 times {} in 'user'"),
        ([{"user": "{} and {}"}], "2 times {} in 'user'"),
        ([{"user": " "}], "a row without a way of asking"),
        ([{"user": 3}], "the field 'user' is an int, not text"),
        ([{"user": "{}", "shots": -1}], "'shots' is no number of examples"),
        ([{"user": "{}", "shots": "many"}], "'shots' is no number of examples"),
        ([{"user": "{}", "shots": 2.5}], "'shots' is no number of examples"),
        ([{"user": "{}", "shot": 2}], "did you mean 'shots'"),
        ([{"user": "{}", "system": 1}], "the field 'system' is an int, not text"),
        ([{"prompt": "{}"}], "fit no format"),
        ([{"user": "{}"}, {"user": "{}"}], "two ways of asking are called"),
    ],
)
def test_ways_that_are_none_are_refused(tmp_path, rows, line):
    with pytest.raises(DataError, match=line):
        read_ways(write(tmp_path, *rows))


def test_several_ways_or_examples_need_rows_to_choose_by(tmp_path):
    for rows in ([{"user": "{}", "shots": 2}], [{"user": "{}!"}, {"user": "{}?"}]):
        with pytest.raises(ConfigError, match="give --validation rows"):
            search_of(write(tmp_path, *rows), [], [labelled(1)])


def test_examples_are_of_each_answer_in_turn():
    rows = [labelled(n, "abc"[n // 4]) for n in range(12)]
    assert [row.label for row in examples(rows, 7)] == ["a", "b", "c", "a", "b", "c", "a"]
    assert len(examples(rows, 99)) == 12
