"""Preference rows: what each format becomes, by hand and by TRL's own helpers, and what is refused in which words."""

import json

import pytest

from minitune.data.formats import READERS, file_kind, kind_of, read_records, scan_records
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.reading import RowError
from minitune.errors import ConfigError, DataError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture
def read(tmp_path):
    """Return a function that writes rows to a file and reads them back as records of a kind."""

    def read(*rows, kind="pairs", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_records(path, formats=FORMATS_OF[kind], **options)

    return read


def chats(record):
    """Return each side as (turns of the prompt, turns of the answer), as texts with the role's initial."""
    texts = [[f"{m['role'][0]}:{m['content']}" for m in side.messages] for side in record.sides]
    return [(text[: side.context], text[side.context :]) for side, text in zip(record.sides, texts, strict=True)]


def test_texts_stay_texts(read):
    (record,) = read({"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "margin": 1.5})
    assert [(side.prompt, side.completion, side.messages) for side in record.sides] == [
        ("2+2=", " 4", None), ("2+2=", " 5", None),
    ]  # fmt: skip
    assert (record.margin, record.desirable, record.tied, record.format) == (1.5, None, False, "pairs")
    assert record.origin.endswith("rows.jsonl:1")


TURNS = [([("u:a"), "a:b", "u:c"], ["a:yes"]), (["u:a", "a:b", "u:c"], ["a:no"])]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("yes")], "rejected": [bot("no")]},
        {"prompt": [user("a"), bot("b"), user("c")], "chosen": "yes", "rejected": "no"},
        {
            "chosen": [user("a"), bot("b"), user("c"), bot("yes")],
            "rejected": [user("a"), bot("b"), user("c"), bot("no")],
        },
        {
            "prompt": "c ",  # UltraFeedback's binarised form repeats a question as text
            "chosen": [user("a"), bot("b"), user("c"), bot("yes")],
            "rejected": [user("a"), bot("b"), user("c"), bot("no")],
        },
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, user("c")],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
        },
        {"instruction": "c", "history": [["a", "b"]], "chosen": "yes", "rejected": "no"},
    ],
)
def test_seven_ways_to_write_one_pair(read, row):
    (record,) = read(row)
    assert chats(record) == TURNS
    (with_system,) = read(row | {"system": "s"})
    assert chats(with_system) == [(["s:s", *asked], answer) for asked, answer in TURNS]


def test_an_instruction_is_a_chat_or_alpacas_text(read):
    (record,) = read({"instruction": "c", "input": "d", "chosen": "yes", "rejected": "no"})
    assert chats(record) == [(["u:c\nd"], ["a:yes"]), (["u:c\nd"], ["a:no"])]
    assert record.sides[0].prompt == record.sides[1].prompt
    assert record.sides[0].prompt.endswith("### Instruction:\nc\n\n### Input:\nd\n\n### Response:")
    assert [side.completion for side in record.sides] == ["yes", "no"]


def test_a_text_prompt_before_answers_in_turns_is_a_question(read):
    (record,) = read({"prompt": "c", "chosen": [bot("yes")], "rejected": [bot("no")]})
    assert chats(record) == [(["u:c"], ["a:yes"]), (["u:c"], ["a:no"])]


CONVERSATIONS = [
    ([user("a"), bot("b")], [user("a"), bot("c")]),
    ([SYSTEM, user("a"), bot("b"), user("c"), bot("d")], [SYSTEM, user("a"), bot("b"), user("c"), bot("e")]),
    ([user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("x"), user("c"), bot("d")]),
    ([user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("x")]),
]


@pytest.mark.parametrize(("chosen", "rejected"), CONVERSATIONS)
def test_the_implicit_prompt_is_trls(read, chosen, rejected):
    data_utils = pytest.importorskip("trl.data_utils")
    expected = data_utils.maybe_extract_prompt({"chosen": chosen, "rejected": rejected})
    (record,) = read({"chosen": chosen, "rejected": rejected})
    for side, name in zip(record.sides, ("chosen", "rejected"), strict=True):
        assert list(side.messages[: side.context]) == expected["prompt"]
        assert list(side.messages[side.context :]) == expected[name]


