"""A quick share of the certificate for every family, and the whole of it as a `real` test."""

import math
import re

import pytest
import torch

from tests.parity.cases import FAMILIES, ROPES, main_cases
from tests.parity.certificate import PAGE, issue
from tests.parity.fields import walk, walked_cases
from tests.parity.measures import BAR, QUICK, apart, certify, worst
from tests.parity.mutants import MUTANTS, PATCHES, caught, patched

pytest.importorskip("transformers")


def names(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("case", main_cases() + ROPES, ids=names(main_cases() + ROPES))
def test_forward_backward_and_cache_of_every_family(case, tmp_path):
    errors = certify(case, tmp_path, QUICK)
    assert all(error <= BAR for error in errors.values()), errors


@pytest.mark.parametrize("case", walked_cases(), ids=names(walked_cases()))
def test_every_config_field_is_used_refused_or_known_to_change_nothing(case, tmp_path):
    verdicts = walk(case, tmp_path)
    assert not [verdict for verdict in verdicts if verdict.kind == "wrong"]
    assert {"used", "refused"} <= {verdict.kind for verdict in verdicts}


def test_every_planted_bug_is_caught(tmp_path):
    seen = {}
    for case in main_cases() + ROPES:
        for mutant, error in caught(case, tmp_path / case.name).items():
            assert error > 10 * BAR, (case.name, mutant, error)
            seen.setdefault(mutant, case.name)
    assert set(seen) == {mutant.name for mutant in MUTANTS}


def test_the_error_is_that_of_the_worst_vector():
    theirs = torch.eye(3, dtype=torch.float64)
    ours = theirs + torch.tensor([[0, 0, 0], [0, 3e-3, 4e-3], [0, 0, 1e-3]], dtype=torch.float64)
    assert apart(ours, theirs) == pytest.approx(5e-3)
    assert math.isnan(worst([1e-6, apart(theirs * math.nan, theirs), 1e-6]))  # which is below no bar


@pytest.mark.parametrize("plant", PATCHES, ids=[plant.name for plant in PATCHES])
def test_bugs_of_cache_padding_and_training_are_caught_by_their_rows(plant, tmp_path):
    assert patched(plant, tmp_path) > 10 * BAR


def test_the_page_has_every_case_within_the_bar():
    text = PAGE.read_text(encoding="utf-8")
    rows = {f"{a} {b}": line for line in text.splitlines() for a, b in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", line)}
    for case in FAMILIES + ROPES:
        assert re.findall(r"\d\.?\d*e[-+]\d+", rows[case.name]), case.name
        assert all(float(number) <= BAR for number in re.findall(r"\d\.?\d*e[-+]\d+", rows[case.name])), case.name
    assert all(mutant.name in text for mutant in (*MUTANTS, *PATCHES))


@pytest.mark.real
def test_the_whole_certificate():
    torch.set_num_threads(1)
    assert issue().problems() == []
