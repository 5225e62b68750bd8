"""Files of every kind, whole and broken: what is read, and the line that each complaint points at."""

import csv
import hashlib
import json

import pytest

from minitune.data.corpus import Encoding, Source, load_corpus
from minitune.data.formats import read_records
from minitune.data.prompts import read_prompts
from minitune.data.reading import RowError, data_path, read_rows
from minitune.errors import CheckpointError, DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path):
    """Return the message with which the file, or its first bad row, is refused."""
    with pytest.raises(DataError) as caught:
        for _, fields in read_rows(path):
            if isinstance(fields, RowError):
                raise fields
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(str(path))


def test_jsonl_lines_and_blank_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n  {"text": "b"}\r\n{"text": "c"}')
    assert list(read_rows(path)) == [
        (f"{path}:1", {"text": "a"}),
        (f"{path}:3", {"text": "b"}),
        (f"{path}:4", {"text": "c"}),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_only_newline_ends_a_json_line(tmp_path, separator):
    row = {"text": f"one{separator}two"}
    path = write(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=separator < " ") + "\n")
    assert list(read_rows(path)) == [(f"{path}:1", row)]


def test_json_array_keeps_the_line_of_each_row(tmp_path):
    rows = [{"text": "a\nb", "n": [1, {"x": 2}]}, {"text": "]"}, {"text": "c"}]
    text = json.dumps(rows, indent=2)
    path = write(tmp_path, "a.json", text)
    found = list(read_rows(path))
    assert [fields for _, fields in found] == rows
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"]
    assert [origin for origin, _ in found] == [f"{path}:{n}" for n in starts]


def test_kind_of_json_is_told_by_content(tmp_path):
    array = write(tmp_path, "array.jsonl", '[{"text": "a"}]')
    lines = write(tmp_path, "lines.json", '{"text": "a"}\n{"text": "b"}')
    assert [fields["text"] for _, fields in read_rows(array)] == ["a"]
    assert [fields["text"] for _, fields in read_rows(lines)] == ["a", "b"]


def test_rows_of_an_array_that_share_a_line_are_told_apart(tmp_path):
    one = write(tmp_path, "one.json", '[{"text": "a"}, {"text": "b"}, 7]\n')
    assert [origin for origin, _ in read_rows(one)] == [f"{one}:1 (row {n})" for n in (1, 2, 3)]
    mixed = write(tmp_path, "mixed.json", '[\n{"text": "a"}, {"text": "b"},\n{"text": "c"}, {"text": "d"}]')
    found = [origin.removeprefix(str(mixed)) for origin, _ in read_rows(mixed)]
    assert found == [":2", ":2 (row 2)", ":3", ":3 (row 4)"], "each row has an origin of its own"
    for text in ('[{"text": "a"}, {"text": b}]', '[{"text": "a"}, {"text": "b"} {"text": "c"}]'):
        broken = write(tmp_path, "broken.json", text)
        assert [origin for origin, _ in read_rows(broken)][-1] == f"{broken}:1 (row 2)"


