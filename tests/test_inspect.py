"""What `inspect` says of models, adapters and runs, and that it reads no weight to say it."""

import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitune import safetensors_io
from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError
from minitune.inspect import as_text, describe, main
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.ops.quantization import QuantizationConfig
from minitune.text.tokenizer import load_tokenizer
from minitune.training.config import OptimizerConfig
from minitune.training.optimizer import Optimizer
from minitune.training.state import Progress, save_best, save_checkpoint
from tests.checkpoint.test_gguf import write_tiny


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a tensor raises."""

    def refuse(self, destination):
        raise AssertionError(f"{self.file}: a weight was read")

    monkeypatch.setattr(safetensors_io.StoredTensor, "read_into", refuse)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return tiny_folder(tmp_path / "m")


def rewrite(folder, **change):
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def parts(facts) -> dict[str, tuple[int, int, int]]:
    return {row["part"]: (row["tensors"], row["parameters"], row["bytes"]) for row in facts["parts"]}


def test_a_folder_is_described_in_full(folder, no_weights):
    facts = describe(folder)
    assert facts["kind"] == "model, Hugging Face folder" and facts["problems"] == []
    model = facts["model"]
    assert (model["family"], model["layers"], model["width"], model["feed-forward width"]) == ("llama", 2, 32, 48)
    assert (model["heads"], model["key/value heads"], model["head width"], model["vocabulary"]) == (4, 2, 8, 260)
    assert (model["context"], model["head tied to the embedding"]) == (256, True)
    # V D; layers (2 D H d + 2 D K d); layers 3 D F; (2 layers + 1) D; four bytes each
    expected = {"embedding": (1, 260 * 32), "attention": (8, 2 * (2 * 32 * 32 + 2 * 32 * 16)),
                "mlp": (6, 2 * 3 * 32 * 48), "norms": (5, 5 * 32)}  # fmt: skip
    expected["all"] = tuple(sum(column) for column in zip(*expected.values(), strict=True))
    assert parts(facts) == {part: (count, size, 4 * size) for part, (count, size) in expected.items()}
    assert facts["tokenizer"]["kind"] == "BPE" and facts["tokenizer"]["tokens"] == 260
    assert facts["tokenizer"]["special"]["pad_token"] == "<|pad|> (259)"
    assert facts["template"]["system message"] == facts["template"]["several turns"] == "taken"
    assert len(facts["template"]["sha256"]) == 64
    assert {row["file"]: row["bytes"] for row in facts["files"]} == {
        file.name: file.stat().st_size for file in folder.iterdir()
    }


def test_shards_dtypes_and_an_own_head(tiny_folder, tmp_path, no_weights):
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=False, dtype="bfloat16", max_shard_size="20KB")
    facts = describe(folder)
    assert facts["problems"] == [] and parts(facts)["head"] == (1, 260 * 32, 2 * 260 * 32)
    assert {dtype for row in facts["parts"] for dtype in row["dtypes"]} == {"bfloat16"}
    assert len([row for row in facts["files"] if row["file"].endswith(".safetensors")]) > 2


def test_a_gguf_is_described(smollm2_path):
    facts = describe("smollm2-135m-instruct")
    assert facts["kind"] == "model, GGUF file" and facts["problems"] == []
    counted = parts(facts)
    assert counted["all"][1] == 134_515_008 and counted["all"][2] < smollm2_path.stat().st_size
    assert (counted["attention"][0], counted["mlp"][0], counted["norms"][0]) == (120, 90, 61)
    # Q4_1: 32 weights in 20 bytes; Q8_0: 32 in 34 (ggml-common.h)
    assert counted["mlp"][2] == 3 * 30 * 576 * 1536 * 20 // 32 and counted["embedding"][2] == 49_152 * 576 * 34 // 32
    assert facts["quantisation"] == "Q4_1 (210 tensors), Q8_0 (1 tensor)"
    assert facts["tokenizer"]["tokens"] == 49_152 == facts["model"]["vocabulary"]


def test_gigabytes_are_described_at_once(tmp_path):
    """A sparse file of 64 GB, whose weights would take minutes to read."""
    rows, width = 250_000, 64_000
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": rows, "hidden_size": width, "intermediate_size": 64, "head_dim": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True,
    }))  # fmt: skip
    shape, size = [rows, width], 4 * rows * width
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        stream.truncate(8 + len(header) + size)
    began = time.monotonic()
    facts = describe(tmp_path)
    assert time.monotonic() - began < 2
    assert parts(facts)["embedding"] == (1, rows * width, 64_000_000_000)
    assert len(facts["problems"]) == 10 and all(problem.endswith(" is missing") for problem in facts["problems"])


def test_every_misfit_is_listed(folder, no_weights):
    tensors = load_file(folder / "model.safetensors")
    dropped = [name for name in tensors if "layers.1" in name]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    tensors["model.norm.weight"] = torch.zeros(31)
    extra = {f"extra.{number}.weight": torch.zeros(1) for number in range(20)}
    save_file(tensors | extra, folder / "model.safetensors")
    assert sorted(describe(folder)["problems"]) == sorted([
        *(f"{name} is missing" for name in dropped),
        *(f"{name} is not part of this model" for name in extra),
        "model.norm.weight is [31] instead of [32]",
    ])  # fmt: skip


def test_what_loads_is_only_noted(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' if m['role'] != 'system' else '' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    facts = describe(folder)
    assert facts["problems"] == [] and len(facts["notes"]) == 3
    for part in ("the head is stored though it is tied", "pytorch_model.bin", "leaves out what the system says"):
        assert any(part in note for note in facts["notes"])
    load_model(folder)


def test_every_kind_of_problem_is_found_at_once(folder):
    rewrite(folder, model_type="mamba")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{")
    (folder / "chat_template.jinja").write_text("x")
    problems = describe(folder)["problems"]
    assert len(problems) == 3
    for part in ("'mamba' is not supported", "is not a whole safetensors file", "tokenizer.json"):
        assert any(part in problem for problem in problems)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda folder: rewrite(folder, model_type="mamba"), "'mamba' is not supported"),
        (lambda folder: rewrite(folder, rope_scalling={}), "did you mean 'rope_scaling'"),
        (lambda folder: rewrite(folder, num_hidden_layers=10**12), "num_layers is 1000000000000"),
        (lambda folder: rewrite(folder, vocab_size=259, pad_token_id=0), "the tokenizer's ids go up to 259"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "the chat template of"),
        (lambda folder: (folder / "config.json").write_text('{"a": 1, "a": 2}'), "the key 'a' is given twice"),
    ],
)
def test_problems_are_named_and_the_exit_code_says_so(folder, capsys, damage, expected):
    assert main([str(folder)]) == 0
    assert "problems          none" in capsys.readouterr().out
    damage(folder)
    assert main([str(folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert any(expected in problem for problem in facts["problems"])
    assert expected in as_text(facts)


def test_control_characters_of_a_file_do_not_reach_the_terminal(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"\x1b[2J\n": torch.zeros(1)}, folder / "model.safetensors")
    text = as_text(describe(folder))
    assert "\x1b" not in text and "\\x1b[2J\\n is not part of this model" in text


def test_a_quantised_folder_is_described(tiny_folder, tmp_path):
    from minitune.checkpoint.huggingface import save_model

    source = tiny_folder(tmp_path / "m", hidden_size=64, intermediate_size=128)
    save_model(load_model(source, quantize="nf4", keep_quantized=False), None, tmp_path / "q")
    facts = describe(tmp_path / "q")
    assert facts["problems"] == [] and facts["quantisation"] == "bitsandbytes nf4, double quantisation"
    count = 2 * 3 * 64 * 128
    mlp = next(row for row in facts["parts"] if row["part"] == "mlp")
    assert (mlp["parameters"], mlp["dtypes"]) == (count, ["4 bits"]) and count / 2 < mlp["bytes"] < count


def test_names_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no model, adapter or run"):
        describe(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        describe(tmp_path / "absent")
    command = [sys.executable, "-m", "minitune.inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_adapter_is_described(folder, tmp_path, request):
    model = load_model(folder)
    add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj", "v_proj")))
    save_adapter(model, tmp_path / "a", str(folder))
    request.getfixturevalue("no_weights")
    facts = describe(tmp_path / "a")
    assert facts["kind"] == "adapter, PEFT folder" and facts["problems"] == [] == facts["notes"]
    assert facts["adapter"]["r"] == 4 and facts["adapter"]["modules in the file"] == ["q_proj", "v_proj"]
    size = 2 * (4 * (32 + 32) + 4 * (32 + 16))  # layers x R (in + out) of q and v
    assert parts(facts)["adapter"] == (8, size, 4 * size)


def test_an_adapter_of_another_base_and_one_without_base(tiny_folder, folder, tmp_path):
    model = load_model(folder)
    add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj", "v_proj", "up_proj")))
    other = tiny_folder(tmp_path / "other", hidden_size=64, intermediate_size=96)
    save_adapter(model, tmp_path / "a", str(other))
    rows = {"self_attn.q_proj": (32, 64), "self_attn.v_proj": (16, 32), "mlp.up_proj": (48, 96)}
    expected = []  # more than an error of one line names
    for layer in (0, 1):
        for path, (found, wanted) in rows.items():
            name = f"base_model.model.model.layers.{layer}.{path}"
            expected.append(f"{name}.lora_A.weight is [4, 32] instead of [4, 64]")
            expected.append(f"{name}.lora_B.weight is [{found}, 4] instead of [{wanted}, 4]")
    assert sorted(describe(tmp_path / "a")["problems"]) == sorted(expected)
    save_adapter(model, tmp_path / "b", "someone/elsewhere")
    facts = describe(tmp_path / "b")
    assert facts["problems"] == [] and len(facts["notes"]) == 1
    assert "not known: someone/elsewhere: no such file or folder" in facts["notes"][0]
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    assert any("peft_type" in problem for problem in describe(tmp_path / "b")["problems"])


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped after step 4, with the checkpoints of steps 2 and 4."""
    parameters = {"a.weight": torch.nn.Parameter(torch.ones(4, 3))}
    optimizer = Optimizer(parameters, OptimizerConfig())
    parameters["a.weight"].grad = torch.ones(4, 3)
    optimizer.step(1e-3)
    root = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        save_best(root, parameters, 2)
        progress = Progress(step=step, tokens=1234, best_step=2, best_loss=1.5, seconds=19.116940774991235)
        save_checkpoint(root, parameters, optimizer, progress, {"seed": 0}, keep=2)
    (tmp_path / "run" / "config.yaml").write_text("method: lora\ndata: rows.jsonl\n")
    (tmp_path / "run" / "environment.json").write_text("{}")
    return tmp_path / "run"


