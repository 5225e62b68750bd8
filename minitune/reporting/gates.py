"""Gates: "accuracy>=0.85" holds a command's exit code to what it measured, so that a pipeline stops at a bad model.

A gate names a number of the results by its path, dotted, or by the end of its path where only one ends so:
`classification.accuracy`, or `accuracy`. Where a number has an interval, `accuracy.low` and `accuracy.high` are its
ends, and `accuracy.low>=0.8` is the stricter gate: it fails where the rows are too few to tell. The numbers of a base
model are reached by naming `base`, so that `rouge1` is the tuned model's.

A number that is missing or NaN passes no gate, `!=` included: what was not measured proves nothing. A name that stands
for nothing, or for several numbers, is an error with the names there are: a misspelt gate must not pass or fail.
"""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitune.errors import ConfigError, nearest

FAILED = 3
"""Exit code of a command whose results did not pass a gate; 2 is a mistake in the input."""
OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
             ">": operator.gt, "<": operator.lt}  # fmt: skip
_GATE = re.compile(r"\s*([^\s<>=!][^<>=!]*?)\s*(>=|<=|==|!=|>|<)\s*([^\s<>=!].*?)\s*")
_OTHERS = ("base", "base_answers", "comparison", "others")  # parts that are not of the model itself
_SHOWN = 40  # names listed at most


@dataclass(frozen=True)
class Gate:
    """A demand on one number."""

    text: str
    name: str
    operator: str
    bound: float


@dataclass(frozen=True)
class GateOutcome:
    """What became of a gate: the path that its name stands for, the measured value (None: missing), and the verdict."""

    gate: str
    metric: str
    value: float | None
    passed: bool

    @property
    def line(self) -> str:
        """One line for a reader."""
        measured = "not measured" if self.value is None else f"{self.value:.6g}"
        return f"gate {'passed' if self.passed else 'FAILED'}: {self.gate} ({self.metric} is {measured})"


def parse_gates(texts: Sequence[str] | str | None) -> list[Gate]:
    """Return gates of texts such as "accuracy>=0.85"; raises ConfigError for one that is none."""
    gates = []
    for text in (texts,) if isinstance(texts, str) else texts or ():
        match = _GATE.fullmatch(text)
        bound = _number(match[3]) if match else None
        if bound is None:
            known = " ".join(OPERATORS)
            raise ConfigError(f"require is '{text}'; write a name, one of {known}, and a number, as in accuracy>=0.85")
        gates.append(Gate(" ".join(text.split()), match[1], match[2], bound))
    return gates


def _number(text: str) -> float | None:
    """Return the finite number that a text is, else None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def gathered(argv: Sequence[str]) -> list[str]:
    """Return a command line with every `--require` in one, which else would hold the last of them alone."""
    rest, texts, values = [], [], iter(argv)
    for word in values:
        if word == "--require":
            value = next(values, None)
            if value is None:
                raise ConfigError("require is missing its value, as in --require 'accuracy>=0.85'")
            texts.append(value)
        elif word.startswith("--require="):
            texts.append(word.removeprefix("--require="))
        else:
            rest.append(word)
    inner = [text[1:-1] if text.startswith("[") and text.endswith("]") else text for text in texts]
    return [*rest, f"--require=[{','.join(inner)}]"] if texts else rest


def numbers(results: Any, path: str = "") -> dict[str, float | None]:
    """Return every number of nested results by its dotted path, and the ends of intervals as PATH.low and PATH.high.

    `{"value": v, "interval": [a, b]}` at a path is the number v there; `X_interval` beside X is X's. What stands under
    "scores" stands at the path above.
    """
    found: dict[str, float | None] = {}
    if isinstance(results, bool) or not isinstance(results, dict | int | float | None):
        return found
    if not isinstance(results, dict):
        return {path: None if results is None else float(results)}
    for key, value in results.items():
        name, _, kind = key.rpartition("_")
        if key == "interval" or kind == "interval" and name in results:
            inner = path if key == "interval" else _joined(path, name)
            edges = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
            found |= {f"{inner}.low": edges[0], f"{inner}.high": edges[1]}
        else:
            found |= numbers(value, path if key in ("value", "scores") else _joined(path, key))
    return found


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def resolve(name: str, known: Sequence[str]) -> str:
    """Return the one path that `name` stands for; raises ConfigError, with those there are, for none or several."""
    if name in known:
        return name
    ends = [path for path in known if path.endswith(f".{name}")]
    asked = name.split(".")
    own = [path for path in ends if not any(part in _OTHERS and part not in asked for part in path.split("."))]
    found = own or ends
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"require: '{name}' could be {', '.join(found)}; write more of the path")
    tails = [path.rpartition(".")[2] for path in known]
    hint = nearest(name, [*known, *tails])
    listed = ", ".join(known[:_SHOWN]) + (f", ... ({len(known)})" if len(known) > _SHOWN else "") or "none"
    raise ConfigError(f"require: nothing measured is called '{name}'{hint or f'; there are: {listed}'}")


def check(gates: Sequence[Gate], results: dict[str, Any]) -> list[GateOutcome]:
    """Return what becomes of each gate, in order; raises ConfigError for a name that no number, or several, have."""
    known = numbers(results)
    outcomes = []
    for gate in gates:
        path = resolve(gate.name, list(known))
        value = known[path]
        missing = value is None or math.isnan(value)
        passed = not missing and OPERATORS[gate.operator](value, gate.bound)
        outcomes.append(GateOutcome(gate.text, path, None if missing else value, passed))
    return outcomes


def verdict(outcomes: Sequence[GateOutcome]) -> int:
    """Print what became of the gates; return the exit code, 0 or `FAILED`."""
    for outcome in outcomes:
        print(outcome.line)
    return 0 if all(outcome.passed for outcome in outcomes) else FAILED
