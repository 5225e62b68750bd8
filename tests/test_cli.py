"""Options from dataclasses: what a user types, and what a user types wrongly."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from minitune import cli
from minitune.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A nested part."""

    rank: int | None = None
    """The rank."""
    name: tuple[str, ...] | str = "all"
    """Names."""


@dataclass(frozen=True)
class Rule:
    """A part that has a kind."""

    kind: Literal["plain", "fast"] = "plain"
    """Which."""
    steps: int = 1
    """How many."""


@dataclass(frozen=True)
class Options:
    """All kinds of fields."""

    files: tuple[str, ...]
    """Files to read."""
    part: Part = field(default_factory=Part)
    """A part."""
    rule: Rule = field(default_factory=Rule)
    """A part with a kind."""
    kind: Literal["a", "b"] = "a"
    """One of two."""
    max_length: int = 5
    """A number."""
    rate: float = 1.0
    """A rate."""
    flag: bool = False
    """A switch."""


def parse(*argv):
    return cli.parse(Options, list(argv), prog="x", description="d", positional="files")


def test_values_of_every_kind():
    nested, plain = ["--part.rank", "3", "--part.name", "[q,v]"], ["--kind=b", "--max-length", "7", "--rate", "1e-3"]
    given = parse("f", "g", *nested, *plain)
    assert given == Options(("f", "g"), Part(3, ("q", "v")), kind="b", max_length=7, rate=0.001)


@pytest.mark.parametrize(
    "argv,flag", [(("f", "--flag"), True), (("--flag", "f"), True), (("f", "--flag", "false"), False), (("f",), False)]
)
def test_a_switch_needs_no_value(argv, flag):
    assert parse(*argv) == Options(("f",), flag=flag)


@pytest.mark.parametrize(
    "argv,rule",
    [(["--rule", "fast"], Rule("fast")), (["--rule=fast"], Rule("fast")), (["--rule", '{"steps": 2}'], Rule(steps=2))],
)
def test_a_part_is_named_by_its_kind_alone(argv, rule):
    assert parse("f", *argv) == Options(("f",), rule=rule)


def test_a_file_of_options_and_options_on_top(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("part: {rank: 4, name: [q]}\nrate: 1e-3\nkind: b\n")
    assert parse("f", "--config", str(path), "--kind", "a") == Options(("f",), Part(4, ("q",)), kind="a", rate=0.001)


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--part.rnk", "3"], "unknown option 'part.rnk'; did you mean 'part.rank'?"),
        (["--rank", "3"], "unknown option 'rank'; did you mean 'part.rank'?"),
        (["--max-lenght", "3"], "unknown option 'max_lenght'; did you mean 'max_length'?"),
        (["--max_length", "x"], "option max_length: expected int, got 'x'"),
        (["--part.rank", "x"], "option part.rank: expected int, null, got 'x'"),
        (["--part.speed", "3"], "unknown option 'part.speed'; part has rank, name"),
        (
            ["--part.rank"],
            "option part.rank: its value is missing; one that starts with - is written --part.rank=VALUE",
        ),
        (["--kind", "caf\udce9"], r"the argument 'caf\udce9' is not UTF-8"),
        (["--rule", "8"], "option rule.kind: expected one of ['plain', 'fast'], got '8'"),
        (["--rule", "fasst"], "option rule.kind: expected one of ['plain', 'fast'], got 'fasst'"),
        (["--kind", "c"], "option kind: expected one of ['a', 'b'], got 'c'"),
        (["--config", "nothing"], "--config nothing: no such file, nor a recipe"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse("f", *argv)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("part: {rnk: 3}", ": unknown option 'part.rnk'; did you mean 'part.rank'?"),
        ("max_length: big", ": option max_length: expected int, got 'big'"),
        ("rate: 1\npart: 5", ":2: part is no value but a group of: rank, name"),
        ("rate: 1\nrate: 2", ":2: rate is given twice; keep one of them"),
        ("part:\n  rank: 1\n  rank: 2", ":3: rank is given twice"),
        ("", ": it holds no options"),
        ("parts: {rank: 3}", ": unknown option 'parts.rank'; did you mean 'part.rank'?"),
        ("rate: 1\npart: {rank: 3", ":2: broken YAML (expected ',' or '}'"),
        ("3", ": it holds no options"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, message):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("f", "--config", str(path))
    line = str(caught.value)
    assert line.startswith(f"{path}{message}") and "\n" not in line


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_bytes("kind: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"options\.yaml: the byte at offset 6 is not UTF-8"):
        parse("f", "--config", str(path))


def test_the_nearest_recipe_is_named():
    with pytest.raises(ConfigError, match="did you mean 'lora_plus'"):
        parse("f", "--config", "lora_pluss")


def test_missing_files_are_asked_for():
    with pytest.raises(ConfigError, match="^files is missing; see --help$"):
        parse()
