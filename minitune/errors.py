"""Errors that a user can act on: one line that says what was found, where, and what to do.

Every door wraps its `main` in `run_command`, so a user's mistake never ends in a traceback while a
defect of ours still does. The alternative, catching `Exception` at the door, was rejected: it would
hide our own bugs behind a friendly line.
"""

import atexit
import ctypes
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them


class MinituneError(Exception):
    """Base of every error that is the input's fault; its text is one line for the user."""


class DataError(MinituneError):
    """A data file or a row in it cannot be used."""


class ConfigError(MinituneError):
    """An option, or a field of a configuration, is unknown, impossible or without effect."""


class CheckpointError(MinituneError):
    """A checkpoint, adapter or tokenizer on disk is missing, damaged or of another kind.

    `problems` has a line for each thing that is wrong, where there are several; its text may name the first few.
    """

    problems: tuple[str, ...] = ()


class FetchError(MinituneError):
    """A file named in the manifest could not be fetched or is not the one that was promised."""


class EndpointError(MinituneError):
    """A server that was asked for an answer gave none, or half of one."""


class TrainingError(MinituneError):
    """A run cannot go on (loss or gradient not finite, memory exhausted, nothing to train)."""


def closest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like `name`, None when none is close."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)), None)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice most like `name`, or "" when none is close."""
    found = closest(name, choices)
    return f"; did you mean '{found}'?" if found else ""


def check_seed(seed: int | None) -> None:
    """Raise ConfigError for a seed that torch's generators do not take; None passes."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be 0 or more, below 2 to the 63rd")


def check_counts(**counts: int | None) -> None:
    """Raise ConfigError naming the first count below 1; None passes."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1")


def counted(number: int, noun: str) -> str:
    """Return "1 token", "2,048 tokens", "2 batches"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def type_name(value: object) -> str:
    """Return the kind of a JSON value as a sentence has it: "a str", "an int", "an object", "null"."""
    name = {"NoneType": "null", "dict": "object"}.get(type(value).__name__, type(value).__name__)
    return name if name == "null" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


MEMORY_KNOBS = (
    "lower batch_size or max_length, turn on gradient_checkpointing, use dtype bfloat16, or train with method lora "
    "or qlora"
)


def _explain(error: BaseException) -> str | None:
    """Return the line to print for an error that is not a defect of ours, or None for one that is."""
    if isinstance(error, MinituneError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full while writing {error.filename or 'a file'}; free some space and run the command again"
    exhausted = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA, Windows, Linux
    if isinstance(error, MemoryError) or any(text in str(error) for text in exhausted):
        return f"out of memory: {MEMORY_KNOBS}"
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next tensor; elsewhere, or where it has other orders, do nothing.

    By itself malloc maps blocks from 32 MB on singly, gives them back and, a step later, has the system clear new pages
    for the same tensors: of full fine-tuning (135M, 4 x 256, two threads) a tenth of the time, of LoRA up to 4%. The
    peak of memory is up to 3% higher (`bench/NOTES.md`). A setting of malloc in the environment (MALLOC_...,
    GLIBC_TUNABLES) is left as it is.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)) if mallopt else ():
        mallopt(option, value)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a door's `main`, exit with its code; user errors become one line on stderr and exit code 2.

    Ctrl-C exits with 130, as shells expect. Anything else keeps its traceback: it is our defect.
    """
    keep_freed_memory()
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted; run the same command again (a training run that has begun: with --resume)", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = 2
    # Another Ctrl-C while Python winds up would print a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code or 0)