def test_reading_goes_on_after_a_broken_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n')
    rows = list(read_rows(path))
    assert [isinstance(fields, RowError) for _, fields in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', ":2: broken JSON"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', ":1: broken JSON (text after the object)"),
        ("a.json", '[\n{"text": "a"},\n{"text": b}\n]', ":3: broken JSON"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}\n]', ":3: broken JSON (no ',' or ']' after a row)"),
        ("a.json", '[\n{"text": "a"},\n{"text": "b"}', ":3: broken JSON"),
        ("a.json", '[\n{"text": "a"}\n]\n]', ":3: broken JSON (text after the array's ']')"),
        ("a.json", '[\n{"text": "a\n', ":2: broken JSON"),
        ("a.jsonl", '{"text": "a", "text": "b"}', ":1: the field 'text' is given twice"),
        ("a.json", '[\n\n{"text": "a", "text": "b"}]', ":3: the field 'text' is given twice"),
        ("a.jsonl", '"just text"', ":1: a row that is a str, not an object"),
        ("a.json", "[1, 2]", ":1 (row 1): a row that is an int, not an object"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, ":1: broken JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", ":1: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', ":2: byte 0xe9 at offset 24 is not UTF-8"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\xe9"}', ":1: byte 0xe9 at offset 13 is not UTF-8"),
        ("a.jsonl", '{"text": "ä"}'.encode("utf-16"), ":1: the file is UTF-16"),
        ("a.txt", b"one\ntw\0o", ":2: NUL byte"),
        ("a.csv", b"text\n\0", ":2: NUL byte"),
        ("a.jsonl", b"", ": the file is empty"),
        ("a.csv", b"\xef\xbb\xbf \n\n", ": the file is empty"),
        ("a.csv", "prompt,completion\na,b\nc\n", ":3: a CSV row of 1 cell under a header of 2"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd,e,f\n', ":4: a CSV row of 3 cells under a header of 2"),
        ("a.csv", 'text\ngood\n"never closed\nand on', ":3: broken CSV"),
        ("a.csv", 'text\n"a"b\n', ":2: broken CSV"),
        ("a.csv", "text,text\na,b\n", ":1: the column 'text' is given twice"),
        ("a.pkl", b"\x80\x04", ": pickle files can run code"),
        ("a.pt", b"PK", ": pickle files can run code"),
        ("a.xlsx", b"PK", ": unknown kind of file '.xlsx'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, expected):
    assert refused(write(tmp_path, name, content)).startswith(expected)


def test_missing_file_and_folder(tmp_path):
    write(tmp_path, "training.jsonl", "{}")
    assert refused(tmp_path / "trainig.jsonl") == ": no such file; did you mean 'training.jsonl'?"
    assert refused(tmp_path / "nowhere" / "a.jsonl") == ": no such file; check the path"
    assert refused(tmp_path).startswith(": is a folder; name the data files in it")


def test_byte_order_mark_is_accepted(tmp_path):
    for name, content in (("a.jsonl", '{"text": "a"}'), ("a.csv", "text\na\n"), ("a.json", '[{"text": "a"}]')):
        path = write(tmp_path, name, b"\xef\xbb\xbf" + content.encode())
        assert [fields for _, fields in read_rows(path)] == [{"text": "a"}]


def test_csv_is_read_as_the_csv_module_writes_it(tmp_path):
    rows = [
        {"prompt": 'said "x", then', "completion": "line\nbreak"},
        {"prompt": "b\r\nc", "completion": ""},
        {"prompt": "é,", "completion": "big" * 100_000},  # over the csv module's own limit of 131072
    ]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    limit = csv.field_size_limit()
    found = list(read_rows(path))
    assert [fields for _, fields in found] == rows
    assert [origin for origin, _ in found] == [f"{path}:2", f"{path}:4", f"{path}:6"]
    assert csv.field_size_limit() == limit


def test_tsv_and_text(tmp_path):
    assert list(read_rows(write(tmp_path, "a.tsv", "text\tlabel\na, b\t1\n")))[0][1] == {"text": "a, b", "label": "1"}
    path = write(tmp_path, "a.txt", "one\r\ntwo\n")
    assert list(read_rows(path)) == [(f"{path}:1", {"text": "one\r\ntwo\n"})]


MANIFEST = """
[demo]
about = "two files"
licence = "ours"
source = "pypi"
requirement = "demo==1"
files = [{name = "questions", path = "data/q.jsonl"}, {name = "prose", path = "data/p.txt"}]
"""


def test_a_fetched_data_set_is_known_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "manifest.toml", MANIFEST)
    with pytest.raises(CheckpointError, match="questions is not fetched yet; run: python -m minitune.fetch questions"):
        read_rows("questions")
    (tmp_path / "demo").mkdir()
    rows = write(tmp_path / "demo", "q.jsonl", '{"instruction": "a", "output": "b"}\n')
    prose = write(tmp_path / "demo", "p.txt", "one\ntwo\n")
    assert list(read_rows("questions")) == list(read_rows(rows))
    assert read_records("prose") == read_records(prose) and read_records("prose")[0].document
    assert read_prompts("prose") == read_prompts(prose) and len(read_prompts("prose")) == 2
    assert "is a folder; name the data files in it" in refused("demo")
    assert refused("question") == ": no such file; check the path"
    write(tmp_path, "questions.jsonl", '{"text": "a"}')
    assert refused("questions.json") == ": no such file; did you mean 'questions.jsonl'?"
    write(tmp_path, "questions", "a file of that name goes first")
    assert data_path("questions").resolve() == tmp_path / "questions"


def test_a_run_notes_the_sha256_of_a_named_file(tmp_path, monkeypatch, tokenizers):
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(tmp_path))
    write(tmp_path, "manifest.toml", MANIFEST)
    (tmp_path / "demo").mkdir()
    rows = write(tmp_path / "demo", "q.jsonl", '{"prompt": "a", "completion": "b"}\n')
    write(tmp_path / "demo", "p.txt", "one")
    corpus = load_corpus([Source("questions")], [], tokenizers["chat"], Encoding(64))
    assert corpus.files[0]["path"] == "questions"
    assert corpus.files[0]["sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
