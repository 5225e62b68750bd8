"""The train command: exit codes, and every mistake as one line with nothing lost."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from minitune.errors import run_command
from minitune.train import main
from minitune.training import run, state

SMALL = ["--max_steps", "4", "--batch_size", "2", "--accumulation_steps", "1", "--dtype", "float32", "--device", "cpu",
         "--checkpoint.every_steps", "2", "--evaluation.samples", "0", "--max_length", "128"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": "yes " * (i % 7 + 1)}) for i in range(40)))
    return path


@pytest.fixture
def train(model, rows, tmp_path, capsys):
    """Run the command in this process; returns (exit code, lines on stderr)."""

    def call(*argv, data=rows, output=tmp_path / "run"):
        given = ["--data", str(data)] if data else []
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: main(["--model", str(model), *given, "--output", str(output), *SMALL, *argv]))
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    return call


def assert_refused(outcome, *parts):
    code, lines = outcome
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and lines[-1] == errors[0], lines
    for part in parts:
        assert part in errors[0], errors[0]


def test_a_run_leaves_all_that_was_promised(train, tmp_path):
    assert train()[0] == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= set("config.yaml environment.json data.json metrics.jsonl checkpoints adapter report.md".split())
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "validation loss, best" in report and "rows.jsonl" in report and "--adapter" in report


def test_the_adapter_loads_in_peft(train, model, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from minitune.checkpoint.load import load_model

    train("--optimizer.learning_rate", "0.01")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours = load_model(model, dtype=torch.float32, adapter=tmp_path / "run" / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        assert (ours(ids) - load_model(model, dtype=torch.float32)(ids)).abs().max() > 1e-3


def test_a_full_run_loads_in_transformers_and_goes_on_from_its_result(train, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert train("--method", "full")[0] == 0
    folder = tmp_path / "run" / "model"
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
    assert train("--model", str(folder), output=tmp_path / "second")[0] == 0


def test_an_adapter_is_trained_further(train, tmp_path):
    train("--optimizer.learning_rate", "0.01")
    code, lines = train("--adapter", str(tmp_path / "run" / "adapter"), output=tmp_path / "second")
    first = [float(line.split()[-1]) for line in lines if line.startswith("step 0: validation loss")]
    best = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    assert code == 0 and first == [pytest.approx(best, abs=1e-4)], "it begins where the first run ended"


@pytest.mark.parametrize(
    "argv,parts",
    [
        (["--optimizer.learning_rat", "1"], ["did you mean 'optimizer.learning_rate'"]),
        (["--lora.rank", "0"], ["lora.rank is 0"]),
        (["--lora.target_modules", "[q_prj]"], ["'q_prj'", "did you mean 'q_proj'"]),
        (["--max_length", "8"], ["rows are over max_length 8", "50%"]),
        (["--model", "nowhere/at/all"], ["nowhere/at/all"]),
        (["--validation", "missing.csv"], ["missing.csv: no such file"]),
        (["--method", "last_layers", "--last_layers", "9"], ["last_layers is 9"]),
        (["--method", "pattern", "--pattern", "nothing_here"], ["matches no parameter"]),
        (["--resume"], ["holds no run to resume"]),
        (["--device", "cuda:7"], ["cuda:7"]),
        (["--seed", "9" * 20], ["seed is 999"]),
        (["--seed=-1"], ["seed is -1"]),
        (["--validation", '[{"path":"rows.jsonl","wieght":1}]'], ["no list of files", "path, weight"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(train, tmp_path, argv, parts):
    assert_refused(train(*argv), *parts)
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_data(train, tmp_path):
    assert_refused(train(data=tmp_path / "rws.jsonl"), "rws.jsonl: no such file; did you mean 'rows.jsonl'?")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ')
    assert_refused(train(data=tmp_path / "broken.jsonl"), "broken.jsonl:2")
    assert_refused(train(data=None), "--data")
    assert_refused(train("--validation_fraction", "0.999999"), "no row is left to train on")


def test_an_output_that_holds_a_run_is_kept(train, tmp_path):
    train()
    before = (tmp_path / "run" / "report.md").read_bytes()
    assert_refused(train(), "already holds a run", "--resume", "--overwrite", "--output")
    assert (tmp_path / "run" / "report.md").read_bytes() == before
    assert_refused(train("--overwrite", "--lora.target_modules", "[q_prj]"), "q_prj")
    assert (tmp_path / "run" / "report.md").read_bytes() == before, "deleted only once all else is in order"
    assert train("--overwrite", "--seed", "5")[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    assert_refused(train("--overwrite", output=tmp_path / "other"), "thesis.tex")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_resume_needs_no_other_option_and_refuses_changed_ones(train, tmp_path, capsys):
    train()
    report = (tmp_path / "run" / "report.md").read_text()
    assert main(["--output", str(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "report.md").read_text().split("| peak memory")[0] == report.split("| peak memory")[0]
    assert_refused(train("--resume", "--lora.rank", "2"), "lora.rank was 16 and is now 2")
    assert_refused(train("--resume", "--method", "full"), "lora is set but method is full")


def test_rows_beyond_the_positions_of_the_model_are_assert_refused(train, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": "yes " * 400}) for i in range(40)))
    assert_refused(train("--max_length", "4096", data=long), "long.jsonl:", "the model reads at most 256", "max_length")
    assert not (tmp_path / "run").exists()
    assert train("--max_length", "1024")[0] == 0, "packed rows may be longer: positions restart in each example"


def test_validation_rows_that_are_training_rows_are_called_out(train, rows):
    lines = train("--validation", str(rows))[1]
    assert any(line.startswith("40 validation examples stood among the training examples too") for line in lines)


def test_a_full_disk_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    original = state.write_tensors

    def full(path, tensors):
        if "step-0000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, tensors)

    monkeypatch.setattr(state, "write_tensors", full)
    assert_refused(train(), "the disk is full")
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("*step*")] == ["step-0000002"]
    assert train("--resume")[0] == 0


def test_exhausted_memory_names_the_knobs(train, monkeypatch):
    def greedy(model, batch):
        return torch.empty(10**15).sum(), 1, {}

    monkeypatch.setattr(run, "supervised", greedy)
    assert_refused(train(), "out of memory", "batch_size", "max_length", "gradient_checkpointing", "method lora")


def test_a_rate_that_diverges_stops_with_advice(train):
    outcome = train("--max_steps", "60", "--method", "full", "--optimizer.learning_rate", "3", "--schedule.kind",
                    "constant", "--optimizer.max_grad_norm", "null")  # fmt: skip
    assert_refused(outcome, "lower optimizer.learning_rate")


def test_a_run_that_fails_before_its_first_checkpoint_names_the_way_on(train, tmp_path, monkeypatch):
    right = run.supervised
    monkeypatch.setattr(run, "supervised", lambda model, batch: (right(model, batch)[0] * float("nan"), 1, {}))
    assert_refused(train("--validation_fraction", "0"), "step 1: the loss is nan", "--overwrite", str(tmp_path / "run"))
    monkeypatch.undo()
    assert_refused(train(), "already holds a run")
    assert train("--overwrite")[0] == 0


def cut_embedding(folder, rows):
    """Give the model in `folder` an embedding of `rows` rows, fewer or more than its tokenizer has ids."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    whole = tensors["model.embed_tokens.weight"]  # (V, D)
    spare = torch.zeros(max(0, rows - len(whole)), whole.shape[1])
    tensors["model.embed_tokens.weight"] = torch.cat([whole[:rows], spare]).contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"vocab_size": rows, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused(train, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "other")
    cut_embedding(folder, 264)
    assert train("--model", str(folder))[0] == 0, "embeddings padded to a round size are usual"
    cut_embedding(folder, 259)  # one less than the tokenizer has: the highest id, 259, is that of <|pad|>
    outcome = train("--model", str(folder), output=tmp_path / "second")
    assert_refused(outcome, str(folder), "up to 259", "<|pad|>", "has 259 rows")
    assert not (tmp_path / "second").exists()