def test_answers_that_begin_alike_keep_their_words(read):
    """A prefix of characters, as TRL finds in texts, would move "I" into the prompt."""
    dialogue = "\n\nHuman: a\n\nAssistant: I {}"
    (record,) = read({"chosen": dialogue.format("do"), "rejected": dialogue.format("don't")})
    assert chats(record) == [(["u:a"], ["a:I do"]), (["u:a"], ["a:I don't"])]


def test_judged_rows_are_trls_unpaired_ones(read):
    data_utils = pytest.importorskip("trl.data_utils")
    from datasets import Dataset

    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": "d", "rejected": "s"}]
    unpaired = list(data_utils.unpair_preference_dataset(Dataset.from_list(rows)))
    records = read(*unpaired, kind="judged")
    pairs = read(*rows)
    assert {(r.sides[0].prompt, r.sides[0].completion, r.desirable) for r in records} == {
        (side.prompt, side.completion, good)
        for pair in pairs
        for side, good in zip(pair.sides, (True, False), strict=True)
    }


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("a")], "completion": [bot("b")]},
        {"prompt": [user("a")], "completion": "b"},
        {"messages": [user("a"), bot("b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [user("a")], "completion": bot("b")},
        {"instruction": "a", "output": "b"},
    ],
)
@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_judged_answers(read, row, label):
    (record,) = read(row | {"label": label}, kind="judged")
    assert chats(record) == [(["u:a"], ["a:b"])]
    assert record.desirable is (str(label).lower() == "true")


def test_only_the_last_answer_of_a_judged_chat_is_judged(read):
    (record,) = read({"messages": [SYSTEM, user("a"), bot("b"), user("c"), bot("d")], "label": False}, kind="judged")
    assert chats(record) == [(["s:s", "u:a", "a:b", "u:c"], ["a:d"])]


def scored(*scores, name="overall_score"):
    return [{"response": f"r{i}", name: score, "model": "m"} for i, score in enumerate(scores)]


def test_the_best_and_the_worst_of_a_scored_list(read):
    (record,) = read({"instruction": "q", "completions": scored(3, 9.5, 1, 9.5), "models": ["m"]})
    assert chats(record) == [(["u:q"], ["a:r1"]), (["u:q"], ["a:r2"])]
    assert (record.margin, record.tied, record.format, record.unread) == (8.5, False, "scored", ("models",))
    (record,) = read({"prompt": "q", "completions": scored(3, 4, name="score")})
    assert [(side.prompt, side.completion) for side in record.sides] == [("q", "r1"), ("q", "r0")]
    (record,) = read({"prompt": "q", "completions": scored(3, 3)})
    assert record.tied


def test_two_scores_are_a_margin(read):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (record,) = read(row | {"score_chosen": 7.5, "score_rejected": 5})
    assert (record.margin, record.tied) == (2.5, False)
    (tied,) = read(row | {"score_chosen": 5, "score_rejected": 5.0})
    assert tied.tied
    (given,) = read(row | {"margin": 0})  # said by hand, it is a pair all the same
    assert (given.margin, given.tied) == (0, False)


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
ASKED, PARTING = "\n\nHuman: a\n\nAssistant:", [user("x"), bot("c")]
WHOLE = {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR | {"chosen": ""}, "a row without an answer; fill in chosen"),
        (PAIR | {"rejected": " \n"}, "a row without an answer; fill in rejected"),
        (PAIR | {"prompt": " "}, "a row without a question; fill in prompt"),
        (PAIR | {"chosen": None}, "the field 'chosen' is missing"),
        (PAIR | {"rejected": 3}, "the field 'rejected' is not a list of turns"),
        (PAIR | {"prompt": 3}, "the field 'prompt' is not a list of turns"),
        (PAIR | {"rejected": "b\0"}, "the field 'rejected' holds a NUL character"),
        (PAIR | {"margn": 1}, "unknown field 'margn'; did you mean 'margin'"),
        (PAIR | {"margin": float("nan")}, "the field 'margin' is not a finite number"),
        (PAIR | {"margin": float("inf")}, "the field 'margin' is not a finite number"),
        (PAIR | {"margin": "much"}, "the field 'margin' is not a finite number"),
        (PAIR | {"margin": True}, "the field 'margin' is not a finite number"),
        (PAIR | {"margin": 10**400}, "the field 'margin' is not a finite number"),
        (PAIR | {"margin": -1}, "a chosen answer that is judged the worse"),
        (PAIR | {"score_chosen": 1, "score_rejected": 2}, "a chosen answer that is judged the worse"),
        (PAIR | {"score_chosen": 1}, "a score for one side only"),
        (PAIR | {"score_chosen": 2, "score_rejected": 1, "margin": 1}, "a margin beside scores"),
        (PAIR | {"instruction": "q"}, "more than one prompt (prompt, instruction)"),
        (PAIR | {"input": "x"}, "the field 'input' without an instruction"),
        (PAIR | {"system": "x"}, "a system field beside a prompt that is text; call the prompt instruction"),
        (PAIR | {"tools": "[{}]"}, "the field 'tools' is not supported"),
        ({"chosen": "a", "rejected": "b"}, "the field 'chosen' is a text without a prompt; add the field prompt"),
        ({"chosen": ASKED, "rejected": ASKED + " b"}, "(turn 2): a row without an answer"),
        ({"chosen": "x\n\nHuman: a", "rejected": "\n\nHuman: a"}, "the field 'chosen' is a text without a prompt"),
        (WHOLE | {"rejected": [user("b"), bot("c")]}, "two conversations that begin differently"),
        (WHOLE | {"rejected": [bot("c")]}, "two conversations that begin differently"),
        (WHOLE | {"prompt": "b"}, "a prompt that is not in the conversations"),
        (WHOLE | {"rejected": []}, "the field 'rejected' is not a list of turns"),
        (WHOLE | {"rejected": [user("a"), bot("")]}, "(turn 2): a row without an answer"),
        (WHOLE | {"chosen": [SYSTEM, *WHOLE["chosen"]], "rejected": [SYSTEM, *PARTING]}, "answers that begin with"),
        (WHOLE | {"prompt": [user("x")]}, "answers that begin with a question"),
        ({"prompt": WHOLE["chosen"], "chosen": [bot("c")], "rejected": [bot("d")]}, "assistant where user is due"),
        ({"instruction": "q", "chosen": [bot("c")], "rejected": "d"}, "the field 'chosen' is a list, not text"),
        ({"prompt": "q", "completions": scored(1)}, "is not a list of two or more scored answers"),
        ({"prompt": "q", "completions": "xy"}, "is not a list of two or more scored answers"),
        ({"prompt": "q", "completions": ["x", "y"]}, "is not a list of two or more scored answers"),
        ({"prompt": "q", "completions": scored(1, None)}, "a completion without a score"),
        ({"prompt": "q", "completions": scored(1, "N/A")}, "the field 'overall_score' is not a finite number"),
        ({"prompt": "q", "completions": [{"text": "x", "score": 1}, {"score": 2}]}, "the field 'response' is missing"),
    ],
)  # fmt: skip
def test_pairs_that_are_refused(read, row, expected):
    with pytest.raises(DataError) as caught:
        read(row)
    line = str(caught.value)
    assert "rows.jsonl:1" in line and "\n" not in line
    assert expected in line


