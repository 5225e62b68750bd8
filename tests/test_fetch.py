"""Fetching from packages through pip, from a small hub, and from a local path; all on this machine."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from minitune import sources
from minitune.errors import CheckpointError, FetchError
from minitune.model.families import FAMILIES
from minitune.sources import fetch, read_manifest, resolve

DATA = b"row\n" * 50_000
CONFIG = b'{"a": 1}'
BACKEND = """
def _metadata(folder):
    import os
    os.mkdir(os.path.join(folder, "source_pkg-2.0.dist-info"))
    with open(os.path.join(folder, "source_pkg-2.0.dist-info", "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: source-pkg\\nVersion: 2.0\\n")
    return "source_pkg-2.0.dist-info"
def prepare_metadata_for_build_wheel(folder, settings=None): return _metadata(folder)
def build_wheel(*arguments, **options): raise RuntimeError("nobody asked for a wheel")
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path) -> bytes:
    path = folder / "wheel_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wheel_pkg/data/rows.csv", DATA)
        archive.writestr("wheel_pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: wheel-pkg\nVersion: 1.0\n")
        archive.writestr("wheel_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("wheel_pkg-1.0.dist-info/RECORD", "")
    return path.read_bytes()


def part(folder: Path, number: int, content: bytes) -> bytes:
    """A package that holds one piece of a file."""
    path = folder / f"piece_{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"piece_{number}/data/whole.part{number}", content)
        archive.writestr(
            f"piece_{number}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: piece-{number}\nVersion: 1.0\n"
        )
        archive.writestr(f"piece_{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"piece_{number}-1.0.dist-info/RECORD", "")
    return path.read_bytes()


def sdist(folder: Path) -> bytes:
    path = folder / "source_pkg-2.0.tar.gz"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    members = {"PKG-INFO": "Metadata-Version: 2.1\nName: source-pkg\nVersion: 2.0\n", "pyproject.toml": project,
               "backend.py": BACKEND, "data/one.json": CONFIG.decode(), "data/two.csv": DATA.decode()}  # fmt: skip
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"source_pkg-2.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path.read_bytes()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An own weights folder and manifest over packages that pip finds in a folder, without any network."""
    index = tmp_path / "index"
    index.mkdir()
    home = tmp_path / "weights"
    home.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_bytes(DATA)
    pieces = [sha256(part(index, 1, DATA)), sha256(part(index, 2, CONFIG))]
    (home / "manifest.toml").write_text(f"""
[from-wheel]
about = "rows"
licence = "MIT"
source = "pypi"
requirement = "wheel-pkg==1.0"
archive_sha256 = "{sha256(wheel(index))}"
files = [{{ path = "wheel_pkg/data/rows.csv", bytes = {len(DATA)}, sha256 = "{sha256(DATA)}" }}]
[from-sdist]
about = "two files"
licence = "Apache-2.0"
source = "pypi"
requirement = "source-pkg==2.0"
archive = "sdist"
archive_sha256 = "{sha256(sdist(index))}"
files = [
    {{ name = "one", path = "data/one.json", sha256 = "{sha256(CONFIG)}" }},
    {{ name = "two", path = "data/two.csv", bytes = {len(DATA)}, sha256 = "{sha256(DATA)}" }},
]
[in-parts]
about = "a file of two packages, and its terms"
licence = "Terms of Use, https://example.org/terms"
accept_licence = true
source = "pypi"
requirement = "wheel-pkg==1.0"
archive_sha256 = "{sha256(wheel(index))}"
files = [
    {{ path = "wheel_pkg/data/rows.csv" }},
    {{ path = "whole.bin", bytes = {len(DATA + CONFIG)}, sha256 = "{sha256(DATA + CONFIG)}", parts = [
        {{ requirement = "piece-1==1.0", path = "piece_1/data/whole.part1", archive_sha256 = "{pieces[0]}" }},
        {{ requirement = "piece-2==1.0", path = "piece_2/data/whole.part2", archive_sha256 = "{pieces[1]}" }},
    ] }},
]
[from-hub]
about = "a model"
licence = "Apache-2.0"
source = "huggingface"
repository = "someone/model"
files = [{{ path = "config.json" }}, {{ path = "sub/model.safetensors" }}]
[local]
about = "here"
licence = "own"
source = "local"
path = "../mine"
files = [{{ path = "notes.txt", sha256 = "{sha256(DATA)}" }}]
""")
    monkeypatch.setenv("MINITUNE_WEIGHTS", str(home))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return home


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(weights, old, new):
    manifest = weights / "manifest.toml"
    manifest.write_text(manifest.read_text().replace(old, new))


def test_wheel_is_fetched_once_with_its_licence(weights, monkeypatch):
    said = []
    path = fetch("from-wheel", progress=False, say=said.append)
    assert path == resolve("from-wheel") == weights / "from-wheel/rows.csv"
    assert path.read_bytes() == DATA
    assert "licence: MIT" in said[0]
    assert listed(weights) == ["from-wheel", "manifest.toml"] and listed(path.parent) == ["rows.csv"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert fetch("from-wheel", progress=False) == path


def test_sdist_serves_several_names(weights):
    assert fetch("two", progress=False).read_bytes() == DATA
    assert resolve("one").read_bytes() == CONFIG
    assert resolve("from-sdist") == weights / "from-sdist"


def test_a_file_in_parts_is_put_together_once_its_licence_is_accepted(weights, monkeypatch):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded before the licence was accepted"))
        with pytest.raises(FetchError, match="https://example.org/terms; read it, then run: .* --accept_licence"):
            fetch("in-parts", progress=False, say=said.append)
    assert "https://example.org/terms" in said[0] and listed(weights) == ["manifest.toml"]
    path = fetch("in-parts", accept_licence=True, progress=False)
    assert listed(path) == ["rows.csv", "whole.bin"] and (path / "whole.bin").read_bytes() == DATA + CONFIG
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert fetch("in-parts", progress=False) == path  # nothing is fetched, so nothing is asked


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("piece-1==1.0", "piece-2==1.0", "DO NOT MATCH THE HASHES"),
        ("whole.part2", "whole.part3", "has no member piece_2/data/whole.part3"),
        (sha256(DATA + CONFIG), sha256(CONFIG + DATA), "whole.bin does not have the promised sha256"),
        ("piece-2==1.0", "piece-9==1.0", "could not download piece-9==1.0"),
    ],
)
def test_a_part_that_is_not_as_promised_leaves_nothing(weights, old, new, expected):
    edit(weights, old, new)
    with pytest.raises(FetchError, match=expected):
        fetch("in-parts", accept_licence=True, progress=False)
    assert listed(weights) == ["manifest.toml"]


def test_damaged_file_is_fetched_again(weights):
    path = fetch("from-wheel", progress=False)
    path.write_bytes(DATA[::-1])  # same size: only the sha256 tells
    assert fetch("from-wheel", progress=False).read_bytes() == DATA
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes, promised are 200,000; run: python -m minitune.fetch"):
        resolve("from-wheel")
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks its file rows.csv"):
        resolve("from-wheel")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (sha256(DATA), "0" * 64, "does not have the promised sha256 0000"),
        (f"bytes = {len(DATA)}", "bytes = 7", "promised are 7"),
        ("data/rows.csv", "data/absent.csv", "has no member wheel_pkg/data/absent.csv"),
        ("wheel-pkg==1.0", "wheel-pkg==9.9", "pip could not download wheel-pkg==9.9: ERROR"),
        (
            'licence = "MIT"\nsource = "pypi"\nrequirement',
            'licence = "MIT"\nsource = "pypi"\nrequirements',
            "requirements",
        ),
    ],
)
def test_what_was_not_promised_leaves_nothing(weights, old, new, expected):
    edit(weights, old, new)
    with pytest.raises((FetchError, CheckpointError), match=expected):
        fetch("from-wheel", progress=False)
    assert listed(weights) == ["manifest.toml"]


