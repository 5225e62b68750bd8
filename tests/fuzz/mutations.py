"""Files and JSON documents made wrong at random, and what every reader is asked: a clear error, or a load?"""

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minitune.errors import MinituneError

SECONDS = 1.0  # of the processor, for one file
STUCK = 30  # of the clock: another job may have the processor

# How many mutated files: in `make test`, and in `make test-real`.
COUNTS = pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.real)])


def fuzz(strategy: st.SearchStrategy, check: Callable[[Any], None], count: int) -> None:
    """Run `check` on `count` draws, the same ones each time."""

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(case):
        check(case)

    run()


def outcome(read: Callable[[], Any]) -> Any:
    """Return what `read` returns, None where it refuses by an error of ours; fail where it hangs or dawdles.

    Every other exception passes, and so fails the test.
    """

    def stuck(number, frame):
        raise AssertionError(f"no answer within {STUCK} s")

    before, began = signal.signal(signal.SIGALRM, stuck), time.process_time()
    signal.alarm(STUCK)
    try:
        return read()
    except MinituneError as error:
        line = str(error)
        assert line and len(line) < 100_000
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        taken = time.process_time() - began
        assert taken < SECONDS, f"{taken:.1f} s"


@st.composite
def mutated_bytes(draw, content: bytes, head: int = 4096) -> bytes:
    """Return `content` with one to three places flipped, cut off, put in, taken out or doubled, mostly in its head."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        size = max(1, len(content))
        at = draw(st.one_of(st.integers(0, min(head, size) - 1), st.integers(0, size - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        kind = draw(st.sampled_from(["flip", "flip", "number", "truncate", "insert", "delete", "double", "append"]))
        part = content[at : at + length]
        if kind == "flip":
            content = (
                content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))] if part else b"") + content[at + 1 :]
            )
        elif kind == "number":  # a count or an offset of another size
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]))
            content = content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
        elif kind == "truncate":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + length :]
        elif kind == "double":
            content = content[:at] + part + content[at:]
        else:
            content = content + draw(st.binary(min_size=1, max_size=9))
    return content


ODD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 8, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "default", "\0", "\ud800", "../x", "a" * 5000, [], [1], [None], [[]], ["x", 1], [1] * 1000,
    {}, {"x": {}}, {"0": 1}, [{"a": []}],
]  # fmt: skip


@st.composite
def mutated_json(draw, document: dict) -> str:
    """Return `document` as JSON with one to three values of another kind, keys gone, strange or given twice."""
    document = _copied(document)
    twice = None
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(document))
        holder, key = draw(st.sampled_from(places)) if places else (document, "x")
        kind = draw(st.sampled_from(["odd", "odd", "odd", "swap", "number", "remove", "new", "twice", "deep"]))
        if kind == "odd" or not places:
            holder[key] = _copied(draw(st.sampled_from(ODD)))
        elif kind == "swap":
            other, name = draw(st.sampled_from(places))
            holder[key] = _copied(other[name])
        elif kind == "number":
            holder[key] = draw(st.integers(-3, 300))
        elif kind == "remove":
            del holder[key]
        elif kind == "new" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = _copied(draw(st.sampled_from(ODD)))
        elif kind == "deep":
            for _ in range(draw(st.sampled_from([5, 300]))):
                holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            twice = key
    text = json.dumps(document)
    if twice is not None and document:
        text = text.replace("{", "{" + f"{json.dumps(str(twice))}: {draw(st.sampled_from(['0', 'null', '[]']))}, ", 1)
    if draw(st.integers(0, 20)) == 0:
        text = "[" * 100_000
    return text


def _places(document: Any) -> Any:
    """Yield (object or list, key or index) of every value inside `document`, however deep."""
    holders = [document]
    for holder in holders:
        for key in holder.keys() if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                holders.append(holder[key])


def _copied(value: Any) -> Any:
    """Return a copy of a JSON value; `copy.deepcopy` would run out of stack on deep ones."""
    return json.loads(json.dumps(value))
