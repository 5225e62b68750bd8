"""What a teacher is asked, what is read out of its replies, and what is kept; values are worked out by hand."""

import json

import pytest

from minitune.curation import synthesis
from minitune.curation.synthesis import Recipe, Rejected, Row
from minitune.data.formats import read_records
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError

SEEDS = [Row(f"question {i}", f"answer {i}", f"seeds.jsonl:{i + 1}") for i in range(6)]


def read(text, finished=True, reply="json_lines", per_seed=3):
    recipe = Recipe("write", reply=reply, per_seed=per_seed)
    rows, rejected = synthesis.read_rows_of(Reply(text, finished), SEEDS[0], recipe)
    return [(row.question, row.answer) for row in rows], [(one.reason, one.text) for one in rejected]


def test_a_request_shows_its_seed_first_and_others_beside_it():
    recipe = Recipe("Write tasks.", per_seed=4, examples=3, rounds=2, seed=1)
    asked = synthesis.requests(SEEDS, recipe)
    assert [seed for seed, _ in asked] == [seed for seed in SEEDS for _ in range(2)]
    texts = [conversation[0]["content"] for _, conversation in asked]
    assert len(set(texts)) == 12 and synthesis.requests(SEEDS, recipe) == asked
    for (seed, _), text in zip(asked, texts, strict=True):
        instruction, shown, form = text.split("\n\n")
        rows = [json.loads(line) for line in shown.split("\n")[1:]]
        assert instruction == "Write tasks." and rows[0] == {"instruction": seed.question, "output": seed.answer}
        assert len({row["instruction"] for row in rows}) == 3 and "Reply with 4 lines and nothing else" in form
    assert synthesis.requests(SEEDS, Recipe("Write tasks.", per_seed=4, rounds=2, seed=2)) != asked


def test_every_other_seed_is_shown_about_as_often():
    shown = {}
    for _, conversation in synthesis.requests(SEEDS, Recipe("x", examples=2, rounds=5)):
        for line in conversation[0]["content"].split("\n\n")[1].split("\n")[1:]:
            shown[line] = shown.get(line, 0) + 1
    assert sorted(shown.values()) == [10] * 6  # all 5 draws of each: itself 5 times, and beside each other one once


def test_a_list_is_asked_for_without_answers():
    ((_, conversation), *_) = synthesis.requests(SEEDS, Recipe("x", reply="numbered_list", examples=2))
    text = conversation[0]["content"]
    assert "1. question 0\n2. question" in text and "answer" not in text and "numbered list of 3 items" in text


@pytest.mark.parametrize(
    "recipe, expected",
    [
        (Recipe("x", examples=7), "examples is 7, but there are only 6 seeds"),
        (Recipe("x", examples=1, rounds=2), "in only 1 way, and the same request brings the same rows"),
        (Recipe("x", examples=6, rounds=2), "in only 1 way"),
        (Recipe("x", examples=2, rounds=6), "in only 5 ways"),
    ],
)
def test_too_few_seeds_for_what_is_asked(recipe, expected):
    with pytest.raises(ConfigError, match=expected):
        synthesis.requests(SEEDS, recipe)


@pytest.mark.parametrize("options", [{"instruction": " "}, {"per_seed": 0}, {"examples": 0}, {"rounds": 0}])
def test_recipes_without_meaning(options):
    with pytest.raises(ConfigError):
        Recipe(**{"instruction": "x", **options})


GOOD = '{"instruction": "Why?", "output": "So."}'


