"""Atomic writes: a killed, failed or full-disk writer leaves the earlier file or folder whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from minitune import files
from minitune.errors import CheckpointError
from minitune.files import atomic_file, atomic_folder, sole_writer, write_rows


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(path, text="new", **options):
    with atomic_folder(path, **options) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text(text)


def test_folder_appears_whole(tmp_path):
    make(tmp_path / "a" / "b")
    assert (tmp_path / "a/b/deep/file").read_text() == "new"
    assert names(tmp_path / "a") == ["b"]


def test_folder_is_only_replaced_on_request(tmp_path):
    (tmp_path / "target").mkdir()
    make(tmp_path / "target", "old")  # an empty folder is no obstacle
    with pytest.raises(CheckpointError, match="is not empty"):
        make(tmp_path / "target")
    make(tmp_path / "target", overwrite=True)
    assert (tmp_path / "target/deep/file").read_text() == "new"
    assert names(tmp_path) == ["target"]
    with pytest.raises(CheckpointError, match="is a file"):
        make(tmp_path / "target/deep/file", overwrite=True)


@pytest.mark.parametrize("step", ["block", "sync", "rename"])
def test_failure_at_any_step_keeps_the_earlier_folder(tmp_path, monkeypatch, step):
    make(tmp_path / "target", "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "block":
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[step], full)
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "target", overwrite=True) as temporary:
        (temporary / "file").write_text("half")
        if step == "block":
            full()
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target/deep/file").read_text() == "old"


def test_failed_file_keeps_the_earlier_one(tmp_path):
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


KILLED = """
import sys, time
from minitune.files import atomic_folder, atomic_file
kind, target = sys.argv[1:]
with (atomic_folder(target, overwrite=True) if kind == "folder" else atomic_file(target)) as temporary:
    (temporary / "part" if kind == "folder" else temporary).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_writers_remains_are_cleaned_by_the_next(tmp_path, kind):
    target = tmp_path / "target"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, kind, target], stdout=subprocess.PIPE)
    writer.stdout.readline()
    beside = tmp_path / f".target.tmp-{os.getppid()}-00000000"  # of a writer that lives
    beside.mkdir()
    files.clean_leftovers(target)
    assert len(names(tmp_path)) == 2, "a living writer's temporary was removed"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not target.exists()
    files.clean_leftovers(target)
    assert names(tmp_path) == [beside.name]


def test_folder_displaced_by_a_killed_writer_comes_back(tmp_path):
    make(tmp_path / "target", "old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "target").rename(tmp_path / f".target.old-{dead.pid}-0123abcd")
    (tmp_path / f".target.tmp-{os.getpid()}-0123abcd").mkdir()  # an earlier process had this process's id
    files.clean_leftovers(tmp_path / "target")
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target/deep/file").read_text() == "old"


def test_killed_at_random_moments_the_target_is_always_whole(tmp_path):
    target = tmp_path / "target"
    with atomic_folder(target) as temporary:
        for name in "abc":
            (temporary / name).write_text("first")
    loop = (
        "import sys\nfrom minitune.files import atomic_folder\n"
        "for i in range(10**6):\n with atomic_folder(sys.argv[1], overwrite=True) as t:\n"
        "  for n in 'abc': (t / n).write_text(str(i) * 100)\n  if not i: print(flush=True)\n"
    )
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", loop, target], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.007 * attempt)
        writer.kill()
        writer.wait()
        files.clean_leftovers(target)
        assert names(tmp_path) == ["target"] and names(target) == ["a", "b", "c"]
        assert len({(target / name).read_text() for name in "abc"}) == 1


def test_a_file_is_not_written_over_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("refused before any work is done")


def test_a_folder_has_one_writer_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys, time, pathlib; from minitune.files import sole_writer\n"
        "with sole_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="another process is writing to"), sole_writer(folder):
        pytest.fail("two writers")
    process.kill()
    process.wait()
    with sole_writer(folder):
        assert names(folder) == [], "no lock file to be left behind"
    with sole_writer(folder):
        pass


def test_rows_are_written_one_a_line(tmp_path):
    rows = [{"a": "Zürich\u2028\n"}, {}]
    write_rows(tmp_path / "new" / "rows.jsonl", rows)
    text = (tmp_path / "new" / "rows.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == rows and text.count("\n") == 2 and "ü" in text
