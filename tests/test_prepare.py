"""The command `prepare`: what it shows, what it exits with, and its one-line errors."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from typing import get_args

import pytest

from minitune.prepare import PrepareConfig, main
from minitune.reporting.rows import painted, shown
from tests.data.conftest import save_byte_tokenizer

GOOD = [{"instruction": "Say hé.", "output": "hé!"}, {"instruction": "Add 1 and 2.", "output": "3"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with a byte-level ChatML tokenizer."""
    return str(save_byte_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def rows(tmp_path):
    """Return a function that writes rows to a file and gives its path."""

    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write


def test_good_files_are_shown_and_accepted(model, rows, capsys, tmp_path):
    path, report = rows(GOOD), tmp_path / "report.json"
    assert main([path, "--model", model, "--rows", "2", "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nSay hé.<|im_end|>\n<|im_start|>assistant\n[hé!<|im_end|>]\n" in shown
    assert "rows.jsonl: 2 rows (alpaca), 2 examples" in shown
    assert "training would accept these files" in shown
    written = json.loads(report.read_text(encoding="utf-8"))
    # the answers and their ends of turn: h, two bytes of é, !, end; 3, end
    assert written["target_tokens"] == 5 + 2
    assert written["problems"] == []


def test_bad_files_exit_with_1_and_list_the_reasons(model, rows, capsys):
    bad = rows([*GOOD, {"instruction": "a", "output": ""}, {"instruction": "a" * 600, "output": "b"}])
    missing = bad.replace("rows", "missing")
    assert main([bad, missing, "--model", model, "--rows", "0"]) == 1
    shown = capsys.readouterr().out
    assert "training would refuse these files:" in shown
    assert f"1 x a row without an answer; fill in output or remove the row ({bad}:3)" in shown
    assert "1 x a row over max_length 512; raise max_length, choose truncate" in shown
    assert f"1 x {missing}: no such file" in shown
    assert main([bad, "--model", model, "--max_length", "700", "--rows", "0"]) == 1
    assert "over max_length" not in capsys.readouterr().out


def test_options_reach_the_data(model, rows, capsys):
    path = rows([{"question": f"{i} " + "q" * 40, "answer": "a", "prompt": "x"} for i in range(3)])
    options = ["--columns", '{"prompt": "question", "completion": "answer"}', "--model", model]
    assert main([path, *options, "--max_length", "20"]) == 1
    assert main([path, *options, "--max_length", "20", "--truncate", "prompt", "--packing", "false"]) == 0
    shown = capsys.readouterr().out
    assert "3 shortened" in shown and "2 batches" not in shown.split("(padded)")[0].splitlines()[-1]
    assert main([path, *options, "--weights", "[2]"]) == 0


def test_colours_are_for_terminals(model):
    from minitune.data.examples import Example
    from minitune.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("aé\x1b[31mb")
    example = Example(tuple(ids), tuple(i > 0 for i in range(len(ids))), "a:1")
    plain, coloured = painted(example, tokenizer, False), painted(example, tokenizer, True)
    assert plain == "a[é\\x1b[31mb]"  # an escape sequence in the data is shown, not obeyed
    assert coloured.count("\x1b[") == len(ids) + 1  # one colour a token, and the end
    assert "\\x1b" in coloured and "\x1b[31m" not in coloured


PAIR = {"instruction": "Hé?", "chosen": "long answer", "rejected": "no", "margin": 1.5}
ANSWERS = f"{'chosen':21} | rejected\n[long answer<|im_end| | [no<|im_end|>]\n{'>]':21} |\n{'':21} |\n"


def test_a_pair_is_shown_side_by_side(model, rows, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "45")  # two columns of 21 and " | "
    report = tmp_path / "report.json"
    others = [PAIR | {"instruction": "b", "chosen": "o", "rejected": f"n{i % 2}"} for i in range(3)]
    path = rows([PAIR, *others, PAIR | {"chosen": "x", "rejected": "x"}])
    assert main([path, "--model", model, "--rows", "4", "--json", str(report), "--packing", "false"]) == 0
    shown = capsys.readouterr().out
    # the prompt has 3 control tokens and 20 bytes; the answers 11 and 2 bytes, their end and a newline
    assert "rows.jsonl:1: 36 + 27 tokens, 12 + 3 targets, margin 1.5\n" in shown
    assert f"<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n\n{ANSWERS}" in shown
    assert "rows.jsonl: 5 rows (pairs), 4 examples" in shown
    assert "duplicates     1 exact, 1 normalised" in shown
    assert "left out       0 of equal score, 1 of equal sides" in shown
    assert "chosen         target tokens 50% 2, 90% 12, 99% 12, 100% 12" in shown
    assert "rejected       target tokens 50% 3, 90% 3, 99% 3, 100% 3" in shown
    assert "chosen longer  in 25.0% of pairs; 4 with a margin" in shown
    assert "an epoch       4 pairs" in shown
    assert "training would accept these files with --objective dpo" in shown
    written = json.loads(report.read_text(encoding="utf-8"))
    assert (written["kind"], written["equal"], written["preferences"]["chosen_longer"]) == ("pairs", 1, 0.25)
    assert written["target_tokens"] == 12 + 3 + 3 * (2 + 3)


def test_judged_answers_are_shown_with_their_label(model, rows, capsys):
    path = rows(
        [{"prompt": "q", "completion": "ab", "label": True}, {"prompt": "r", "completion": "c", "label": False}]
    )
    assert main([path, "--model", model]) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:1: 4 tokens, 3 targets, desirable\nq[ab<|im_end|>]" in shown
    assert "rows.jsonl:2: 3 tokens, 2 targets, undesirable\n" in shown
    assert "desirable      1, target tokens 50% 3" in shown and "undesirable    1, target tokens 50% 2" in shown
    assert "training would accept these files with --objective kto" in shown


def test_the_objective_decides_what_the_rows_must_be(model, rows, capsys):
    from minitune.training.config import TrainConfig

    path = rows([PAIR])
    for objective, expected in (("sft", "--objective dpo"), ("kto", "--objective dpo"), ("ipo", "accept")):
        assert main([path, "--model", model, "--objective", objective, "--rows", "0"]) == (expected != "accept")
        assert expected in capsys.readouterr().out
    known, here = (
        next(f for f in dataclasses.fields(config) if f.name == "objective").type
        for config in (TrainConfig, PrepareConfig)
    )
    assert get_args(here) == ("auto", *get_args(known))


def test_preferences_that_training_refuses(model, rows, capsys):
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    path = rows([PAIR, swapped, swapped, PAIR | {"chosen": ""}])
    assert main([path, "--model", model, "--rows", "0"]) == 1
    shown = capsys.readouterr().out
    assert f"2 x a pair that another row has the other way round; remove it or {path}:1 ({path}:2, {path}:3)" in shown
    assert f"1 x a row without an answer; fill in chosen or remove the row ({path}:4)" in shown
    path = rows([{"prompt": q, "completion": "a", "label": True} for q in "qr"])
    assert main([path, "--model", model, "--rows", "0"]) == 1
    assert "1 x no training row has the label false; kto learns from both" in capsys.readouterr().out
    path = rows([PAIR | {"chosen": "a", "rejected": "a"}])
    assert main([path, "--model", model]) == 1
    assert "1 x no pair is left: 0 have equal scores, 1 equal sides" in capsys.readouterr().out


def test_columns_hold_wide_characters_colours_and_line_ends(model):
    from minitune.data.examples import Example
    from minitune.data.preferences import Pair
    from minitune.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    sides = []
    for answer in ("日本\nab", "e\u0301x"):
        prompt, ids = tokenizer.encode("q"), tokenizer.encode(answer)
        sides.append(Example((*prompt, *ids), (False,) + (True,) * len(ids), "a:1"))
    plain = shown(Pair(*sides), tokenizer, False, 9)  # columns of 3
    assert plain[1:] == ["q", "chosen | rejected", "[日 | [e\u0301x", "本  | ]", "ab] |"]
    coloured = shown(Pair(*sides), tokenizer, True, 9)
    bare = [re.sub("\x1b\\[[0-9]*m", "", line) for line in coloured]
    assert bare[1:] == ["q", "chosen | rejected", "日  | e\u0301x", "本  |", "ab  |"]
    assert all(line.count("\x1b[0m") >= 1 for line in coloured[3:])


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "minitune.prepare", *arguments], capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max_lenght", "5"], "did you mean 'max_length'?"),
        (["--truncate", "left"], "truncate"),
        (["--max_length", "1"], "max_length 1: must be at least 2"),
        (["--seed=-1"], "seed is -1; it must be 0 or more"),
        (["--weights", "[1, 2]"], "2 weights for 1 file;"),
        (["--weights", "[0]"], "weight 0.0 of data source 1: must be a number above 0"),
        (["--rows", "-1"], "rows is -1; it must be 0 or more"),
        (["--batch_size", "0"], "batch_size 0: must be at least 1"),
        (["--columns", '{"promt": "q"}'], "columns: unknown field 'promt'; did you mean 'prompt'?"),
    ],
)
def test_impossible_options_are_one_line(model, rows, capsys, arguments, expected):
    from minitune.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        main([rows(GOOD), "--model", model, *arguments])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_error_is_one_line_and_exit_2(rows):
    done = run(rows(GOOD), "--model", "no/such/model")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_is_quick():
    """Only a ratio is asserted, as machines differ: help takes less than importing torch alone."""
    start = time.perf_counter()
    done = run("--help")
    took = time.perf_counter() - start
    assert done.returncode == 0 and "--max_length" in done.stdout
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert took < time.perf_counter() - start


