"""Format compliance: does an answer have the form that was asked for, whatever it says?

A form is written as KIND:VALUE: `regex:PATTERN` (the whole answer matches), `choices:yes,no` (it is exactly one of
them), `json` (it is one JSON value, a field given once) or `json:schema.json` (which the schema accepts). White space
around an answer is not looked at; a fence of back-ticks around JSON is, since a program that reads the answer
would stop at it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitune.errors import ConfigError, nearest
from minitune.strict_json import loads

KINDS = ("regex", "choices", "json")


def answer_form(form: str) -> Callable[[str], bool]:
    """Return the test of a form: text -> whether it complies.

    Raises ConfigError for an unknown kind, a broken pattern, an empty choice, a schema that is none, or where the
    package jsonschema is missing for one; OSError for a file that cannot be read.
    """
    kind, _, value = form.partition(":")
    if kind == "regex" and value:
        return _regex(value)
    if kind == "choices":
        choices = [choice.strip() for choice in value.split(",")]
        if "" in choices:
            raise ConfigError(f"answer_form is {form!r}; name the choices, as in choices:yes,no")
        return lambda answer: answer.strip() in choices
    if kind == "json":
        return json_test(_validator(value) if value else lambda found: True)
    remedy = "write regex:PATTERN, choices:a,b, json, or json:SCHEMA.json"
    raise ConfigError(f"answer_form is {form!r}{nearest(kind, KINDS)}; {remedy}")


def _regex(pattern: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"answer_form: the pattern {pattern!r} is broken ({error}); correct it") from None
    return lambda answer: compiled.fullmatch(answer.strip()) is not None


def json_test(accepts: Callable[[Any], bool]) -> Callable[[str], bool]:
    """Return the test of an answer that is JSON, as its standard has it, whose value `accepts` takes."""

    def complies(answer: str) -> bool:
        try:
            found = loads(answer)
        except ValueError:
            return False
        return accepts(found)

    return complies


def _validator(path: str) -> Callable[[Any], bool]:
    """Return the test of a JSON schema in a file."""
    try:
        schema = loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: broken JSON ({error}); correct the schema") from None
    return schema_test(schema, path)


def schema_test(schema: Any, path: str) -> Callable[[Any], bool]:
    """Return the test of a JSON schema; nothing is fetched from elsewhere, not what it refers to either.

    `path` says where it stands. Raises ConfigError for a schema that is none, or where the package jsonschema is
    missing; so does the test, where the schema refers to what is not in it.
    """
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise ConfigError("a schema needs the package jsonschema; install minitune[schema]") from None
    try:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{path}: no JSON schema ({error.message}); correct it") from None
    validator = kind(schema, registry=referencing.Registry())

    def accepts(found: Any) -> bool:
        try:
            return validator.is_valid(found)
        except referencing.exceptions.Unresolvable as error:
            raise ConfigError(
                f"{path}: the schema refers to what is not in it ({error}); put that under $defs"
            ) from None

    return accepts
