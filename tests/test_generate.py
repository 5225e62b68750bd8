"""The generate command on a tiny random model: prompt, conversation, file, and what it refuses."""

import builtins
import importlib
import io
import json
import subprocess
import sys
import time

import pytest
import torch

from minitune import decoding, evaluate, load_model, load_tokenizer
from minitune.decoding import Answer
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.loading import check_adapters
from minitune.model import adapter_set

generate = importlib.import_module("minitune.generate")  # `minitune.generate` is the function


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


def run(tiny: str, *options: str) -> None:
    generate.main(["--model", tiny, "--dtype", "float32", "--max_new_tokens", "12", *options])


def answer_of(tiny: str, prompt, **options) -> str:
    options = {"max_new_tokens": 12, **options}
    return decoding.generate(load_model(tiny), load_tokenizer(tiny), prompt, **options)


def test_prompt_prints_the_answer(tiny, capsys):
    run(tiny, "--prompt", "Hello", "--max_new_tokens", "3")
    captured = capsys.readouterr()
    assert captured.out == answer_of(tiny, "Hello", max_new_tokens=3) + "\n"
    assert "[cut off at max_new_tokens 3]" in captured.err


def test_options_reach_the_model(tiny, capsys):
    run(tiny, "--prompt", "Hello", "--temperature", "1.5", "--top_k", "50", "--seed", "3", "--system", "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert capsys.readouterr().out == answer_of(tiny, messages, temperature=1.5, top_k=50, seed=3) + "\n"
    run(tiny, "--prompt", "Hello", "--raw")
    tokenizer = load_tokenizer(tiny)
    asked, ends = [tokenizer.encode("Hello")], tokenizer.end_ids
    (ids,) = decoding.generate_ids(load_model(tiny), asked, max_new_tokens=12, end_ids=ends)
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_stop_string_cuts_across_tokens(tiny, capsys):
    whole = answer_of(tiny, "Hello", max_new_tokens=40)
    stop = whole[5:8]  # the tokenizer has one token a byte
    run(tiny, "--prompt", "Hello", "--max_new_tokens", "40", "--stop", json.dumps([stop]))
    captured = capsys.readouterr()
    assert captured.out == whole[: whole.index(stop)] + "\n"
    assert "cut off" not in captured.err


class Terminal:
    """A user who types given lines, and a model that notes what it is asked."""

    def __init__(self, monkeypatch, lines: list):
        self.lines, self.asked, self.seeds = iter(lines), [], []
        monkeypatch.setattr(builtins, "input", self.input)
        monkeypatch.setattr(decoding, "generate_texts", self.generate_texts)

    def input(self, prompt: str) -> str:
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def generate_texts(self, model, tokenizer, prompts, *, on_text, seed, **options):
        self.asked.append([(turn["role"], turn["content"]) for turn in prompts[0]])
        self.seeds.append(seed)
        on_text(0, f"answer {len(self.asked)}")
        if prompts[0][-1]["content"] == "interrupt me":
            raise KeyboardInterrupt
        if prompts[0][-1]["content"] == "too long":
            raise DataError("prompt 1 has too many tokens")
        return [Answer(f"answer {len(self.asked)}", 2, True)]


def test_conversation_goes_on_from_the_whole_of_it(tiny, monkeypatch, capsys):
    terminal = Terminal(monkeypatch, ["one", "", "two", "/reset", "three", "/nope", "/exit", "never"])
    run(tiny, "--chat", "--system", "S")
    system = ("system", "S")
    first = [system, ("user", "one")]
    assert terminal.asked == [
        first,
        [*first, ("assistant", "answer 1"), ("user", "two")],
        [system, ("user", "three")],
    ]
    assert len(set(terminal.seeds)) == 2  # a sampled answer differs from turn to turn, not from start to start
    assert "unknown command /nope; known: /reset, /exit" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny, monkeypatch):
    terminal = Terminal(monkeypatch, ["interrupt me", KeyboardInterrupt(), "go on"])
    run(tiny, "--chat")
    assert terminal.asked[-1] == [("user", "interrupt me"), ("assistant", "answer 1"), ("user", "go on")]


def test_a_conversation_that_grows_too_long_says_so(tiny, monkeypatch, capsys):
    Terminal(monkeypatch, ["too long"])
    run(tiny, "--chat")
    assert "error: prompt 1 has too many tokens (/reset starts anew)" in capsys.readouterr().err


