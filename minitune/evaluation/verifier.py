"""A user's own function as the judge of answers: found by name, called with care.

It is given the prompt and an answer, and the row's own answer too where it has a parameter `reference`, and returns a
finite number or a bool; what it raises or returns instead is an error that names the row, never a score.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from minitune.errors import ConfigError, DataError, nearest


def load_verifier(name: str) -> Callable[..., Any]:
    """Return the function named "package.module:function"; raises ConfigError where it is not to be had."""
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ConfigError(f"verifier is '{name}'; write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"verifier {name}: importing it failed ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        state = "has no" if found is None else "holds something else as"
        raise ConfigError(
            f"verifier {name}: {module_name} {state} function '{function}'{nearest(function, vars(module))}"
        )
    return found


def takes_reference(verifier: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter `reference`, to be given the row's own answer in."""
    try:
        return "reference" in inspect.signature(verifier).parameters
    except ValueError:  # a built-in that does not say
        return False


def verified(verifier: Callable[..., Any], origin: str, prompt: Any, text: str, **more: Any) -> float:
    """Return the score of `verifier(prompt, text, **more)`, `text` being an answer to the row at `origin`.

    Raises DataError naming the row where it fails or returns no finite number.
    """
    where = f"{origin}: the verifier, given the completion {text[:40]!r},"
    try:
        value = verifier(prompt, text, **more)
        number = math.nan if isinstance(value, str | None) else float(value)
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"{where} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(number):
        raise DataError(f"{where} returned {value!r}; it must return a finite number or a bool")
    return number
