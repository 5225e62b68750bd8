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
from tests.reporting.faults import CLEAN, FAULTS, make_world

SEED, WIDTH = 3, 32
MISSES = 2  # of the faults, this many may be named otherwise


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


def test_faults_are_named_first(runs):
    named = {}
    for name, (expected, _) in FAULTS.items():
        found = alarms(runs(name))
        named[name] = expected, found[0].name if found else None
    wrong = {name: pair for name, pair in named.items() if pair[0] != pair[1]}
    assert len(named) >= 20 and len(wrong) <= MISSES, wrong


@pytest.mark.parametrize("name", CLEAN)
def test_clean_runs_raise_no_alarm(runs, name):
    assert alarms(runs(name)) == []


def test_every_finding_has_its_evidence_in_a_file_of_the_run_and_a_remedy(runs):
    for name in FAULTS:
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
    folder = shutil.copytree(runs("memorised_by_an_adapter"), tmp_path / "old")
    for name in ("facts.json", "outcome.json", "rows.json"):
        (folder / name).unlink()
    environment = json.loads((folder / "environment.json").read_text())
    del environment["memory_mb"]
    (folder / "environment.json").write_text(json.dumps(environment))
    assert [finding.name for finding in alarms(folder)][:1] == ["over-fitting"]


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


CONFIG = "{model: m, objective: sft, method: lora, optimizer: {learning_rate: 1.0e-4}}"


def _run(folder, config=CONFIG, **files):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)


def test_a_run_that_did_nothing_yet_and_lines_that_are_none(tmp_path, capsys):
    folder = tmp_path / "run"
    _run(folder)
    (folder / "metrics.jsonl").write_text('3\n"x"\n{"step": "one", "loss": 1}\n{"step": 1, "lo')
    doctor.main([str(folder)])
    assert "1. the run was killed" in capsys.readouterr().out


def test_text_of_strangers_reaches_the_terminal_escaped(runs, tmp_path, capsys):
    folder = shutil.copytree(runs("one_answer_to_all"), tmp_path / "odd")
    facts = json.loads((folder / "facts.json").read_text())
    facts["data"]["labels"] = {"\x1b[31mred\u202e": 96}
    (folder / "facts.json").write_text(json.dumps(facts))
    doctor.main([str(folder)])
    assert "\x1b" not in (printed := capsys.readouterr().out) and "\u202e" not in printed