def test_a_run_is_described_with_what_it_left(folder, run, capsys, request):
    model = load_model(folder)
    add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj",)))
    request.getfixturevalue("no_weights")
    facts = describe(run)
    assert facts["checkpoints"] == ["step-0000002", "step-0000004"] and facts["last"]["step"] == 4
    assert facts["last"]["seconds"] == 19.117 and facts["problems"] == []
    assert facts["result"] is None and "no adapter and no model yet" in facts["notes"][0]
    save_adapter(model, run / "adapter", str(folder))
    facts = describe(run)
    assert facts["result"]["kind"] == "adapter, PEFT folder" and facts["problems"] == [] == facts["notes"]
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert main([str(run)]) == 1
    text = capsys.readouterr().out
    assert text.count("is not a whole safetensors file") == 2  # of the run, and of its adapter


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("name, damage, expected", [
    ("checkpoints/step-0000004/optimizer.safetensors", cut, "is not a whole safetensors file"),
    ("checkpoints/step-0000002/weights.safetensors", cut, "is not a whole safetensors file"),
    ("checkpoints/step-0000004/window.safetensors", Path.unlink, "does not exist"),
    ("checkpoints/best-0000002/weights.safetensors", Path.unlink, "does not exist"),
    ("checkpoints/step-0000004/state.json", cut, "is missing or damaged"),
    ("checkpoints/step-0000004/state.json", lambda file: file.write_text("[1]"), "is missing or damaged"),
    ("checkpoints/step-0000004/state.json", lambda file: file.write_text(file.read_text().replace("1234", "1235")),
     "is missing or damaged"),
    ("checkpoints/step-0000004/state.json", Path.unlink, "is missing or damaged"),
    ("config.yaml", lambda file: file.write_text("a: ["), "broken YAML"),
    ("config.yaml", lambda file: file.write_text("method: lira"), "lira"),
    ("config.yaml", lambda file: file.write_text("rnk: 3"), "rnk"),
    ("environment.json", lambda file: file.write_text("{"), "not valid JSON"),
])  # fmt: skip
def test_what_resuming_would_refuse_is_a_problem(run, capsys, no_weights, name, damage, expected):
    assert main([str(run)]) == 0
    damage(run / name)
    assert main([str(run)]) == 1
    (problem,) = describe(run)["problems"]
    assert str(run / name) in problem and expected in problem