def test_file_of_prompts(tiny, tmp_path, capsys):
    rows = [
        {"prompt": "Hello there, you", "id": 7},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "Grüße"},
    ]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    run(tiny, "--input", str(source), "--output", str(target), "--batch_size", "2")
    written = [json.loads(line) for line in target.read_text().splitlines()]
    for row, result in zip(rows, written, strict=True):
        assert result["answer"] == answer_of(tiny, row.get("prompt") or row["messages"])
        assert {name: result[name] for name in row} == row
        assert result["finished"] == (result["tokens"] < 12)
    assert "3 answers in" in capsys.readouterr().out
    lines = tmp_path / "prompts.txt"
    lines.write_text("Hi\n\nHello there, you\n")
    run(tiny, "--input", str(lines), "--output", str(target), "--overwrite")
    texts = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["prompt"] for row in texts] == ["Hi", "Hello there, you"]
    assert texts[1]["answer"] == written[0]["answer"]


@pytest.mark.parametrize(
    "options, line",
    [
        ((), "give one of --prompt, --chat and --input; found none of them"),
        (("--prompt", "a", "--chat"), "found prompt and chat"),
        (("--prompt", "  "), "the prompt is empty"),
        (("--prompt", "a", "--output", "x"), "output is set without input"),
        (("--prompt", "a", "--overwrite"), "overwrite is set without input"),
        (("--input", "a.txt"), "output is missing"),
        (("--prompt", "a", "--adapter", "poet=A,judge=B", "--use", "judge"), r'--adapter "\[poet=A,judge=B\]"'),
        (("--prompt", "a", "--adapter", "poet=A"), r'adapter is poet=A, no such folder; .*--adapter "\[poet=A\]"'),
        (("--chat", "--raw"), "raw uses no chat template and chat needs one"),
        (("--prompt", "a", "--seed", "1"), "seed has no effect at temperature 0"),
        (("--prompt", "a", "--temperature", "1", "--seed=-1"), "seed is -1; it must be 0 or more"),
        (("--prompt", "a", "--max_new_tokens", "0"), "max_new_tokens is 0"),
        (("--prompt", "a", "--temperature", "-1"), "temperature is -1"),
        (("--prompt", "a", "--promt", "b"), "unknown option 'promt'; did you mean 'prompt'"),
        (("--prompt", "a", "--device", "tpu"), "device is 'tpu'; it must be auto, cpu"),
        (("--prompt", "a", "--stop", '[""]'), "a stop string is empty"),
    ],
)
def test_options_without_meaning_are_refused(tiny, options, line):
    with pytest.raises(ConfigError, match=line):
        run(tiny, *options)


@pytest.mark.parametrize("door", [generate, evaluate])
def test_kernels_without_a_gpu_are_refused_in_one_line(door, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "a.txt").write_text("Hello")
    asked = ["--prompt", "a"] if door is generate else ["--perplexity", str(tmp_path / "a.txt")]
    with pytest.raises(
        ConfigError, match="^backend is triton, but (Triton is not installed|torch finds no GPU here); "
    ):
        door.main(["--model", str(tiny), "--backend", "triton", *asked])


def test_what_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        run(str(tmp_path / "nothing"), "--prompt", "a")
    with pytest.raises(CheckpointError, match="nothing"):
        run(tiny, "--prompt", "a", "--adapter", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="nothing.jsonl"):
        run(tiny, "--input", str(tmp_path / "nothing.jsonl"), "--output", "x")
    with pytest.raises(DataError, match="250 new ones may follow, but the model reads at most 256"):
        run(tiny, "--prompt", "a", "--max_new_tokens", "250")


