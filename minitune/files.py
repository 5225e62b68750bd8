"""Files: writes that a killed process cannot leave half done, JSON objects, and the sha256 by which a file is known.

Everything is written to a temporary sibling `.NAME.tmp-PID-xxxxxxxx`, forced to the disk (fsync of every
file, then of the folder) and renamed over the target in one step; the rename is forced too. A folder that
replaces another moves the old one to `.NAME.old-PID-xxxxxxxx` first, and back if the second rename never
happens. The next writer of the same target removes what a dead writer left and restores a displaced
folder. Writing in place with a backup was rejected: a reader can meet the half-written state.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitune.errors import CheckpointError, type_name
from minitune.strict_json import loads

_live: set[Path] = set()  # temporaries of this process; its pid may be that of an earlier, dead one


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an error.

    Args:
        path: the folder to make; its parents are made too.
        overwrite: whether a folder already there, with content, is replaced as a whole.

    Raises:
        CheckpointError: something is there already and `overwrite` is False, or a file is in the way.
        OSError: the disk is full, or the place is not writable; what was there before is untouched.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; a folder was to be written there")
    if not overwrite and path.exists() and any(path.iterdir()):
        raise CheckpointError(f"{path} exists already and is not empty; choose another folder, or overwrite it")
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in (*names, "."):
                _sync(Path(folder, name))
        _replace_folder(temporary, path)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; the file written there becomes `path` when the block ends without an error."""
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a file was to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(path)
    with _temporary(path) as temporary:
        temporary.mkdir()  # a folder, so that a library's own temporary files beside the file are cleaned too
        yield temporary / path.name
        _sync(temporary / path.name)
        os.replace(temporary / path.name, path)
        _sync(path.parent)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process; it is free again when the process ends, however it ends.

    The folder itself is locked: no lock file can be left behind. Systems and file systems without such locks hold
    nothing.

    Raises:
        CheckpointError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"another process is writing to {folder}; wait for its end, or choose another") from None
    except OSError:
        pass  # a network file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file, {} where an optional one is not there.

    Raises CheckpointError where it is missing, broken, has a key twice, or is not an object.
    """
    if optional and not path.is_file():
        return {}
    try:
        content = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type_name(content)}, not an object; fetch it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write objects as JSONL, one a line; the file is there once it is whole."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def clean_leftovers(path: Path) -> None:
    """Remove what dead writers of `path` left beside it; put a displaced folder back where `path` is missing."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(tmp|old)-(\d+)-[0-9a-f]{{8}}")
    for sibling in list(path.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if not match or sibling in _live or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            os.rename(sibling, path)
        else:
            _remove(sibling)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield an unused name beside `path`; whatever is there after an error is removed."""
    temporary = _sibling(path, "tmp")
    _live.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _live.discard(temporary)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a folder already there is moved aside, then removed."""
    displaced = None
    if path.exists() and any(path.iterdir()):
        displaced = _sibling(path, "old")
        os.rename(path, displaced)
    try:
        os.replace(temporary, path)
    except BaseException:
        if displaced is not None:
            os.rename(displaced, path)
        raise
    _sync(path.parent)
    if displaced is not None:
        _remove(displaced)


def _sync(path: Path) -> None:
    """Force a file or folder to the disk; folders cannot be opened on Windows, where this is skipped."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Tell whether another process with this id runs; where that cannot be asked safely, say yes."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
