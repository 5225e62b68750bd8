"""`python -m minitune.fetch NAME...`: bring models and data named in the manifest to this machine."""

from dataclasses import dataclass

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
        for entry in sources.read_manifest().values():
            size = sum(file.bytes or 0 for file in entry.files)
            print(f"{entry.name}  ({f'{size / 1e6:,.1f} MB, ' if size else ''}{entry.licence}) {sources.status(entry)}")
            print(f"    {entry.about}")
            for file in entry.files:
                if file.name:
                    print(f"    {file.name}: {file.local}")
        return
    for name in config.names:
        sources.fetch(name, accept_licence=config.accept_licence, say=print)


if __name__ == "__main__":
    run_command(main)
