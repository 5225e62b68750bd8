"""The command `prepare`: what it shows, what it exits with, and its one-line errors."""

import json
import subprocess
import sys
import time

import pytest

from minitune.prepare import main, painted
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
        "print([name for name in ('torch', 'tokenizers', 'jinja2', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_beyond_the_model_are_refused_as_training_does(tiny_folder, rows, tmp_path, capsys):
    model = str(tiny_folder(tmp_path / "tiny"))
    path = rows([{"prompt": "q" * 300, "completion": "a"}, {"prompt": "q", "completion": "a"}])
    assert main([path, "--model", model, "--max_length", "400", "--rows", "0"]) == 1
    shown = capsys.readouterr().out
    assert f"1 x a row over the model's 256 positions; set max_length to 256 or less ({path}:1)" in shown


def test_files_without_a_row_get_the_verdict_alone(model, tmp_path, capsys):
    assert main([str(tmp_path / "nothing.jsonl"), "--model", model]) == 1
    shown = capsys.readouterr().out
    assert "nothing.jsonl: no such file" in shown and "efficiency" not in shown and "length" not in shown