def test_archive_with_another_sha256_is_refused_before_it_is_built(weights):
    """pip runs an sdist's build backend; it must not come to that."""
    (weights.parent / "index/source_pkg-2.0.tar.gz").write_bytes(b"not what was promised")
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES"):
        fetch("one", progress=False)
    assert listed(weights) == ["manifest.toml"]


def test_interruption_leaves_nothing(weights, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("from-wheel", progress=False)
    assert listed(weights) == ["manifest.toml"]
    monkeypatch.undo()


def test_killed_fetch_is_cleaned_up_by_the_next(weights):
    code = (
        "import shutil, time\nfrom minitune import sources\n"
        "shutil.copyfileobj = lambda *a: (print(flush=True), time.sleep(60))\n"
        "sources.fetch('from-wheel', progress=False)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(listed(weights)) == 2
    with pytest.raises(
        CheckpointError, match="from-wheel is not fetched yet; run: python -m minitune.fetch from-wheel"
    ):
        resolve("from-wheel")
    fetch("from-wheel", progress=False)
    assert listed(weights) == ["from-wheel", "manifest.toml"]


def test_local_entry_is_checked_and_not_copied(weights):
    assert fetch("local", progress=False) == weights.parent / "mine/notes.txt" == resolve("local")
    (weights.parent / "mine/notes.txt").write_bytes(b"changed")
    with pytest.raises(FetchError, match="nothing can fetch it"):
        fetch("local", progress=False)


def test_unknown_names_and_manifests(weights, tmp_path):
    with pytest.raises(CheckpointError, match="did you mean 'from-wheel'"):
        resolve("form-wheel")
    with pytest.raises(CheckpointError, match="minitune.fetch --list"):
        fetch("zzz")
    assert resolve(tmp_path) == tmp_path
    edit(weights, 'source = "local"', 'source = "ftp"')
    with pytest.raises(CheckpointError, match="source 'ftp' is none of pypi, huggingface, local"):
        resolve("local")
    edit(weights, 'source = "ftp"', 'source = "local"\nsourced = 1')
    with pytest.raises(CheckpointError, match="sourced"):
        resolve("local")
    (weights / "manifest.toml").write_text("[x\n")
    with pytest.raises(CheckpointError, match="manifest.toml: "):
        resolve("local")


def test_shipped_manifest_is_sound(monkeypatch):
    monkeypatch.delenv("MINITUNE_WEIGHTS", raising=False)
    entries = read_manifest()
    assert {"smollm2-135m-instruct", "movie-reviews", "llamafactory-demo"} <= entries.keys()
    assert all(entry.licence and entry.about for entry in entries.values())
    digests = [file.sha256 for entry in entries.values() if entry.source == "pypi" for file in entry.files]
    assert digests and all(len(digest) == 64 for digest in digests)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: HEAD and GET on resolve, with its digests."""

    files = {"config.json": CONFIG, "sub/model.safetensors": DATA}
    lies: set[str] = set()
    asked: list[str] = []

    def answer(self):
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.removeprefix("/someone/model/resolve/main/").partition("?")[0]
        known = name in self.files and self.path.startswith("/someone/")
        content = self.files[name] if known else b""
        self.send_response(200 if known else 404)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.send_header("ETag", f'"{git}"')
        if name.endswith(".safetensors"):
            self.send_header("X-Linked-ETag", f'"{sha256(content)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[::-1] if name in self.lies else content)

    do_GET = do_HEAD = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(weights, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(Hub, "lies", set())
    monkeypatch.setattr(Hub, "asked", [])
    yield server
    server.shutdown()
    server.server_close()


def command(*arguments, **environment):
    """Run the door itself: huggingface_hub reads its settings once, at import."""
    return subprocess.run(
        [sys.executable, "-m", "minitune.fetch", *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "no_proxy": "127.0.0.1", **environment},
    )  # fmt: skip


def test_hub_files_are_fetched_checked_and_kept(weights, hub):
    done = command("from-hub")
    assert done.returncode == 0, done.stderr
    assert "licence: Apache-2.0" in done.stdout
    assert (weights / "from-hub/config.json").read_bytes() == CONFIG
    assert (weights / "from-hub/model.safetensors").read_bytes() == DATA
    assert any(line.startswith("GET") for line in Hub.asked)
    Hub.asked.clear()
    done = command("from-hub")
    assert done.returncode == 0 and "already there" in done.stdout and not Hub.asked
    (weights / "from-hub/config.json").unlink()  # offline, the hub's own cache is enough
    done = command("from-hub", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not Hub.asked, done.stderr
    assert (weights / "from-hub/config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("lie", ["config.json", "sub/model.safetensors"])
def test_hub_file_with_another_digest_is_refused(weights, hub, monkeypatch, lie):
    monkeypatch.setattr(Hub, "lies", {lie})
    done = command("from-hub")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: from-hub: someone/model"), (
        done.stderr
    )
    assert "digest" in done.stderr and "Traceback" not in done.stderr
    assert listed(weights) == ["manifest.toml"]


def test_hub_errors_are_one_line(weights, hub):
    done = command("from-hub", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: from-hub: someone/model config.json: LocalEntryNotFound"
    )
    edit(weights, "sub/model.safetensors", "sub/other.safetensors")
    done = command("from-hub")
    assert done.returncode == 2 and "EntryNotFound" in done.stderr and "Traceback" not in done.stderr
    assert listed(weights) == ["manifest.toml"]


def test_the_readme_states_the_families():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {family.about} |" in text for name, family in FAMILIES.items())


def test_door_lists_helps_and_explains(weights):
    done = command("--list")
    assert done.returncode == 0 and "from-sdist" in done.stdout and "one: one.json" in done.stdout
    assert "is not fetched yet" in done.stdout and "MIT" in done.stdout
    assert "example.org/terms, to be accepted) is not fetched yet" in done.stdout
    assert all(f"\n{family}\n    {facts.about}\n" in f"{done.stdout}\n" for family, facts in FAMILIES.items())
    done = command("in-parts")
    assert done.returncode == 2 and "--accept_licence" in done.stderr and "example.org/terms" in done.stdout
    assert command("in-parts", "--accept-licence").returncode == 0
    done = command("--help")
    assert done.returncode == 0 and "names" in done.stdout
    done = command("form-wheel")
    assert done.returncode == 2 and "did you mean 'from-wheel'" in done.stderr