def test_a_truncated_gguf_is_described_and_named_once(tmp_path, capsys):
    path = write_tiny(tmp_path / "tiny.gguf")
    whole = describe(path)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    facts = describe(path)
    (problem,) = [problem for problem in facts["problems"] if "ends at byte" in problem]
    assert "the tensor blk." in problem and "reshape" not in problem
    assert facts["model"] == whole["model"] and facts["parts"] == whole["parts"]
    assert main([str(path)]) == 1 and capsys.readouterr().out.count("ends at byte") == 1


def test_several_paths_are_one_document_and_a_missing_one_is_named_last(folder, tmp_path, capsys):
    other, absent = tmp_path / "other", tmp_path / "absent"
    shutil.copytree(folder, other)
    assert main(["--json", str(folder)]) == 0 and json.loads(capsys.readouterr().out)["path"] == str(folder)
    assert main(["--json", str(folder), str(other)]) == 0
    assert [facts["path"] for facts in json.loads(capsys.readouterr().out)] == [str(folder), str(other)]
    for options, count in (([], 2), (["--json"], 2)):
        assert main([*options, str(folder), str(absent), str(other)]) == 2
        printed = capsys.readouterr()
        assert printed.out.count("model, Hugging Face folder") == count
        assert printed.err.startswith(f"error: {absent}") and printed.err.count("\n") == 1


@pytest.mark.parametrize("quantization, words", [
    (QuantizationConfig(), "nf4, blocks of 64, double quantisation"),
    (QuantizationConfig("fp4", 128, False), "fp4, blocks of 128"), (QuantizationConfig("int8"), "int8"),
])  # fmt: skip
def test_the_quantisation_of_an_adapters_base_is_said_in_words(tiny_folder, tmp_path, quantization, words):
    folder = tiny_folder(tmp_path / "m", hidden_size=64, intermediate_size=128)
    model = load_model(folder, quantize=quantization, keep_quantized=False)
    add_lora(model, LoRAConfig(rank=4, target_modules=("q_proj",)))
    save_adapter(model, tmp_path / "a", str(folder))
    assert describe(tmp_path / "a")["base quantised"] == words


def test_added_tokens_are_listed(folder):
    listed = describe(folder)["tokenizer"]["others added"]
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"}
    assert {token.split()[0] for token in listed} < special and "<|im_start|> (257)" in listed
    load_tokenizer(folder).with_tokens(["<tool>"]).save(folder)
    assert describe(folder)["tokenizer"]["others added"] == [*listed, "<tool> (260)"]