JUDGED = {"prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (JUDGED | {"label": 1}, "the field 'label' is an int, not true or false"),
        (JUDGED | {"label": None}, "the field 'label' is null, not true or false"),
        (JUDGED | {"label": "good"}, "the field 'label' is a str, not true or false"),
        (JUDGED | {"completion": ""}, "a row without an answer; fill in completion"),
        (JUDGED | {"chosen": "a"}, "the field 'chosen' is not supported; learn preference pairs with --objective dpo"),
        ({"prompt": "q", "completions": "a", "label": True}, "did you mean 'completion'"),
        ({"prompt": "q", "label": True}, "the field 'completion' is missing"),
        ({"completion": "a", "label": True}, "the field 'prompt' is missing"),
        ({"completion": [bot("a")], "label": True}, "the field 'prompt' is missing"),
        ({"messages": [bot("a")], "label": True}, "the field 'prompt' is missing"),
        ({"messages": [user("a")], "label": True}, "the field 'prompt' is missing"),
        ({"messages": [user("a"), bot("b"), user("c")], "label": True}, "answers that begin with a question"),
    ],
)
def test_judged_rows_that_are_refused(read, row, expected):
    with pytest.raises(DataError) as caught:
        read(row, kind="judged")
    line = str(caught.value)
    assert "rows.jsonl:1" in line and "\n" not in line
    assert expected in line


