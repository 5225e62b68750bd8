"""Command lines from frozen dataclasses: every field is an option, its docstring is the help.

A door calls `parse(Config, ...)` and gets a checked instance. The same fields can come from YAML (`--config`,
a recipe's bare name or a path); later options override earlier ones, so `--config lora --lora.rank 8` works.
Nested dataclasses become dotted options. jsonargparse does the typing; this file turns its errors into one
line with the nearest right name. Hand-written argparse was rejected: it declares each option three times.
"""

import dataclasses
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from minitune.errors import ConfigError, nearest

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config")


def parse(
    config_class: type[Config],
    argv: list[str] | None = None,
    *,
    prog: str,
    description: str,
    positional: str | None = None,
) -> Config:
    """Return a `config_class` filled from `argv` (default: the process's own) and any `--config` in it.

    `positional` names the one field given without a flag; a tuple field takes any number of them.
    Raises ConfigError for an unknown option, a value of the wrong type, or a recipe that is not there;
    errors that the dataclass raises itself pass through. `--help` prints and exits with 0.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = _normalised(list(sys.argv[1:] if argv is None else argv), option_names(config_class, kind=bool))
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe's name or a YAML file with these options")
    parser.add_class_arguments(config_class, skip={positional} if positional else None)
    if positional:
        _add_positional(parser, config_class, positional)
    try:
        fields = vars(parser.instantiate(parser.parse_args(arguments)))
    except (jsonargparse.ArgumentError, ValueError) as error:
        given = [a for a in arguments if a.endswith((".yaml", ".yml"))]
        in_file = re.search("config|Group|is not", str(error)) and given
        place = f"{given[-1]}: " if in_file else ""
        raise ConfigError(place + _one_line(str(error), option_names(config_class))) from None
    if positional and isinstance(fields[positional], list):
        fields[positional] = tuple(fields[positional])
    if positional and not fields[positional]:
        fields[positional] = _default(config_class, positional)
    return config_class(**{field.name: fields[field.name] for field in dataclasses.fields(config_class)})


def load_yaml(config_class: type[Config], path: Path) -> Config:
    """Return the `config_class` that a YAML file at `path` describes; errors as in `parse`."""
    return parse(config_class, ["--config", str(path)], prog="config", description="")


def option_names(config_class: type, prefix: str = "", kind: type | None = None) -> list[str]:
    """Return every option of a configuration, dotted, or those of type `kind`: ["model", "lora.rank", ...]."""
    names = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if kind is None or hint is kind or kind in typing.get_args(hint):
            names.append(prefix + field.name)
        for part in _parts(hint):
            names += option_names(part, f"{prefix}{field.name}.", kind)
    return names


def _parts(kind: Any) -> list[type]:
    """Return the dataclasses inside a type such as `tuple[Source | str, ...] | None`."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    found = [part for argument in typing.get_args(kind) for part in _parts(argument)]
    return list(dict.fromkeys(found))


def _normalised(arguments: list[str], flags: list[str]) -> list[str]:
    """Spell `--max-length` as `--max_length`, a bare `--flag` as `--flag=true`, a recipe's name as its path."""
    result = []
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{equals}{value}"
            alone = i + 1 == len(arguments) or arguments[i + 1].lower() not in ("true", "false", "yes", "no")
            if argument[2:] in flags and alone:
                argument += "=true"
        if argument.startswith("--config="):
            argument = "--config=" + _recipe(argument.removeprefix("--config="))
        elif i and arguments[i - 1] == "--config":
            argument = _recipe(argument)
        result.append(argument)
    return result


def _recipe(name: str) -> str:
    """Return the path of the recipe `name`, or of the YAML file it names."""
    if Path(name).is_file():
        return name
    shipped = RECIPES / (name if name.endswith(".yaml") else f"{name}.yaml")
    if "/" not in name and shipped.is_file():
        return str(shipped)
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    known = ", ".join(recipes)
    raise ConfigError(f"--config {name}: no such file, nor a recipe ({known}){nearest(name, recipes)}")


def _add_positional(parser: Any, config_class: type, name: str) -> None:
    """Declare `name` as the argument without a flag; a tuple takes several, a default makes it optional."""
    import docstring_parser

    described = docstring_parser.parse_from_object(config_class).params
    text = next((part.description for part in described if part.arg_name == name), None)
    required = _default(config_class, name) is dataclasses.MISSING
    kind = typing.get_type_hints(config_class)[name]
    if isinstance(kind, types.UnionType):
        kind = next(part for part in kind.__args__ if part is not type(None))
    if typing.get_origin(kind) is tuple:
        parser.add_argument(name, type=typing.get_args(kind)[0], nargs="+" if required else "*", help=text)
    elif required:
        parser.add_argument(name, type=kind, help=text)
    else:
        parser.add_argument(name, type=kind, nargs="?", help=text)


def _default(config_class: type, name: str) -> Any:
    """Return the default of a field, MISSING where it has none."""
    field = next(f for f in dataclasses.fields(config_class) if f.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


_UNKNOWN = re.compile(
    r"unrecognized arguments: (--\S+)|(?:Key|Option|option) '([^']+)'(?: is not (?:expected|accepted)|$)"
)
_WANTED = re.compile(r"Subtypes: \[(.*?)\] Errors|Expected an? (?:typing\.)?(.*?)\. Got value")
_GOT = re.compile(r"(?:Given|Got) value: (.*)")


def _one_line(message: str, names: list[str]) -> str:
    """Say in one line what jsonargparse found wrong, with the nearest option for an unknown one."""
    message = " ".join(message.split())
    unknown = _UNKNOWN.search(message)
    if unknown:
        name = (unknown[1] or unknown[2]).split("=")[0].lstrip("-")
        return f"unknown option '{name}'{_nearest_option(name, names)}"
    if message.startswith("unrecognized arguments: "):
        return f"unexpected argument '{message.split()[2]}'; options start with --, see --help"
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("NoneType", "null")
    key = re.match(r'Parser key "([^"]+)": (.*)', message)
    if not key:
        return message
    wanted, got = _WANTED.search(key[2]), _GOT.search(key[2])
    if not wanted or not got:
        return f"option {key[1]}: {key[2]}"
    return f"option {key[1]}: expected {wanted[1] or wanted[2]}, got '{got[1]}'".replace("Literal", "one of ")


def _nearest_option(name: str, names: list[str]) -> str:
    """Suggest an option for `name`: by its whole dotted name, or by its last part alone."""
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [n for n in names if n.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return f"; did you mean '{same_leaf[0]}'?"
    whole = nearest(name, names)
    if whole:
        return whole
    by_leaf = {n.rsplit(".", 1)[-1]: n for n in names}
    close = re.search(r"'(.+)'", nearest(leaf, by_leaf))
    return f"; did you mean '{by_leaf[close[1]]}'?" if close else ""
