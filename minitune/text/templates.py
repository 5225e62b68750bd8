"""Chat templates, rendered where they can do no harm: a sandbox inside a process that can be stopped.

A chat template is a program from a stranger. Jinja2's `ImmutableSandboxedEnvironment` keeps it away from Python's
internals, but cannot stop a loop or `'x' * 10**10`. So one worker process renders for all: its memory is capped
by the system, and a watchdog thread of the interpreter (`faulthandler`) ends it after a second, inside C code too.
It starts at the first rendering (0.1 s), is started anew after it was stopped, and goes when its parent does.
Rejected: a tracing budget in this process and guards around each operator, because every filter, string method
and format width is one more hole; and a thread, because it cannot be stopped.

The helpers a template may use are those of transformers (`chat_template_utils.py`): `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `{% generation %}`, `break` and `continue`, trimmed blocks.
"""

import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from minitune.errors import CheckpointError, DataError, MinituneError, type_name

SECONDS = 1.0  # for one conversation, and 1% more for each of its renderings
MEMORY = 1 << 29  # bytes of address space, where the system can cap it
CHARACTERS = 1_000_000  # that a template may write beyond four times its input


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own chat template; `source` is Jinja2, `origin` the folder or file that it was read from."""

    source: str
    origin: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the chat template of {self.origin}" if self.origin else "the chat template"

    def render(
        self, messages: Sequence[dict], cuts: Sequence[tuple[int, bool]], variables: dict[str, Any]
    ) -> list[str | MinituneError]:
        """Render `messages[:n]`, plain JSON, with the generation prompt if asked, for each (n, prompt) in `cuts`.

        `variables` are the special tokens by name (`bos_token`, ...) and, where there are any, `tools`. A rendering
        that fails is returned as the error to raise: DataError where the template refuses the conversation,
        CheckpointError where the template is at fault. A template that runs too long raises CheckpointError at once.
        """
        request = {"source": self.source, "messages": list(messages), "cuts": list(cuts), "variables": variables}
        kinds = {"text": str, "refused": DataError, "broken": CheckpointError}
        answers = _worker.ask(json.dumps(request), self.name)
        return [kinds[kind](text if kind == "text" else f"{self.name} {text}") for kind, text in answers]


class _Worker:
    """The rendering process of this process; started when first asked, again after a stop or a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, line: str, name: str) -> list[tuple[str, str]]:
        with self._lock:
            process = self._started()
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer:
                return json.loads(answer)
            if process.wait() == 1:  # the watchdog's exit code
                raise CheckpointError(f"{name} ran for more than {SECONDS:g} s and was stopped")
            # Out of its memory, Python ends in an error it can tell or, where C code asked, by a signal.
            how = f"stopped by signal {-process.returncode}" if process.returncode < 0 else f"code {process.returncode}"
            raise CheckpointError(f"the process that renders {name} ended: {how}")

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        return self._process


_worker = _Worker()


def _raise_exception(message: object) -> None:
    raise DataError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compile(source: str):
    """Return the compiled template; jinja2 is imported here because only the worker needs it."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks answers for transformers; here it is transparent."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja2's sandbox reads a forbidden attribute as undefined, which prints as nothing; this one says so."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"attribute '{attribute}' of {type_name(obj)}")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _render(source: str, limit: int, variables: dict) -> tuple[str, str]:
    """Return ("text", rendering), ("refused", why) or ("broken", why); the reasons go on after the template's name."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        written, parts = 0, []
        for part in _compile(source).generate(**variables):
            written += len(part)
            if written > limit:
                return "broken", f"wrote more than {limit} characters and was stopped"
            parts.append(part)
        return "text", "".join(parts)
    except DataError as error:
        return "refused", f"refuses the conversation: {error}"
    except SecurityError as error:
        return "broken", f"was blocked, it reaches for Python's internals: {error}"
    except TemplateSyntaxError as error:
        return "broken", f"is not valid Jinja2: line {error.lineno}: {error}"
    except (MemoryError, RecursionError) as error:
        return "broken", f"was stopped: {type(error).__name__}"
    except Exception as error:  # whatever a stranger's program raises is its answer, not a defect of ours
        return "refused", f"fails on the conversation: {type(error).__name__}: {error}"


def _serve() -> None:
    """Answer requests, one JSON line each, until the input ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not every system caps address space; the watchdog still holds
    _compile("")  # imports jinja2 before the watchdog counts
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            request = json.loads(line)
            limit, answers = CHARACTERS + 4 * len(line), []
            faulthandler.dump_traceback_later(SECONDS * (1 + len(request["cuts"]) / 100), exit=True, file=nowhere)
            for count, prompt in request["cuts"]:
                variables = {"tools": None, "documents": None, **request["variables"]}
                variables |= {"messages": request["messages"][:count], "add_generation_prompt": prompt}
                answers.append(_render(request["source"], limit, variables))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    _serve()
