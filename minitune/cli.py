"""Command lines from frozen dataclasses: every field is an option, its docstring is the help.

A door calls `parse(Config, ...)` and gets a checked instance. The same fields can come from YAML (`--config`,
a recipe's bare name or a path); later options override earlier ones, so `--config lora --lora.rank 8` works.
Nested dataclasses become dotted options. jsonargparse does the typing; this file turns its errors into one
line with the nearest right name. Hand-written argparse was rejected: it declares each option three times.
"""

import dataclasses
import re
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from minitune.errors import ConfigError, closest, nearest

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

    `positional` names the tuple field that is given without a flag, any number of times.
    Raises ConfigError for an unknown option, a value of the wrong type, or a recipe that is not there;
    errors that the dataclass raises itself pass through. `--help` prints and exits with 0.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = _normalised(list(sys.argv[1:] if argv is None else argv), config_class)
    files = [value.removeprefix("--config=") for value in arguments if value.startswith("--config=")]
    files += [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--config"]
    for file in files:
        _check_file(file, config_class)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe's name or a YAML file with these options")
    parser.add_class_arguments(config_class, skip={positional} if positional else None)
    if positional:
        _add_positional(parser, config_class, positional)
    try:
        fields = vars(parser.instantiate(parser.parse_args(arguments)))
    except (jsonargparse.ArgumentError, ValueError) as error:
        key = re.match(r'Parser key "([^"]+)"', str(error))
        typed = key and any(re.match(rf"--{re.escape(key[1])}\b", argument) for argument in arguments)
        in_file = files and not typed and (key or re.search("config|Group|is not", str(error)))
        place = f"{files[-1]}: " if in_file else ""
        raise ConfigError(place + _one_line(str(error), option_names(config_class))) from None
    if positional:
        fields[positional] = tuple(fields[positional] or ())
    return config_class(**{field.name: fields[field.name] for field in dataclasses.fields(config_class)})


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


def _normalised(arguments: list[str], config_class: type) -> list[str]:
    """Spell `--max-length` as `--max_length`, a bare `--flag` as `--flag=true`, a recipe's name as its path.

    `--optimizer sgd` is short for `--optimizer.kind sgd`, wherever a part of the options has a kind.
    """
    result = []
    flags = option_names(config_class, kind=bool)
    kinds = [name.removesuffix(".kind") for name in option_names(config_class) if name.endswith(".kind")]
    for i, argument in enumerate(arguments):
        if not argument.isprintable() and any("\ud800" <= c <= "\udfff" for c in argument):
            raise ConfigError(f"the argument {argument!a} is not UTF-8; rename that file or folder, or retype the text")
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            word = value if equals else "".join(arguments[i + 1 : i + 2])
            argument = f"--{name}{'.kind' * (name in kinds and not word.startswith('{'))}{equals}{value}"
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


def _check_file(path: str, config_class: type) -> None:
    """Refuse a YAML file that is broken, no list of options, or gives one twice, which YAML would let pass."""
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the byte at offset {error.start} is not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}:{error.problem_mark.line + 1}: broken YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML ({error})") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: it holds no options; write each on a line, as in 'batch_size: 4'")
    refuse_twice(root, path)
    hints = typing.get_type_hints(config_class)
    for key, value in root.value:
        if dataclasses.is_dataclass(hints.get(key.value)) and not isinstance(value, yaml.MappingNode):
            inner = ", ".join(field.name for field in dataclasses.fields(hints[key.value]))
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} is no value but a group of: {inner}")


def refuse_twice(node: Any, path: str) -> None:
    """Raise ConfigError where an object anywhere below `node` (of `yaml.compose`) has a key twice."""
    children = node.value if isinstance(node.value, list) else []
    keys = [child[0] for child in children if isinstance(child, tuple)]
    for number, key in enumerate(keys):
        if key.value in [earlier.value for earlier in keys[:number]]:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice; keep one of them")
    for child in children:
        refuse_twice(child[1] if isinstance(child, tuple) else child, path)


def _add_positional(parser: Any, config_class: type, name: str) -> None:
    """Declare the tuple `name` as what is given without a flag: at least one where the field has no default."""
    import docstring_parser

    described = docstring_parser.parse_from_object(config_class).params
    text = next((part.description for part in described if part.arg_name == name), None)
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    kind = typing.get_args(typing.get_type_hints(config_class)[name])[0]
    parser.add_argument(name, type=kind, nargs="+" if field.default is dataclasses.MISSING else "*", help=text)


_UNKNOWN = re.compile(
    r"unrecognized arguments: (--\S+)|(?:Group '([^']+)'.*)?(?:Key|Option|option) '([^']+)'"
    r"(?: is not (?:expected|accepted)|$)"
)
_WANTED = re.compile(r"Subtypes: \[(.*?)\] Errors|Expected an? (?:typing\.)?(.*?)\. Got value")
_GOT = re.compile(r"(?:Given|Got) value: (.*)")


def _one_line(message: str, names: list[str]) -> str:
    """Say in one line what jsonargparse found wrong, with the nearest option for an unknown one."""
    message = " ".join(message.split())
    unknown = _UNKNOWN.search(message)
    if unknown:
        name = f"{unknown[2]}.{unknown[3]}" if unknown[2] else unknown[1] or unknown[3]
        name = name.split("=")[0].lstrip("-")
        return f"unknown option '{name}'{_nearest_option(name, names)}"
    if message.startswith("unrecognized arguments: "):
        return f"unexpected argument '{message.split()[2]}'; options start with --, see --help"
    lacking = re.search(r"arguments? (?:are required: |--)(\S+?)(:? expected one argument|$| -)", message)
    if lacking and lacking[2].startswith(":"):
        return f"option {lacking[1]}: its value is missing; one that starts with - is written --{lacking[1]}=VALUE"
    if lacking:
        return f"{lacking[1]} is missing; see --help"
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("NoneType", "null")
    message = message.replace("typing.", "")
    key = re.match(r'Parser key "([^"]+)": (.*)', message)
    if not key:
        return message
    wanted, got = _WANTED.search(key[2]), _GOT.search(key[2])
    if not wanted or not got:
        return f"option {key[1]}: {key[2]}"
    if nested := re.match(r"NestedArg\(key='([^']+)'", got[1]):  # such as --optimizer.paged, where it has no parts
        return f"unknown option '{key[1]}.{nested[1]}'; here --{key[1]} takes a value alone, see --help"
    return f"option {key[1]}: expected {wanted[1] or wanted[2]}, got '{got[1]}'".replace("Literal", "one of ")


def _nearest_option(name: str, names: list[str]) -> str:
    """Suggest an option for `name`: by its last part, within its group, or by its whole dotted name."""
    group, _, leaf = name.rpartition(".")
    by_leaf = {n.rpartition(".")[2]: n for n in reversed(names)}
    inside = {n.removeprefix(f"{group}."): n for n in names if group and n.startswith(f"{group}.")}
    if leaf in by_leaf or not inside:
        close = by_leaf.get(leaf) or closest(name, names) or by_leaf.get(closest(leaf, by_leaf))
    else:
        close = inside.get(closest(leaf, inside))
    listed = f"; {group} has {', '.join(inside)}" if inside else ""
    return f"; did you mean '{close}'?" if close else listed
