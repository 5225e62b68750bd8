"""The command: a plan from a config alone, its exit codes, its JSON, the questionnaire, and bad input in one line."""

import json

import pytest

from minitune.errors import ConfigError, MinituneError
from minitune.plan import PlanConfig, answered, ask, main, merged, parsed_bytes, plan
from minitune.training.config import TrainConfig

SETTINGS = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
PARAMETERS = 512 * 64 + 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)


@pytest.fixture
def folder(tmp_path):
    """A model's folder that holds nothing but its config."""
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return str(tmp_path)


def printed(capsys, *arguments) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_enough(folder, capsys):
    found = printed(capsys, "--model", folder, "--max_length", "256")
    assert found["model"]["parameters"] == PARAMETERS
    counted = found["ledger"]
    assert counted["weights"] == 2 * PARAMETERS
    begin = counted["early_gradients"] + counted["activations"] + counted["masks"]
    end = counted["gradients"] + counted["step_room"]
    peak = counted["held"] + max(begin + max(counted["loss_room"], counted["layer_room"]), end)
    assert counted["peak"] == peak
    assert found["generation"]["cache"] == 2 * 2 * 4 * 256 * 32 * 2  # keys and values, layers, rows, tokens, width
    assert found["step"]["tokens"] == 4 * 4 * 256
    assert found["memory"] is found["fits"] is found["capacities"] is None
    assert len(found["time"]) == 13 and main(["--model", f"{folder}/config.json", "--json"]) == 0


def test_defaults_are_those_of_training():
    run, train = merged(PlanConfig()), TrainConfig()
    for name in ("method", "batch_size", "max_length", "accumulation_steps", "packing", "objective"):
        assert getattr(run, name) == getattr(train, name)


def test_a_recipe_is_planned_and_options_go_over_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: rows.jsonl\nmethod: full\nbatch_size: 3\noptimizer:\n  kind: adamw8bit\nseed: 5\n")
    run = merged(PlanConfig(recipe=str(recipe), batch_size=7))
    assert (run.method, run.batch_size, run.optimizer.kind) == ("full", 7, "adamw8bit")
    assert merged(PlanConfig(recipe="qlora")).method == "qlora"
    assert merged(PlanConfig(recipe="dpo")).objective == "dpo"


def test_paged_moments_of_a_recipe_are_counted(folder, tmp_path):
    found = {}
    for paged in ("false", "true"):
        recipe = tmp_path / f"{paged}.yaml"
        recipe.write_text(f"data: rows.jsonl\nmethod: full\noptimizer:\n  paged: {paged}\n")
        found[paged] = plan(PlanConfig(folder, recipe=str(recipe), device_name="L4"))["ledger"]["optimizer"]
    assert found["false"] > found["true"] == 0
    with pytest.raises(ConfigError, match="optimizer.paged moves moments off a GPU, and this plan is for a CPU"):
        plan(PlanConfig(folder, recipe=str(recipe), device_name="CPU-2-cores"))


def test_a_penalty_of_a_recipe_is_counted(folder):
    run = plan(PlanConfig(folder, recipe="ewc"))
    assert run["ledger"]["penalty"] > 0 == plan(PlanConfig(folder))["ledger"]["penalty"]


