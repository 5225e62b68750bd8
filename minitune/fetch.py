"""`python -m minitune.fetch NAME...`: bring models and data named in the manifest to this machine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from minitune.cli import parse
from minitune.errors import run_command


@dataclass(frozen=True)
class FetchConfig:
    """What to fetch.

    Args:
        names: entries of weights/manifest.toml, or names of their files; none lists them all.
        list: only show what there is, with licence, size and whether it is here, and the families that can be loaded.
        accept_licence: you have read the licence of what you name and accept it; where it asks for that, nothing is
            fetched without.
    """

    names: tuple[str, ...] = ()
    list: bool = False
    accept_licence: bool = False


def main(argv: list[str] | None = None) -> None:
    """Fetch what `argv` names, or list the manifest."""
    config = parse(
        FetchConfig, argv, prog="python -m minitune.fetch", positional="names",
        description="Fetch models and data by name; what is here already is checked and kept.",
    )  # fmt: skip
    from minitune import sources

    if config.list or not config.names:
        print("\n".join([*_entries(sources.read_manifest().values()), *_families()]))
    for name in () if config.list else config.names:
        sources.fetch(name, accept_licence=config.accept_licence, say=print)


def _entries(entries: Iterable[Any]) -> Iterator[str]:
    """Say what can be fetched: name, size, licence and whether it is here, then what it is."""
    from minitune.sources import status

    for entry in entries:
        size = sum(file.bytes or 0 for file in entry.files)
        consent = ", to be accepted" if entry.accept_licence else ""
        yield f"{entry.name}  ({f'{size / 1e6:,.1f} MB, ' if size else ''}{entry.licence}{consent}) {status(entry)}"
        yield f"    {entry.about}"
        yield from (f"    {file.name}: {file.local}" for file in entry.files if file.name)


def _families() -> Iterator[str]:
    """Say which families of models load, from Hugging Face folders and from GGUF."""
    from minitune.model.families import FAMILIES  # which imports torch

    yield "\nModels of these families load from a path, as a Hugging Face folder or a GGUF file:"
    yield from (f"{name}\n    {family.about}" for name, family in FAMILIES.items())


if __name__ == "__main__":
    run_command(main)
