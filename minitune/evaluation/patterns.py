"""Somebody's regular expressions on a model's texts, in a process of their own, which is ended when it takes too long.

An expression such as (a+)+$ can take longer than the universe lasts, and Python's `re` cannot be interrupted. A thread
was rejected for that reason; a library with time limits, because it is another dialect.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from minitune.errors import ConfigError, DataError

SECONDS = 5.0  # for all texts of one call, and a hundredth more for each

_CHILD = """
import json, re, sys
for expression, text in json.load(sys.stdin):
    print(int(re.search(expression, text) is not None), flush=True)
"""


def check_pattern(expression: str) -> None:
    """Raise ConfigError where a regular expression is broken."""
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the pattern {expression[:200]!r} is broken ({error}); correct it") from None


def found_in(pairs: Sequence[tuple[str, str]], origins: Sequence[str]) -> list[bool]:
    """Return for each (expression, text) whether the expression is found somewhere in the text.

    `origins` names each pair. Raises DataError, naming the pair, where the search runs for too long.
    """
    if not pairs:
        return []
    command, limit = [sys.executable, "-I", "-S", "-c", _CHILD], SECONDS + 0.01 * len(pairs)
    try:
        done = subprocess.run(command, input=json.dumps(list(pairs)).encode(), stdout=subprocess.PIPE, timeout=limit)
    except subprocess.TimeoutExpired as error:
        place = len((error.stdout or b"").splitlines())
        raise DataError(
            f"{origins[place]}: the pattern {pairs[place][0][:200]!r} ran for more than {limit:.0f} s on the answer "
            f"{pairs[place][1][:40]!r} and was stopped; write one that repeats no repetition"
        ) from None
    results = done.stdout.split()
    if done.returncode or len(results) != len(pairs):
        raise DataError(f"{origins[len(results)]}: the pattern {pairs[len(results)][0][:200]!r} cannot be searched")
    return [result == b"1" for result in results]
