"""The five formats: what each becomes, how it is told from the others, and what is refused in which words."""

import json

import pytest

from minitune.data.formats import read_records, scan_records
from minitune.data.reading import RowError
from minitune.errors import ConfigError, DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


@pytest.fixture
def read(tmp_path):
    """Return a function that writes rows to a file and reads them back as records."""

    def read(*rows, format="auto", columns=None):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_records(path, format, columns)

    return read


def test_messages(read):
    (record,) = read({"messages": CHAT})
    assert record.messages == tuple(CHAT)
    assert record.format == "messages"
    assert record.origin.endswith("rows.jsonl:1")


def test_sharegpt_equals_messages(read):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    (record,) = read({"conversations": turns})
    assert record.messages == tuple(CHAT)
    (by_field,) = read({"conversations": turns[1:], "system": "Be brief."})
    assert by_field.messages == tuple(CHAT)


def test_alpaca_as_chat_and_as_prompt_text(read):
    with_input, without = read(
        {"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Say hi.", "output": "hi"}
    )
    assert [m["content"] for m in with_input.messages] == ["Add.\n1 and 2", "3"]
    # tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT["prompt_input"] and ["prompt_no_input"]
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    assert without.prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:"
    )
    assert without.completion == "hi"


def test_alpaca_with_system_and_history(read):
    (record,) = read({"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]})
    assert [(m["role"], m["content"]) for m in record.messages] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip
    assert record.prompt is None


def test_prompt_completion_as_text_and_as_chat(read):
    (record,) = read({"prompt": "a", "completion": " b"})
    assert (record.prompt, record.completion, record.messages) == ("a", " b", None)
    (chat,) = read({"prompt": CHAT[:2], "completion": CHAT[2:]})
    assert chat.messages == tuple(CHAT)
    assert chat.context == 2


def test_text_and_unread_fields(read, tmp_path):
    (record,) = read({"text": "a", "url": "x", "label": 1})
    assert record.text == "a"
    assert record.unread == ("url", "label")
    assert not record.document
    (tmp_path / "a.txt").write_text("a\nb")
    (document,) = read_records(tmp_path / "a.txt")
    assert (document.text, document.document) == ("a\nb", True)


def test_columns_give_fields_our_names(read):
    (record,) = read({"q": "a", "answer": "b"}, columns={"prompt": "q", "completion": "answer"})
    assert (record.prompt, record.completion) == ("a", "b")
    (record,) = read({"prompt": "x", "q": "a", "completion": "b"}, columns={"prompt": "q"})
    assert record.prompt == "a"
    with pytest.raises(ConfigError, match="unknown field 'promt'; did you mean 'prompt'"):
        read({"q": "a"}, columns={"promt": "q"})
    with pytest.raises(DataError, match="no column 'ask'; did you mean 'asks'"):
        read({"asks": "a"}, columns={"prompt": "ask"})


def test_format_must_be_told_by_the_fields(read):
    with pytest.raises(DataError, match="'instruction', 'output', 'text' fit alpaca and text; choose one with format"):
        read({"instruction": "a", "output": "b", "text": "c"})
    (record,) = read({"instruction": "a", "output": "b", "text": "c"}, format="text")
    assert record.text == "c"
    with pytest.raises(DataError, match="fit no format; did you mean 'messages' for 'message'"):
        read({"message": CHAT})
    with pytest.raises(ConfigError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        read({"text": "a"}, format="alpacca")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": ""}, "a row without an answer"),
        ({"instruction": "a", "output": " \n"}, "a row without an answer"),
        ({"instruction": "", "output": "b"}, "a row without a question"),
        ({"instruction": "a", "output": None}, "the field 'output' is null, not text"),
        ({"instruction": "a", "output": 3}, "the field 'output' is an int, not text"),
        ({"instruction": "a", "inputs": "x", "output": "b"}, "unknown field 'inputs'; did you mean 'input'"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "the field 'history' is not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": "xy"}, "the field 'history' is not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": 7}, "the field 'history' is not a list of pairs"),
        ({"prompt": "a", "completion": ""}, "a row without an answer"),
        ({"prompt": "", "completion": "b"}, "a row without a question"),
        ({"prompt": "a", "completion": ["b"]}, "the field 'completion' is a list, not text"),
        ({"prompt": [USER], "completion": [USER]}, "a completion that begins with a question"),
        ({"prompt": [USER], "completion": []}, "the field 'completion' is not a list of turns"),
        ({"prompt": "a", "completion": "b", "label": False}, "the field 'label' marks answers as good or bad"),
        ({"text": ""}, "a row without text"),
        ({"text": "a\0b"}, "the field 'text' holds a NUL character"),
        ({"text": "a\ud83d"}, "the field 'text' holds half of a surrogate pair"),
        ({"messages": []}, "the field 'messages' is not a list of turns"),
        ({"messages": "hi"}, "the field 'messages' is not a list of turns"),
        ({"messages": ["hi"]}, "(turn 1): a turn that is not an object"),
        ({"messages": [USER]}, "a row without an answer"),
        ({"messages": [USER, ANSWER, USER]}, "a row without an answer"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, "(turn 2): a row without an answer"),
        ({"messages": [USER, ANSWER | {"content": ["b"]}]}, "(turn 2): the field 'content' is a list, not text"),
        ({"messages": [USER | {"content": " "}, ANSWER]}, "(turn 1): a row without a question"),
        ({"messages": [USER, USER, ANSWER]}, "(turn 2): roles in the wrong order: user where assistant is due"),
        ({"messages": [ANSWER, USER]}, "(turn 1): roles in the wrong order: assistant where user is due"),
        ({"messages": [CHAT[0], ANSWER]}, "(turn 2): roles in the wrong order: assistant where user is due"),
        ({"messages": [CHAT[0]]}, "a row without an answer"),
        ({"messages": [USER, {"role": "assistent", "content": "b"}]}, "'assistent'; did you mean 'assistant'"),
        ({"messages": [USER, {"role": "tool", "content": "b"}]}, "unknown role 'tool'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "the field 'tool_calls' is not supported"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "'weight' 0 on a turn of the assistant"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "'train' True on a turn of the user"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "'content' is missing; did you mean 'contents'"),
        ({"messages": CHAT, "system": "x"}, "a system field beside a system turn"),
        ({"messages": CHAT, "tools": "[{}]"}, "the field 'tools' is not supported"),
        ({"messages": CHAT, "images": ["a.png"]}, "the field 'images' is not supported"),
        ({"messages": CHAT, "label": True}, "the field 'label' marks answers as good or bad"),
        ({"conversations": CHAT[:2], "chosen": {}, "rejected": {"from": "gpt"}}, "'rejected' is not supported"),
    ],
)
def test_rows_that_are_refused(read, row, expected):
    with pytest.raises(DataError) as caught:
        read(row)
    line = str(caught.value)
    assert "rows.jsonl:1" in line
    assert expected in line
    assert "\n" not in line


def test_marks_and_fields_that_change_nothing_are_accepted(read):
    marked = [USER | {"loss_weight": 0.0, "name": "x"}, ANSWER | {"loss_weight": 1.0, "tool_calls": None}]
    (record,) = read({"messages": marked, "tools": "", "images": []})
    assert record.messages == (USER, ANSWER)


def test_every_bad_row_is_counted_and_the_first_named(read, tmp_path):
    rows = [{"text": "a"}, {"text": ""}, {"txt": "b"}, {"text": 1}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: a row without text; .* \(2 more such rows"):
        read(*rows)
    found = list(scan_records(tmp_path / "rows.jsonl"))
    assert [isinstance(row, RowError) for row in found] == [False, True, True, True]
    assert "rows.jsonl:3: unknown field 'txt'; did you mean 'text'?" in str(found[2])


def test_a_row_of_another_format_than_the_first(read):
    with pytest.raises(DataError, match="rows.jsonl:2: the field 'messages' is missing"):
        read({"messages": CHAT}, {"conversations": CHAT})


def test_a_file_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    (tmp_path / "a.json").write_text("[]")
    for name in ("a.csv", "a.json"):
        with pytest.raises(DataError, match=f"{name}: no rows"):
            read_records(tmp_path / name)
