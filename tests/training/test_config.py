"""Every option is checked, and one that the method ignores is refused; recipes are complete."""

import dataclasses
import subprocess
import sys

import pytest

from minitune import cli
from minitune.errors import ConfigError
from minitune.model.config import LoRAConfig
from minitune.training.config import LoRAOptions, Source, TrainConfig

BAD = {
    "lora.rank": ["--lora.rank", "0"],
    "lora.alpha": ["--lora.alpha", "-1"],
    "lora.dropout": ["--lora.dropout", "1.0"],
    "lora.plus_ratio": ["--lora.plus_ratio", "0"],
    "optimizer.learning_rate": ["--optimizer.learning_rate", "-1e-4"],
    "optimizer.betas": ["--optimizer.betas", "[0.9,1.0]"],
    "optimizer.eps": ["--optimizer.eps", "0"],
    "optimizer.weight_decay": ["--optimizer.weight_decay", "-0.1"],
    "optimizer.max_grad_norm": ["--optimizer.max_grad_norm", "0"],
    "schedule.warmup": ["--schedule.warmup", "10"],
    "schedule.decay": ["--schedule.kind", "wsd", "--schedule.decay", "0.97"],
    "schedule.final_ratio": ["--schedule.final_ratio", "2"],
    "evaluation.every_steps": ["--evaluation.every_steps", "0"],
    "evaluation.patience": ["--evaluation.patience", "-1"],
    "evaluation.samples": ["--evaluation.samples", "-1"],
    "evaluation.sample_tokens": ["--evaluation.sample_tokens", "0"],
    "checkpoint.every_steps": ["--checkpoint.every_steps", "-5"],
    "checkpoint.keep": ["--checkpoint.keep", "0"],
    "max_length": ["--max_length", "0"],
    "batch_size": ["--batch_size", "0"],
    "accumulation_steps": ["--accumulation_steps", "-1"],
    "epochs": ["--epochs", "0"],
    "max_steps": ["--max_steps", "0"],
    "threads": ["--threads", "0"],
    "validation_fraction": ["--validation_fraction", "1"],
    "device": ["--device", "tpu"],
    "preference.beta": ["--objective", "dpo", "--preference.beta", "0"],
    "preference.label_smoothing": ["--objective", "dpo", "--preference.label_smoothing", "0.5"],
    "preference.gamma": ["--objective", "simpo", "--preference.gamma", "-1"],
    "preference.desirable_weight": ["--objective", "kto", "--preference.desirable_weight", "0"],
    "data x: weight": ["--data", '[{"path":"x","weight":0}]'],
}
IGNORED = {
    "lora is set but method is full": ["--method", "full", "--lora.rank", "16"],
    "last_layers is set but method is lora": ["--last_layers", "2"],
    "pattern is set but method is full": ["--method", "full", "--pattern", "x"],
    "adapter is set but method is full": ["--method", "full", "--adapter", "x"],
    "lora.rank is set but adapter": ["--adapter", "x", "--lora.rank", "16"],
    "schedule.decay is 0.1; it must be left out": ["--schedule.decay", "0.1"],
    "schedule.final_ratio is 1.0; it must be left out": ["--schedule.kind", "constant", "--schedule.final_ratio", "1"],
    "validation x: weight is 2.0": ["--validation", '[{"path":"x","weight":2}]'],
    "epochs and max_steps": ["--epochs", "1", "--max_steps", "1"],
    "validation and validation_fraction": ["--validation", "x", "--validation_fraction", "0.1"],
    "evaluation.patience is set but": ["--validation_fraction", "0", "--evaluation.patience", "1"],
    "evaluation.every_steps is set but": ["--validation_fraction", "0", "--evaluation.every_steps", "1"],
    "resume and overwrite": ["--resume", "--overwrite"],
    "pattern is None": ["--method", "pattern"],
    "preference.beta is set but objective sft ignores it": ["--preference.beta", "0.1"],
    "it belongs to dpo, robust, cpo": ["--objective", "ipo", "--preference.label_smoothing", "0.1"],
    "preference.gamma is set but objective dpo": ["--objective", "dpo", "--preference.gamma", "1"],
    "preference.beta is set but objective reward": ["--objective", "reward", "--preference.beta", "1"],
    "preference.reference_cache is set but objective orpo": [
        "--objective",
        "orpo",
        "--preference.reference_cache",
        "x",
    ],
    "preference.precompute is None; it must be true": ["--objective", "dpo", "--preference.reference_cache", "x"],
    "preference.precompute is False; it must be true": [
        "--objective",
        "dpo",
        "--method",
        "full",
        "--preference.precompute",
        "false",
    ],
    "train_on is last": ["--objective", "dpo", "--train_on", "last"],
    "truncate is split": ["--objective", "dpo", "--truncate", "split"],
    "preference.label_smoothing is 0": ["--objective", "robust", "--preference.label_smoothing", "0"],
}


def parse(*argv):
    return cli.parse(TrainConfig, list(argv), prog="x", description="")


@pytest.mark.parametrize("name", BAD)
def test_a_value_without_meaning_is_refused_by_name(name):
    with pytest.raises(ConfigError) as caught:
        parse("--data", "x", *BAD[name]) if "--data" not in BAD[name] else parse(*BAD[name])
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("message", IGNORED)
def test_an_option_without_effect_is_refused(message):
    with pytest.raises(ConfigError) as caught:
        parse("--data", "x", *IGNORED[message])
    assert message in str(caught.value)


def test_every_field_has_a_docstring_and_every_count_a_check():
    import docstring_parser

    def check(config_class):
        described = {p.arg_name: p.description for p in docstring_parser.parse_from_object(config_class).params}
        for field in dataclasses.fields(config_class):
            assert described.get(field.name), f"{config_class.__name__}.{field.name}"
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)

    check(TrainConfig)
    check(Source)


def test_only_data_is_needed_and_defaults_are_filled_in():
    with pytest.raises(ConfigError, match="--data"):
        parse().resolved()
    config = parse("--data", "x.jsonl").resolved()
    assert config.data == (Source("x.jsonl"),) and config.epochs == 1.0 and config.validation_fraction == 0.05
    assert config.lora.adapter() == LoRAConfig() and config.optimizer.learning_rate > 0
    assert parse("--data", "x", "--lora.rank", "4").resolved().lora.alpha == 8.0
    assert config.resolved() == config
    full = parse("--data", "[a,b]", "--method", "full").resolved()
    assert full.lora == LoRAOptions() and full.data == (Source("a"), Source("b")) and full.resolved() == full


@pytest.mark.parametrize("recipe", sorted({path.stem for path in cli.RECIPES.glob("*.yaml")} - {"synthesis"}))
def test_recipes_are_valid(recipe):
    data = [] if recipe == "mixture" else ["--data", "x"]
    config = parse("--config", recipe, *data).resolved()
    again = parse("--config", recipe, *data, "--seed", "3")
    assert config.data and again.seed == 3


def test_help_needs_no_torch():
    code = (
        "import sys, minitune.train as door\n"
        "try: door.main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules; print('light')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--lora.rank" in out and "Width of the adapters" in out and out.endswith("light\n")