@pytest.mark.parametrize(
    "row, problem",
    [
        ("{broken", "broken JSON"),
        ('{"promt": "a"}', 'one of "prompt" and "messages"'),
        ('{"prompt": "a", "messages": []}', 'one of "prompt" and "messages"'),
        ('{"prompt": " "}', "the prompt is empty or not text"),
        ('{"prompt": 3}', "the prompt is empty or not text"),
        ('{"messages": [{"role": "user"}]}', "is not a list of"),
        ('{"messages": []}', "is not a list of"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is not the user's"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, row, problem):
    source = tmp_path / "prompts.jsonl"
    source.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(DataError, match=f"prompts.jsonl:2: .*{problem}"):
        generate.read_prompts(source)


BY_NAME = {"poet": "A", "judge": "B"}


@pytest.mark.parametrize(
    "row, adapters, problem",
    [
        ('{"prompt": "a", "adapter": "pot"}', BY_NAME, "no adapter is called 'pot'; there are poet, judge; .*'poet'"),
        ('{"prompt": "a", "adapter": ["poet"]}', BY_NAME, r"no adapter is called \['poet'\]"),
        ('{"prompt": "a", "adapter": "poet"}', None, r'is \'poet\' and .* by name; give --adapter "\[poet=FOLDER\]"'),
        ('{"prompt": "a", "adapter": "poet"}', "A", r'give --adapter "\[poet=FOLDER\]"'),
        ('{"prompt": "a", "adapter": null}', "A", r'null \(the base alone\) .*--adapter "\[poet=FOLDER\]"'),
        ('{"prompt": "a", "adapter": null}', None, None),
        ('{"prompt": "a", "adapter": null}', BY_NAME, None),
        ('{"prompt": "a", "adapter": "judge"}', BY_NAME, None),
    ],
)
def test_a_rows_adapter_is_checked_with_its_place(tmp_path, row, adapters, problem):
    source = tmp_path / "prompts.jsonl"
    source.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    if problem is None:
        assert generate.read_prompts(source, adapters)[1] == json.loads(row)
        return
    with pytest.raises(DataError, match=f"prompts.jsonl:2: .*{problem}"):
        generate.read_prompts(source, adapters)


@pytest.mark.parametrize("options, known", [((), "poet, judge"), (("--weights", "[1.0,1.0]"), "poet, judge, sum")])
def test_a_rows_adapter_is_checked_before_the_model_is_loaded(tmp_path, options, known):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "adapter": "nobody"}\n')
    asked = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(DataError, match=f"a.jsonl:1: no adapter is called 'nobody'; there are {known}$"):
        run("no-such-model", *asked, "--adapter", "[poet=A,judge=B]", *options)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    (tmp_path / "rank=8").mkdir()
    assert check_adapters(str(tmp_path / "rank=8"), None, None) == str(tmp_path / "rank=8")


def test_an_output_that_is_there_is_kept(tiny, tmp_path):
    prompts, precious = tmp_path / "q.txt", tmp_path / "precious.jsonl"
    prompts.write_text("Hello")
    precious.write_text("twelve rows")
    asked = ("--input", str(prompts), "--output")
    with pytest.raises(ConfigError, match="precious.jsonl is there already; .*--overwrite"):
        run("no-such-model", *asked, str(precious))
    (tmp_path / "same.txt").symlink_to(prompts)
    for target in (prompts, tmp_path / "." / "q.txt", tmp_path / "same.txt"):
        for options in ((), ("--overwrite",)):
            with pytest.raises(ConfigError, match="input and output are both .*a file of their own"):
                run("no-such-model", *asked, str(target), *options)
    assert (prompts.read_text(), precious.read_text()) == ("Hello", "twelve rows")
    run(tiny, *asked, str(precious), "--overwrite")
    assert json.loads(precious.read_text())["prompt"] == "Hello"


def test_use_alone_is_the_base(monkeypatch, tiny, capsys):
    chosen = []
    monkeypatch.setattr(adapter_set, "choose", lambda model, name: chosen.append(name))
    monkeypatch.setattr(adapter_set, "adapter_names", lambda model: ["poet"])
    Terminal(monkeypatch, ["/use poet", "/use", "/use  base", "/used"])
    run(tiny, "--chat")
    assert chosen == ["poet", None, None]
    said = capsys.readouterr().out
    assert said.count("(base answers now)") == 2 and "unknown command /used" in said


def test_the_face_is_not_hidden_by_the_command():
    import minitune

    assert minitune.generate is decoding.generate


def test_help_does_not_wait_for_torch():
    began = time.monotonic()
    code = """
import sys
from minitune.generate import main
try: main(["--help"])
finally: assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--repetition_penalty" in done.stdout
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("Hello")
    monkeypatch.setattr(decoding, "generate_texts", None)  # calling it would fail
    with pytest.raises(CheckpointError, match="is a folder; a file was to be written there"):
        run(tiny, "--input", str(tmp_path / "prompts.txt"), "--output", str(tmp_path))


def test_lines_from_a_pipe_are_answered_without_prompts(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    run(tiny, "--chat", "--max_new_tokens", "3")
    assert capsys.readouterr().out == answer_of(tiny, "Hello", max_new_tokens=3) + "\n"


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused(tiny_folder, tmp_path):
    small = tiny_folder(tmp_path, vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3)  # 260 ids
    with pytest.raises(CheckpointError, match=f"{small}: .* up to 259 .*<.pad.>.* has 200 rows"):
        run(str(small), "--prompt", "Hello")
