"""Votes: the page saves what was clicked, and only votes on these very texts are read."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minitune.errors import DataError
from minitune.reporting.ballot import Item, Vote, ballot_id, ballot_page, read_votes

ITEMS = [
    Item("a.jsonl:1", (("Question", "What <b>is</b> it?"),), (("Left", "one"), ("Right", "two"))),
    Item("a.jsonl:2", (), (("Answer", "three"),)),
    Item("a.jsonl:3", (), (("Answer", "four"),)),
]
CHOICES = {"accept": "Accept", "reject": "Reject"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_page_keeps_and_saves_votes(tmp_path):
    (tmp_path / "page.html").write_text(ballot_page("Rows", "Judge.", ITEMS, CHOICES, "mine.json"))
    command = ["node", Path(__file__).with_name("browser.js"), tmp_path / "page.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kept"] == ["reject", None, None]  # after the page was closed and opened again
    assert found["progress"] == "2 of 3 judged" and found["file"] == "mine.json"
    (tmp_path / "mine.json").write_text(found["saved"][0])
    assert read_votes(tmp_path / "mine.json", ITEMS, CHOICES) == [
        Vote("a.jsonl:1", "reject", "wrong <place>"), Vote("a.jsonl:2", "accept"),
    ]  # fmt: skip


def test_the_page_shows_texts_as_texts():
    text = ballot_page("Rows", "Judge.", ITEMS, CHOICES)
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in text and len(re.findall('type="radio"', text)) == 6


def saved(**changes) -> dict:
    votes = [{"item": "a.jsonl:1", "choice": "accept"}]
    return {"ballot": ballot_id(ITEMS, CHOICES), "votes": votes} | changes


BAD = {
    "no JSON": "{",
    "not UTF-8": b"\xff{}",
    "a list": [],
    "no votes": {"ballot": ballot_id(ITEMS, CHOICES)},
    "votes on ballot": saved(ballot="0" * 16),
    "second for": saved(votes=saved()["votes"] * 2),
    "not among": saved(votes=[{"item": "b.jsonl:1", "choice": "accept"}]),
    "must be one of accept, reject": saved(votes=[{"item": "a.jsonl:1", "choice": "yes"}]),
    "an int, not an object": saved(votes=[1]),
    "not an object with": saved(votes=[{"item": "a.jsonl:1"}]),
    "with \"item\"": saved(votes=[{"item": "a.jsonl:1", "choice": "accept", "note": 3}]),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_votes_are_refused(tmp_path, words):
    content = BAD[words]
    path = tmp_path / "votes.json"
    path.write_bytes(content if isinstance(content, bytes) else (
        content if isinstance(content, str) else json.dumps(content)).encode())  # fmt: skip
    expected = {"not UTF-8": "no JSON", "a list": "no votes"}.get(words, words)
    with pytest.raises(DataError, match=re.escape(expected)):
        read_votes(path, ITEMS, CHOICES)


def test_votes_are_tied_to_the_texts(tmp_path):
    (tmp_path / "votes.json").write_text(json.dumps(saved()))
    changed = [Item("a.jsonl:1", ITEMS[0].context, (("Left", "one"), ("Right", "2"))), *ITEMS[1:]]
    assert read_votes(tmp_path / "votes.json", ITEMS, CHOICES)
    with pytest.raises(DataError, match="have changed since"):
        read_votes(tmp_path / "votes.json", changed, CHOICES)