@pytest.mark.parametrize(
    "text, rows, rejected",
    [
        (GOOD, [("Why?", "So.")], []),
        (f"\n{GOOD}\r\n\n", [("Why?", "So.")], []),
        (f"```json\n{GOOD}\n```", [("Why?", "So.")], []),
        ('{"output": " So.\\n", "instruction": "Why?"}', [("Why?", "So.")], []),
        (f"Here you are:\n{GOOD}", [("Why?", "So.")], [("not JSON", "Here you are:")]),
        (f"[{GOOD}]", [], [("other fields", f"[{GOOD}]")]),
        ('{"instruction": "Why?"}', [], [("other fields", '{"instruction": "Why?"}')]),
        ('{"question": "Why?", "output": "x"}', [], [("other fields", '{"question": "Why?", "output": "x"}')]),
        (GOOD[:-1] + ', "label": true}', [], [("other fields", GOOD[:-1] + ', "label": true}')]),
        (GOOD[:-1] + ', "output": "No."}', [], [("not JSON", GOOD[:-1] + ', "output": "No."}')]),
        (GOOD.replace("So.", " "), [], [("no row that trains", GOOD.replace("So.", " "))]),
        (GOOD.replace('"So."', "5"), [], [("no row that trains", GOOD.replace('"So."', "5"))]),
        (GOOD.replace("So", "\\u0000"), [], [("no row that trains", GOOD.replace("So", "\\u0000"))]),
        (GOOD.replace("So", "\\ud83d"), [], [("not JSON", GOOD.replace("So", "\\ud83d"))]),
        (f"{GOOD} {GOOD}", [], [("not JSON", f"{GOOD} {GOOD}")]),
        (GOOD.replace('"', "'"), [], [("not JSON", GOOD.replace('"', "'"))]),
        ('{"instruction": "Why?",\n"output": "So."}', [],
         [("not JSON", '{"instruction": "Why?",'), ("not JSON", '"output": "So."}')]),
        ("", [], [("an empty reply", "")]),
        (" \n\n", [], [("an empty reply", "")]),
    ],
)  # fmt: skip
def test_json_lines_are_read_strictly(text, rows, rejected):
    assert read(text) == (rows, rejected)


def test_the_half_line_of_a_reply_that_was_cut_off_is_no_row():
    assert read(f"{GOOD}\n{GOOD[:20]}", finished=False) == ([("Why?", "So.")], [("cut off", GOOD[:20])])
    assert read(f"{GOOD}\n{GOOD}", finished=False) == ([("Why?", "So.")] * 2, [])  # both are whole


def test_surplus_rows_are_not_taken():
    rows, rejected = read("\n".join([GOOD] * 4))
    assert len(rows) == 3 and [reason for reason, _ in rejected] == ["more rows than asked for"]


@pytest.mark.parametrize(
    "text, rows, rejected",
    [
        ("1. Why?\n2. How?", ["Why?", "How?"], []),
        ("1) Why?\n\n2) How?\n", ["Why?", "How?"], []),
        ("Sure:\n1. Why?", ["Why?"], [("text before the list", "Sure:")]),
        ("1. Why?\nBecause.\n2. How?", ["How?"], [("an item of several lines", "Why?\nBecause.")]),
        ("1. Why?\n\nI hope\nthis helps", [], [("an item of several lines", "Why?\nI hope\nthis helps")]),
        ("1. Why?\n3. How?", [], [("an item of several lines", "Why?\n3. How?")]),
        ("1. Why?\n1. How?", [], [("an item of several lines", "Why?\n1. How?")]),
        ("2. Why?", [], [("text before the list", "2. Why?")]),
        ("- Why?", [], [("text before the list", "- Why?")]),
        ("1.Why?", [], [("text before the list", "1.Why?")]),
        ("1. 4. Why?\n2. How?", ["How?"], [("an unusable item", "1. 4. Why?")]),
        ("1. Wh\0y?", [], [("an unusable item", "1. Wh\0y?")]),
    ],
)
def test_numbered_lists_are_read_strictly(text, rows, rejected):
    assert read(text, reply="numbered_list") == ([(row, "") for row in rows], rejected)


def test_the_last_item_of_a_list_that_was_cut_off_is_no_question():
    assert read("1. Why?\n2. Ho", False, "numbered_list") == ([("Why?", "")], [("cut off", "Ho")])