def test_modules_are_light_to_import():
    code = (
        "import sys, minitune.prepare, minitune.data.lint, minitune.data.splits;"
        "print([name for name in ('torch', 'tokenizers', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_beyond_the_model_are_refused_as_training_does(tiny_folder, rows, tmp_path, capsys):
    model = str(tiny_folder(tmp_path / "tiny"))
    path = rows([{"prompt": "q" * 300, "completion": "a"}, {"prompt": "q", "completion": "a"}])
    assert main([path, "--model", model, "--max_length", "400", "--rows", "0"]) == 1
    shown = capsys.readouterr().out
    assert f"1 x a row over the model's 256 positions; set max_length to 256 or less ({path}:1)" in shown
    # each fits alone, but kto also reads the first prompt with the second answer
    judged = [("q" * 150, "a", True), ("q", "a" * 150, False)]
    path = rows([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in judged])
    assert main([path, "--model", model, "--rows", "0"]) == 1
    assert (
        f"1 x a row over the model's 256 positions; set max_length to 256 or less ({path}:1)" in capsys.readouterr().out
    )


def test_files_without_a_row_get_the_verdict_alone(model, tmp_path, capsys):
    assert main([str(tmp_path / "nothing.jsonl"), "--model", model]) == 1
    shown = capsys.readouterr().out
    assert "nothing.jsonl: no such file" in shown and "efficiency" not in shown and "length" not in shown
