"""What is written says what was read: records and tokens equal, for every format, and origins kept."""

import csv
import json
from dataclasses import replace

import pytest

from minitune.curation.rows import changed, joined, json_line, line_of, read_source
from minitune.data.corpus import Encoding, Source, load_corpus
from minitune.data.formats import Record, file_kind, read_records
from minitune.data.pairing import survey_records
from minitune.data.preference_formats import FORMATS_OF
from minitune.data.preferences import item_ids
from minitune.data.reading import RowError

USER, ANSWER = {"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "<think>\nno\n</think>\n\nHo."}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
FORMATS = {
    "alpaca": [{"instruction": "Add.", "input": "1 2", "output": "3", "id": 7, "history": [["q", "a"]]},
               {"instruction": "Say é.", "output": "é\u2028", "system": "Be short."},
               {"instruction": "a", "output": "b"}],
    "messages": [{"messages": [USER, ANSWER, USER, ANSWER]}, {"system": "S", "messages": [USER, ANSWER]},
                 {"messages": [{"role": "system", "content": " "}, USER, ANSWER | {"weight": 1}]}],
    "sharegpt": [{"conversations": [HUMAN, GPT, HUMAN, GPT]}, {"conversations": [HUMAN, GPT], "system": "S"}],
    "prompt_completion": [{"prompt": "q ", "completion": " a"},
                          {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}],
    "text": [{"text": "one two\n\nthree"}],
    "pairs": [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5},
              {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "score_chosen": 2,
               "score_rejected": 1},
              {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "Hm"}]},
              {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}],
    "scored": [{"instruction": "q",
                "completions": [{"response": "a", "score": 1}, {"response": "b", "overall_score": 3}]}],
    "judged": [{"prompt": "q", "completion": "a", "label": True}, {"messages": [USER, ANSWER], "label": False}],
}  # fmt: skip


def written(tmp_path, rows, name="out.jsonl"):
    path = tmp_path / name
    path.write_text("".join(map(line_of, rows)), encoding="utf-8")
    return str(path)


def content(record):
    """Return a record without where it stands."""
    same = {"origin": "", "source": None, "unread": ()}
    return replace(
        record, **same, **({} if isinstance(record, Record) else {"sides": tuple(map(content, record.sides))})
    )


def tokens(kind, path, tokenizer, formats):
    options = {"max_length": 200, "truncate": "error", "train_on": "all"}
    survey = survey_records(kind, read_records(path, formats=formats), tokenizer, **options)
    assert not survey.errors
    return [(item_ids(item), *(document.targets for document in item.documents)) for item in survey.examples]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read_as_the_same_records_and_tokens(tmp_path, tokenizers, format):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(FORMATS[format], ensure_ascii=False), encoding="utf-8")
    kind = file_kind(path)
    rows, broken = read_source(str(path), "training", kind=kind)
    assert not broken and [row.record.format for row in rows] == [format] * len(rows)
    out = written(tmp_path, rows)
    before, after = (read_records(name, formats=FORMATS_OF[kind]) for name in (path, out))
    assert list(map(content, after)) == list(map(content, before))
    assert [record.unread for record in after] == [record.unread for record in before]
    assert [record.source.origin for record in after] == [record.origin for record in before]
    assert file_kind(out) == kind
    formats = FORMATS_OF[kind]
    assert tokens(kind, out, tokenizers["chat"], formats) == tokens(kind, path, tokenizers["chat"], formats)


