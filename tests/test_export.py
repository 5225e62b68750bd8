"""The export door: merged and converted folders, and what it refuses."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.load import load_model
from minitune.errors import CheckpointError, ConfigError, MinituneError
from minitune.export import main
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora

IDS = torch.arange(2 * 9).view(2, 9) * 13 % 256


@pytest.fixture
def folders(tiny_folder, tmp_path):
    """A base, an adapter that changes it, and the logits of both together."""
    base = tiny_folder(tmp_path / "base")
    model = load_model(base)
    for lora in add_lora(model, LoRAConfig(rank=4)).values():
        lora.B.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    save_adapter(model, tmp_path / "adapter", str(base))
    with torch.no_grad():
        return base, tmp_path / "adapter", model(IDS)


@torch.no_grad()
def test_merged_export_has_equal_logits_in_transformers(folders, tmp_path, capsys):
    base, adapter, expected = folders
    output = tmp_path / "out"
    main(
        ["--model", str(base), "--adapter", str(adapter), "--merge", "--output", str(output), "--max_shard_gb", "2e-5"]
    )
    printed = capsys.readouterr().out
    assert "merged 14 layers into float32: 100.00% of the update survived" in printed and str(output) in printed
    assert len(list(output.glob("*.safetensors"))) > 1
    logits = AutoModelForCausalLM.from_pretrained(output)(IDS).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5
    assert AutoTokenizer.from_pretrained(output).encode("hé") == AutoTokenizer.from_pretrained(base).encode("hé")


def test_conversion_without_adapter_and_without_tokenizer(tiny_folder, tmp_path, capsys):
    base = tiny_folder(tmp_path / "base", tokenizer=False)
    main(["--model", str(base), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert "has no tokenizer" in capsys.readouterr().out
    assert load_model(tmp_path / "out").model.norm.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("options", [[], ["--dtype", "float32"]])
def test_merged_gguf_answers_alike_in_transformers(folders, tmp_path, capsys, options):
    base, adapter, expected = folders
    output = tmp_path / "out" / "merged.gguf"
    export = ["--model", str(base), "--output", str(output), "--format", "gguf", *options]
    main([*export, "--adapter", str(adapter), "--merge"])
    printed = capsys.readouterr().out
    assert "merged 14 layers" in printed and f"--model {output} --chat" in printed
    logits = AutoModelForCausalLM.from_pretrained(output.parent, gguf_file=output.name)(IDS).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5
    with pytest.raises(CheckpointError, match="merged.gguf exists already; choose another, or add --overwrite"):
        main(export)
    main([*export, "--overwrite"])
    assert [path.name for path in output.parent.iterdir()] == ["merged.gguf"]


def test_rows_that_q8_0_cannot_take_are_refused(folders, tmp_path):
    base, adapter, _ = folders  # its rows of 48 are no multiple of 32
    export = ["--model", str(base), "--adapter", str(adapter), "--merge", "--output", str(tmp_path / "out.gguf")]
    with pytest.raises(CheckpointError, match="a multiple of 32: model.layers.0.mlp.down_proj.weight"):
        main([*export, "--format", "gguf", "--dtype", "q8_0"])
    assert not (tmp_path / "out.gguf").exists()


def test_a_conversion_to_gguf_rounds_matrices_alone(tiny_folder, tmp_path, capsys):
    base = tiny_folder(tmp_path / "base", intermediate_size=64, tokenizer=False)
    main(["--model", str(base), "--output", str(tmp_path / "out.gguf"), "--format=gguf", "--dtype=q8_0"])
    assert "has no tokenizer" in capsys.readouterr().out
    stored, read = load_model(base).state_dict(), load_model(tmp_path / "out.gguf").state_dict()
    for name, weight in stored.items():
        if weight.dim() == 1:
            assert torch.equal(read[name], weight)
        else:  # half a step of 1/127 of the largest in 32, and fp16's rounding of that
            limit = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127 * 0.5 * 1.1 + 1e-3
            assert ((read[name] - weight).abs().unflatten(-1, (-1, 32)) <= limit).all()


def test_a_merge_into_fewer_bits_rounds_once(folders, tmp_path, capsys):
    """bf16 has steps of 2^-7 above 1. A weight of 1 + 2^-8 - 2^-12 alone rounds down, to 1, and an update of 2^-9 to
    that would be lost. Their sum lies above the middle and rounds up. By hand, with U = 2^-9 and the change
    C = 2^-7 - (2^-8 - 2^-12) = 2^-8 + 2^-12, the share is C / U = 2.125."""
    base, adapter = folders[0], tmp_path / "small"
    weights = safetensors.torch.load_file(base / "model.safetensors")
    names = [name for name in weights if name.endswith("q_proj.weight")]
    for name in names:
        weights[name].fill_(1 + 2**-8 - 2**-12)
    safetensors.torch.save_file(weights, base / "model.safetensors")
    model = load_model(base)
    for lora in add_lora(model, LoRAConfig(rank=1, alpha=1.0, target_modules=("q_proj",))).values():
        lora.A.data.fill_(1.0)
        lora.B.data.fill_(2**-9)
    save_adapter(model, adapter, str(base))
    output = tmp_path / "out"
    main(["--model", str(base), "--adapter", str(adapter), "--merge", "--dtype", "bfloat16", "--output", str(output)])
    assert f"merged {len(names)} layers into bfloat16: 212.50% of the update survived" in capsys.readouterr().out
    written = safetensors.torch.load_file(output / "model.safetensors")
    for name, stored in weights.items():
        expected = torch.full_like(stored, 1 + 2**-7) if name in names else stored
        assert torch.equal(written[name], expected.bfloat16()), name


def test_weights_beyond_the_range_of_the_dtype_are_refused_by_name(folders, tmp_path):
    base, adapter, _ = folders
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5  # fp16 ends at 65,504
    safetensors.torch.save_file(weights, base / "model.safetensors")
    export = ["--model", str(base), "--adapter", str(adapter), "--merge", "--output", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        main([*export, "--dtype", "float16"])
    assert not (tmp_path / "out").exists()


def test_overwriting_is_explicit_and_spares_other_folders(folders, tmp_path):
    base, _, _ = folders
    export = ["--model", str(base), "--output", str(tmp_path / "out")]
    main(export)
    with pytest.raises(CheckpointError, match="--overwrite"):
        main(export)
    main([*export, "--overwrite"])
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        main([*export, "--overwrite"])
    assert (tmp_path / "out/thesis.tex").exists()
    with pytest.raises(CheckpointError, match="not only an exported model"):
        main(["--model", str(base), "--output", str(tmp_path), "--overwrite"])


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--merge"], "merge needs an adapter"),
        (["--adapter", "x"], "add --merge"),
        (["--dtype", "int4"], "dtype"),
        (["--max_shard_gb", "0"], "max_shard_gb is 0"),
        (["--format", "gguf", "--dtype", "nf4"], "dtype nf4 is not one of --format gguf"),
        (["--dtype", "q8_0"], "use --format gguf"),
        (["--format", "gguf", "--max_shard_gb", "1"], "a GGUF file is one file"),
        (["--adaptor", "x"], "did you mean 'adapter'"),
    ],
)
def test_combinations_without_meaning_are_refused(tmp_path, options, expected):
    with pytest.raises(ConfigError, match=expected):
        main(["--model", "m", "--output", str(tmp_path / "out"), *options])


def test_missing_model_or_adapter_writes_nothing(folders, tmp_path):
    base, adapter, _ = folders
    for arguments in (["--model", "absent"], ["--model", str(base), "--adapter", str(base), "--merge"]):
        with pytest.raises(MinituneError):
            main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom minitune import export\ntry: export.main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n") and "--merge" in done.stdout
