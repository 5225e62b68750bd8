"""Prompts out of rows of every format, and rows that cannot be asked."""

import json

import pytest

from minitune.data.prompts import read_prompts
from minitune.errors import DataError


def turn(role, content):
    return {"role": role, "content": content}


ASKED = (turn("user", "Hi"),)
LONG = (turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", "Go on"))


@pytest.mark.parametrize(
    "row, messages, text",
    [
        ({"prompt": "Hi"}, ASKED, "Hi"),
        ({"prompt": "Hi", "answer": "unread"}, ASKED, "Hi"),
        ({"prompt": "Hi", "system": "S"}, (turn("system", "S"), *ASKED), None),
        ({"prompt": LONG}, LONG, None),
        ({"messages": LONG}, LONG, None),
        ({"messages": [*LONG, turn("assistant", "No")], "system": "S"}, (turn("system", "S"), *LONG), None),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ASKED, None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]}, ASKED, None),
        ({"prompt": "1 + 1 =", "completion": " 2"}, None, "1 + 1 ="),
        ({"prompt": ASKED, "completion": [turn("assistant", "x")]}, ASKED, None),
        ({"prompt": ASKED, "chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "y")]}, ASKED, None),
        ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, None, "1 + 1 ="),
        ({"prompt": LONG, "completion": [turn("assistant", "x")], "label": True}, LONG, None),
        ({"chosen": [*LONG, turn("assistant", "x")], "rejected": [*LONG, turn("assistant", "y")]}, LONG, None),
        ({"instruction": "Hi", "completions": [{"response": "x", "score": 1}, {"response": "y", "score": 2}]}, ASKED,
         "Below is an instruction that describes a task. Write a response that appropriately completes the request."
         "\n\n### Instruction:\nHi\n\n### Response:"),
    ],
)  # fmt: skip
def test_the_prompt_is_what_precedes_the_answer(tmp_path, row, messages, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (record,) = read_prompts(path)
    assert (record.messages, record.prompt, record.completion) == (messages, text, None)
    assert record.origin == f"{path}:1"


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Hi\n\nWhat\u2028now?\n")
    assert [(record.origin, record.prompt) for record in read_prompts(path)] == [
        (f"{path}:1", "Hi"),
        (f"{path}:3", "What\u2028now?"),
    ]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": " "}, "a row without a question"),
        ({"prompt": 3}, "the field 'prompt' is an int, not text"),
        ({"prompt": []}, "the field 'prompt' is not a list of turns"),
        ({"promt": "Hi"}, "did you mean 'prompt' for 'promt'"),
        ({"messages": [turn("user", "a"), turn("user", "b")]}, "roles in the wrong order"),
        ({"text": "a text"}, "a text without a question"),
        ({"prompt": [turn("assistant", "a")]}, "roles in the wrong order"),
        ({"prompt": [turn("system", "a")]}, "roles in the wrong order"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, row, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:1.*{problem}"):
        read_prompts(path)


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file is empty"):
        read_prompts(tmp_path / "empty.jsonl")
