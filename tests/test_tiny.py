"""The whole way on a tiny model, through the commands' own functions, in seconds."""

import importlib
import json
import time

import pytest

from minitune import export, train

generate = importlib.import_module("minitune.generate")  # `minitune.generate` itself is the function


def test_train_save_resume_export_generate(tiny_folder, tmp_path, capsys):
    model = tiny_folder(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {w}.", "output": w * 3}) for w in "abcdefgh" * 4))
    run, out = tmp_path / "run", tmp_path / "merged"
    began = time.process_time()  # not the clock on the wall, which other processes stretch
    options = ["--model", str(model), "--data", str(rows), "--output", str(run), "--lora.dropout", "0.1",
               "--max_steps", "12", "--batch_size", "2", "--optimizer.learning_rate", "1e-2", "--threads", "1",
               "--evaluation.samples", "1", "--evaluation.sample_tokens", "4", "--validation", str(rows)]  # fmt: skip
    assert train.main(options) == 0
    assert train.main(["--output", str(run), "--resume"]) == 0
    export.main(["--model", str(model), "--adapter", str(run / "adapter"), "--merge", "--output", str(out)])
    ask = ["--prompt", "Say a.", "--max_new_tokens", "8", "--dtype", "float32"]
    generate.main(["--model", str(model), "--adapter", str(run / "adapter"), *ask])
    with_adapter = capsys.readouterr().out.splitlines()[-1]
    generate.main(["--model", str(out), *ask])
    merged = capsys.readouterr().out.splitlines()[-1]
    assert time.process_time() - began < 10
    assert with_adapter == merged
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in losses if "loss" in line]
    assert len(steps) == 12 and steps[-1] < steps[0] - 0.5
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(out)