def test_a_later_row_without_its_field(read, tmp_path):
    for kind, rows, name in (
        ("pairs", [PAIR, {"prompt": "q", "chosen": "a", "rejectd": "b"}], "rejected"),
        ("pairs", [{"prompt": "q", "completions": scored(1, 2)}, {"prompt": "q"}], "completions"),
        ("judged", [JUDGED, {"prompt": "q", "completion": "a"}], "label"),
    ):
        with pytest.raises(DataError, match=f"rows.jsonl:2: .*'{name}'"):
            read(*rows, kind=kind)
    found = list(scan_records(tmp_path / "rows.jsonl", formats=FORMATS_OF["judged"]))
    assert [isinstance(row, RowError) for row in found] == [False, True]


ROWS = {
    "examples": [{"prompt": "q", "completion": "a"}, {"messages": [user("a")]}, {"text": "a", "label": "true"}],
    "pairs": [PAIR, WHOLE, {"instruction": "q", "completions": []}, {"conversations": [], "chosen": 1, "rejected": 1}],
    "judged": [JUDGED, {"messages": [user("a")], "label": False}, {"instruction": "a", "output": "b", "label": "true"}],
}  # fmt: skip


@pytest.mark.parametrize("wanted", ROWS)
def test_the_wrong_kind_names_the_fields_and_the_objective(read, tmp_path, wanted):
    for kind, rows in ROWS.items():
        for row in rows:
            assert kind_of(row) == kind
            if kind == wanted or (kind == "examples" and "label" in row):
                continue
            with pytest.raises(DataError) as caught:
                read(row, kind=wanted)
            line = str(caught.value)
            assert file_kind(tmp_path / "rows.jsonl") == kind
            assert f"--objective {READERS[kind][1].split()[0]}" in line, line
            assert "\n" not in line
    with pytest.raises(DataError, match="fit no format; did you mean 'rejected' for 'rejectd'"):
        read({"prompt": "q", "chosen": "a", "rejectd": "b"})
    assert kind_of({"question": "a"}) is None


def test_columns_and_formats_are_of_the_kind(read, tmp_path):
    row = {"question": "q", "good": "a", "bad": "b"}
    (record,) = read(row, columns={"instruction": "question", "chosen": "good", "rejected": "bad"})
    assert chats(record) == [(["u:q"], ["a:a"]), (["u:q"], ["a:b"])]
    assert file_kind(tmp_path / "rows.jsonl", {"chosen": "good", "rejected": "bad"}) == "pairs"
    assert file_kind(tmp_path / "rows.jsonl") == "examples" == file_kind(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="unknown format 'alpaca'; known: pairs, scored"):
        read(PAIR, format="alpaca")
    with pytest.raises(DataError, match="fit pairs and scored; choose one with format"):
        read(PAIR | {"completions": scored(1, 2)})
    (record,) = read(PAIR | {"completions": scored(1, 2)}, format="scored")
    assert record.margin == 1


def test_a_csv_file_of_pairs_and_of_labels(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,margin\nq,a,b,0.5\nq,a,c,\n")
    assert [r.margin for r in read_records(tmp_path / "a.csv", formats=FORMATS_OF["pairs"])] == [0.5, None]
    (tmp_path / "b.csv").write_text("prompt,completion,label\nq,a,True\nq,b,false\n")
    assert [r.desirable for r in read_records(tmp_path / "b.csv", formats=FORMATS_OF["judged"])] == [True, False]
