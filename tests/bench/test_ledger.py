"""The ledger beside the process: the table by hand; with real runs, each combination within the limit."""

import dataclasses
import os
import subprocess
import sys

import pytest

from bench.ledger import COMBINATIONS, ROOT, SHAPES, main, predicted, table

BY_NAME = {one.name: one for one in COMBINATIONS}


def test_the_combinations_differ_in_what_decides():
    assert len(BY_NAME) == len(COMBINATIONS) >= 24
    tuned = [one for one in COMBINATIONS if not one.held_out]
    assert len(tuned) >= 12 and len(COMBINATIONS) - len(tuned) >= 8
    for field in ("shape", "method", "dtype", "batch", "length"):
        assert len({getattr(one, field) for one in COMBINATIONS}) > 1, field
    assert {one.shape for one in COMBINATIONS} == SHAPES.keys()


@pytest.mark.parametrize("name", ["smollm2-135m lora bf16 2 x 256, dpo", "gpt2-124m full bf16 2 x 256"])
def test_a_prediction_needs_no_model(name):
    counted, one = predicted(BY_NAME[name]), BY_NAME[name]
    more = predicted(dataclasses.replace(one, batch=2 * one.batch))
    assert counted.resident > counted.total > counted.held > 0
    assert more.activations == pytest.approx(2 * counted.activations, rel=0.001)


def test_the_table_has_a_part_for_the_held_out():
    errors = {-0.1: False, 0.05: False, 0.07: True, 0.2: True}
    rows = [
        {"name": f"run {n}", "held_out": held, "tensors": 50e6, "predicted": 1e8 * (1 + error), "measured": 1e8,
         "error": error} for n, (error, held) in enumerate(errors.items())
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert lines[2] == "| run 0 | 50 | 90 | 100 | -10.0% |"
    assert [line for line in lines if "within" in line] == ["2 of 2 within 10%", "1 of 2 within 10%"]
    assert lines.index("| run 3 | 50 | 120 | 100 | +20.0% |") > lines.index("2 of 2 within 10%")


def test_an_unknown_combination_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--one", "nothing"])
    assert ended.value.code == 2 and "no combination is called 'nothing'" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read and reset as on Linux")
@pytest.mark.parametrize("name", BY_NAME)
def test_a_process_grows_as_predicted(name):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.ledger", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.splitlines()[-1])
    assert predicted(BY_NAME[name]).resident == pytest.approx(measured, rel=BY_NAME[name].limit)
