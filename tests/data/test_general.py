"""General text in windows: a fixed order, enough of it, nothing cut but texts."""

import json

import pytest

from minitune.checkpoint.load import load_tokenizer
from minitune.data import general
from minitune.data.general import general_examples
from minitune.errors import DataError


def test_rows_of_general_text_are_windows_in_a_fixed_order(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(general, "WINDOW", 32)
    tokenizer, path = load_tokenizer(tiny_folder(tmp_path / "model")), tmp_path / "general.jsonl"
    rows = [{"text": f"row {n} " * 9} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    chosen = general_examples(str(path), tokenizer, 200, 256)
    assert 200 <= sum(sum(e.targets) for e in chosen) < 200 + 32
    assert chosen == general_examples(str(path), tokenizer, 200, 256) and len({e.origin for e in chosen}) == len(chosen)
    assert all(len(e.ids) <= 32 for e in chosen)
    assert max(len(e.ids) for e in general_examples(str(path), tokenizer, 200, 16)) == 16
    with pytest.raises(DataError, match=r"has [\d,]+ tokens of general text, not the 100,000 of penalty.tokens"):
        general_examples(str(path), tokenizer, 100_000, 256)
    path.write_text('{"prompt": "short", "completion": "answer"}\n{"prompt": "long", "completion": "' + "x" * 99 + '"}')
    (answer,) = general_examples(str(path), tokenizer, 7, 256)
    assert answer.targets.count(True) == 7 and "jsonl:1" in answer.origin, "an answer and its end; no row is cut"
    path.write_text('{"text": "fine"}\n{"text": 3}')
    with pytest.raises(DataError, match="general.jsonl:2"):
        general_examples(str(path), tokenizer, 5, 256)
