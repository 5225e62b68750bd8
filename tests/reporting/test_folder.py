"""Who may write to a run folder."""

import subprocess
import sys

import pytest

from minitune.errors import ConfigError
from minitune.reporting.folder import check_folder


def dead_process() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_killed_at_its_first_file_can_begin_again(tmp_path):
    left = tmp_path / f".environment.json.tmp-{dead_process()}-0123abcd"
    left.write_text("{")
    check_folder(tmp_path, resume=False, overwrite=False)
    assert not left.exists()


@pytest.mark.parametrize("name", ["notes.txt", ".environment.json.tmp-1-0123abcd", ".other.tmp-999999-0123abcd"])
def test_what_is_not_ours_is_kept_and_refused(tmp_path, name):
    """A file of somebody else, one that a living process writes, and one of no name that a run has."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and no run"):
        check_folder(tmp_path, resume=False, overwrite=False)
    assert (tmp_path / name).read_text() == "mine"