def test_sigterm_saves_and_ends_with_143(model, rows, tmp_path):
    command = [sys.executable, "-m", "minitune.train", "--model", str(model), "--data", str(rows), "--output",
               str(tmp_path / "run"), *SMALL, "--max_steps", "100000", "--checkpoint.every_steps", "100000",
               "--evaluation.every_steps", "100000"]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"loss"' in metrics.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert json.loads((saved / "state.json").read_text())["progress"]["step"] >= 1


def test_a_run_without_optional_packages(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train()[0] == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "report.md" in names and not names & {"loss.png", "tensorboard"}
    assert "loss.png" not in (tmp_path / "run" / "report.md").read_text()
    shutil.rmtree(tmp_path / "run")


def test_two_runs_do_not_share_a_folder(train, tmp_path):
    from minitune.files import sole_writer

    train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with sole_writer(tmp_path / "run"):
        assert_refused(train("--resume"), "another process is writing to", "run")
        assert_refused(train("--overwrite"), "another process is writing to", "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_between_the_run_files_and_the_first_step_saves(train, tmp_path, monkeypatch):
    original = run.Journal.__init__

    def interrupted(self, *given):
        signal.raise_signal(signal.SIGINT)  # the import of tensorboard takes seconds
        original(self, *given)

    monkeypatch.setattr(run.Journal, "__init__", interrupted)
    code, lines = train()
    assert code == 130 and lines[-1].endswith("--resume")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000000"]
    monkeypatch.undo()
    assert train("--resume")[0] == 0


def test_the_report_shows_the_weights_that_were_kept_and_commands_that_can_be_pasted(tmp_path):
    from minitune.reporting.report import write_report
    from minitune.training.config import TrainConfig

    folder = tmp_path / "my run"
    folder.mkdir()
    lines = [{"step": step, "validation_loss": loss, "training_loss": 1.0,
              "samples": [{"prompt": "Q", "expected": "E", "answer": f"answer of {step}"}]}
             for step, loss in ((0, 3.0), (1, 1.0), (2, 2.0))]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data.json").write_text("[]")
    names = ("minitune", "torch", "dtype", "device", "threads", "processor")
    (folder / "environment.json").write_text(json.dumps(dict.fromkeys(names, "x")))
    outcome = {"status": "finished", "steps": 2, "base_loss": 3.0, "best_loss": 1.0, "best_step": 1, "seconds": 1.0,
               "target_tokens": 9, "peak_rss_mb": 1.0, "parted_step": None,
               "result": str(folder / "adapter")}  # fmt: skip
    (folder / "outcome.json").write_text(json.dumps(outcome))
    options = json.loads(json.dumps(dataclasses.asdict(TrainConfig(data="rows.jsonl").resolved())))
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    text = write_report(folder)[0].read_text()
    assert "answer of 0" in text and "answer of 1" in text and "answer of 2" not in text
    assert f"--adapter '{folder}/adapter' --chat" in text and f"--output '{folder}/merged'" in text
    assert "```python\nimport transformers\n" in text