def test_answers_of_the_teacher():
    row = Row("Why?", "", "s:1", "Be kind.")
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}
    assert synthesis.answer_request(row) == [system, user]
    assert synthesis.with_answer(row, Reply(" So. ", True)) == Row("Why?", "So.", "s:1", "Be kind.")
    for reply, reason in ((Reply("So", False), "cut off"), (Reply(" ", True), "an empty answer"),
                          (Reply("a\0b", True), "no row that trains")):  # fmt: skip
        found = synthesis.with_answer(row, reply)
        assert isinstance(found, Rejected) and found.reason == reason and found.row.question == "Why?"


def test_seeds_of_every_format_become_questions_and_answers(tmp_path):
    lines = {
        "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
        "messages": {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello"}]},
        "prompt": {"prompt": "Once", "completion": " upon"},
    }  # fmt: skip
    found = {}
    for name, line in lines.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(line))
        (found[name],) = synthesis.read_seeds(path)
    assert (found["alpaca"].question, found["alpaca"].answer) == ("Add.\n1 2", "3")
    assert (found["messages"].question, found["messages"].system) == ("Hi", "Be kind.")
    assert (found["prompt"].question, found["prompt"].answer) == ("Once", " upon")
    turns = [*lines["messages"]["messages"], *lines["messages"]["messages"][1:]]
    for line, expected in (({"messages": turns}, "this is 4 turns"), ({"text": "x"}, "this is plain text")):
        path.write_text(json.dumps(line))
        with pytest.raises(DataError, match=f":1: a seed is one question and its answer, {expected}"):
            synthesis.read_seeds(path)


def test_duplicates_of_seeds_and_of_earlier_rows():
    words = " ".join(f"word{i}" for i in range(40))  # 38 shingles of 3; one word changed at the end: 37 of 39 shared
    seeds = [Row("What is  RAIN?", "a", "s:1"), Row(words, "a", "s:2")]
    texts = ("what is rain?", "New", "new ", words + " end", "Other", " ".join(words.split()[:-1] + ["x"]))
    rows = [Row(text, "b", "s:1") for text in texts]
    kept, rejected = synthesis.without_duplicates(rows, seeds, 0.9)
    assert [row.question for row in kept] == ["New", "Other"]
    assert [(one.reason, one.details[:17]) for one in rejected] == [
        ("the question of a seed", "equal to 'What is"),
        ("the question of another row", "equal to 'New'"),
        ("nearly the question of a seed", "0.97 like 'word0 "),  # 38 of 39
        ("nearly the question of a seed", "0.95 like 'word0 "),  # 37 of 39
    ]
    kept, rejected = synthesis.without_duplicates(rows, seeds, None)
    assert len(kept) == 4 and len(rejected) == 2


def test_filters_keep_what_is_not_bad():
    rows = [Row("a", "yes", "s:1"), Row("b", "no", "s:2")]
    kept, rejected = synthesis.filtered(rows, "no such luck", lambda answer: answer == "no", "why")
    assert kept == rows[:1] and rejected == [Rejected("no such luck", "why", "s:2", rows[1])]
    assert synthesis.counts_of(rejected * 2) == {"no such luck": 2}
    assert rejected[0].fields() == {"reason": "no such luck", "details": "why", "seed": "s:2",
                                    "instruction": "b", "output": "no"}  # fmt: skip


def test_the_sample_for_review_is_drawn_by_hash():
    drawn = synthesis.review_sample(101, 0.1, 0)
    assert len(drawn) == 11 and drawn == sorted(set(drawn)) and drawn == synthesis.review_sample(101, 0.1, 0)
    assert drawn != synthesis.review_sample(101, 0.1, 1)
    assert synthesis.review_sample(5, 1.0, 0) == [0, 1, 2, 3, 4] and synthesis.review_sample(0, 0.1, 0) == []
    often = [sum(place in synthesis.review_sample(10, 0.2, seed) for seed in range(500)) for place in range(10)]
    assert all(60 < count < 140 for count in often)  # 100 each, of standard deviation 8.9


def test_rows_train_as_they_are_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(Row("Why?", "So.", "s:1", "Be kind.").fields() | {"synthetic": {"seed": "s:1"}}))
    (record,) = read_records(path)
    assert [turn["content"] for turn in record.messages] == ["Be kind.", "Why?", "So."]
    assert record.unread == ("synthetic",)