def test_an_instruction_stays_a_chat_and_a_text(tmp_path, tokenizers):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(FORMATS["alpaca"][2:] + [{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    out = written(tmp_path, read_source(str(path), "training")[0])
    for name in ("chat", "plain", "bos"):
        assert tokens("examples", out, tokenizers[name], None) == tokens("examples", path, tokenizers[name], None)


def test_one_file_may_hold_rows_of_several_formats(tmp_path, tokenizers):
    rows, expected = [], []
    for format in ("alpaca", "messages", "sharegpt", "prompt_completion", "text"):
        path = tmp_path / f"{format}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in FORMATS[format]))
        rows += read_source(str(path), "rehearsal" if format == "text" else "training")[0]
        expected += tokens("examples", path, tokenizers["chat"], None)
    out = written(tmp_path, rows)
    assert tokens("examples", out, tokenizers["chat"], None) == expected
    corpus = load_corpus([Source(out)], [], tokenizers["chat"], Encoding(200))
    origins = corpus.files[0]["origins"]
    assert {(entry["path"], entry["role"]): entry["examples"] for entry in origins} == {
        (str(tmp_path / f"{format}.jsonl"), "rehearsal" if format == "text" else "training"): len(FORMATS[format])
        for format in ("alpaca", "messages", "sharegpt", "prompt_completion", "text")
    }


def test_columns_and_a_source_field_of_its_own(tmp_path):
    path = tmp_path / "in.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text", "label", "source"], ["Good, \"film\"\n", "1", "site"]])  # fmt: skip
    rows, _ = read_source(str(path), "training", columns={"prompt": "text", "completion": "label"})
    (row,) = read_records(written(tmp_path, rows))
    assert (row.prompt, row.completion, row.unread) == ('Good, "film"\n', "1", ("own_source",))
    assert '"own_source": "site"' in line_of(rows[0])


def test_preparing_again_keeps_the_first_origin_and_role(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "t", "source": "mine"}) + "\n")
    first = written(tmp_path, read_source(str(path), "safety")[0])
    again = written(tmp_path, read_source(first, "training")[0], "again.jsonl")
    (row,) = read_records(again)
    assert (row.source.origin, row.source.role, row.source.file) == (f"{path}:1", "safety", str(path))
    assert again and json.loads((tmp_path / "again.jsonl").read_text())["own_source"] == "mine"
    assert read_source(first, "rehearsal")[0][0].source.role == "rehearsal"


@pytest.mark.parametrize("source", ["mine", 3, None, {"origin": "a:1"}, {"origin": 1, "role": "r", "format": "text"}])
def test_a_source_of_another_kind_is_a_field_like_others(tmp_path, source):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "t", "source": source}))
    (record,) = read_records(path)
    assert record.source is None and record.unread == ("source",)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a b\nc\n\n  d\n \ne\n", ["a b\nc\n\n  ", "d\n \n", "e\n"]),  # empty lines part paragraphs
        ("a\nb\nc", ["a\n", "b\n", "c"]),  # without any, line ends do
        ("\n\nalone\n\n", ["\n\nalone\n\n"]),
    ],
)
def test_a_text_file_is_cut_between_paragraphs_and_joined_as_it_stood(tmp_path, tokenizers, text, parts):
    path = tmp_path / "in.txt"
    path.write_text(text)
    rows, _ = read_source(str(path), "training")
    assert [row.record.text for row in rows] == parts
    assert [row.record.text for row in joined(rows)] == [text]
    assert [row.record.text for row in joined(rows[:1] + rows[2:])] == ([*parts[:1], *parts[2:]])
    out = written(tmp_path, joined(rows))
    for length in (4, 200):  # in windows, as the file itself
        both = (load_corpus([Source(str(name))], [], tokenizers["chat"], Encoding(length)) for name in (path, out))
        before, after = ([item.ids for item in corpus.training[0][0]] for corpus in both)
        assert before == after


def test_a_long_end_of_empty_lines_takes_no_time(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("a" + "\n" * 100_000 + " " * 100_000)
    assert len(read_source(str(path), "training")[0]) == 1


def test_changes_reach_every_text_that_is_read_and_no_other(tmp_path):
    fields = {
        "messages": [{"role": "user", "content": "ab"}, {"from": "gpt", "value": "b"}],
        "system": "b",
        "note": "b",
    }
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(fields))
    (row,) = read_source(str(path), "training")[0]
    new = changed(row, lambda text: text.replace("b", "c"), "examples")
    assert [message["content"] for message in new.record.messages] == ["c", "ac", "c"]
    assert new.fields["note"] == "b" and new.fields["messages"][1] == {"from": "gpt", "value": "c"}
    with pytest.raises(RowError, match="a row without a question"):
        changed(row, lambda text: "", "examples")


def test_half_a_character_in_a_field_that_is_not_read_is_kept():
    line = json_line({"text": "é", "note": "\ud800"})
    assert json.loads(line.encode()) == {"text": "é", "note": "\ud800"}
    assert json_line({"text": "é"}) == '{"text": "é"}\n'