def test_time_and_cost_follow_from_steps(folder):
    found = plan(PlanConfig(folder, tokens=100_000, epochs=3, max_length=256, device_name="L4", price=0.8))
    assert found["steps"] == -(-300_000 // 4096)
    (row,) = found["time"]
    assert row["run_seconds"] == [found["steps"] * seconds for seconds in row["step_seconds"]]
    assert row["cost"] == pytest.approx([seconds / 3600 * 0.8 for seconds in row["run_seconds"]])
    measured = plan(PlanConfig(folder, max_steps=10, device_name="L4", measured_step=2.0, price=3600.0))
    assert measured["time"][0]["step_seconds"] == [2.0, 2.0] and measured["time"][0]["cost"] == [20.0, 20.0]


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(folder, capsys):
    assert main(["--model", folder, "--memory", "100GB"]) == 0
    assert "it does not fit" not in capsys.readouterr().out
    assert main(["--model", folder, "--memory", "12MB", "--device_name", "L4", "--method", "full"]) == 1
    text = capsys.readouterr().out
    assert "what fits into 12 MB" in text and "1. --batch_size 1 --accumulation_steps 16" in text


def test_preferences_count_both_sides(folder):
    sft, dpo = (plan(PlanConfig(folder, objective=objective)) for objective in ("sft", "dpo"))
    assert dpo["step"]["tokens"] == 2 * sft["step"]["tokens"]
    assert dpo["step"]["operations"] > 2.3 * sft["step"]["operations"]  # the reference runs forward too
    reward = plan(PlanConfig(folder, objective="reward"))
    assert reward["generation"] is None and reward["step"]["operations"] < 2 * sft["step"]["operations"]


def test_steps_are_measured_where_the_weights_are(tiny_folder, tmp_path, capsys):
    model = str(tiny_folder(tmp_path / "model", tokenizer=False))
    found = printed(capsys, "--model", model, "--calibrate", "--threads", "1", "--max_length", "32", "--price", "1",
                    "--max_steps", "5")  # fmt: skip
    (row,) = found["time"]
    assert row["device"] == "here, measured" and 0 < row["step_seconds"][0] == row["step_seconds"][1] < 30
    assert row["cost"][0] == pytest.approx(5 * row["step_seconds"][0] / 3600)


@pytest.mark.parametrize(
    "text,expected", [("24GB", 24e9), ("24 gib", 24 * 2**30), ("1.5TB", 1.5e12), ("512mb", 512e6), ("2000000", 2e6)]
)
def test_memory_is_read(text, expected):
    assert parsed_bytes(text) == expected


BAD = {
    "a negative size": (("--batch_size", "-1"), "batch_size is -1"),
    "no length": (("--max_length", "0"), "max_length is 0"),
    "a length over the model's": (("--max_length", "1025"), "1,024 tokens at most"),
    "an unknown device": (("--device_name", "H100-SMX"), "did you mean 'H100-SXM'"),
    "an unknown model": (("--model", "nothere"), "no such file or folder"),
    "no memory": (("--memory", "0GB"), "write it as 24GB"),
    "memory without unit": (("--memory", "24"), "write the unit too"),
    "memory in words": (("--memory", "lots"), "write it as 24GB"),
    "memory below the weights": (("--memory", "1MB", "--vocab", "big"), "the weights alone take"),
    "a negative price": (("--price", "-2", "--device_name", "L4"), "price is -2.0"),
    "a price of nothing": (("--price", "2"), "without device_name"),
    "an unknown method": (("--method", "dora"), "method"),
    "an unknown objective": (("--objective", "dop"), "did you mean 'dpo'"),
    "an option of another method": (("--last_layers", "1"), "method is lora"),
    "more layers than there are": (("--method", "last_layers", "--last_layers", "9"), "1 to 2"),
    "a dtype without units": (("--device_name", "T4"), "no units for bfloat16"),
    "rank 0": (("--rank", "0"), "rank is 0"),
    "no such module": (("--target_modules", "[q_prj]"), "q_proj"),
    "two ends of a run": (("--tokens", "5", "--max_steps", "3"), "both set"),
    "an unknown recipe": (("--recipe", "lorra"), "lora"),
    "steps measured nowhere": (("--measured_step", "1"), "without device_name"),
    "no weights to calibrate with": (("--calibrate",), "safetensors"),
    "a part of an option that has none": (("--optimizer.paged", "true"), "unknown option 'optimizer.paged'"),
    "a missing answer": (("--answers", "[goal=labels]"), "measured is missing"),
    "an unknown answer": (("--answers", "[gaol=labels]"), "did you mean 'goal'"),
    "no file of answers": (("--answers", "nowhere.yaml"), "there is no file"),
}


@pytest.mark.parametrize("arguments,message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, message, folder, tmp_path):
    if "--vocab" in arguments:
        (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"vocab_size": 200_000}))
        arguments = arguments[:2]
    with pytest.raises(MinituneError, match=message) as caught:
        main(["--model", folder, *arguments] if "--model" not in arguments else list(arguments))
    assert "\n" not in str(caught.value)


def test_what_no_plan_counts_is_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: pattern\npattern: mlp\n")
    with pytest.raises(ConfigError, match="pattern is set, which no plan counts"):
        merged(PlanConfig(recipe=str(recipe)))


def test_questions_are_asked_again_until_answered(capsys):
    lines = iter(["labls", "l", "maybe", "no"])
    verdict = ask(lambda prompt: next(lines))
    assert verdict.step == "measure" and not list(lines)
    assert "did you mean 'labels'" in (said := capsys.readouterr().err) and "answer yes, no" in said


def test_the_end_of_the_answers_is_said():
    def read(prompt):
        raise EOFError

    with pytest.raises(ConfigError, match="--answers"):
        ask(read)


def test_answers_come_from_a_file_or_from_the_command(tmp_path, capsys):
    file = tmp_path / "answers.yaml"
    file.write_text("goal: style\nmeasured: yes\nprompted: no\n")
    assert answered(str(file)) == answered(("goal=style", "measured=yes", "prompted=no"))
    assert main(["--answers", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == "prompt"
    file.write_text("goal: style\ngoal: labels\n")
    with pytest.raises(ConfigError, match="given twice"):
        answered(str(file))
