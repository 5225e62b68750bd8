"""Answers from a server: OpenAI's chat-completions form over plain HTTP, as vLLM, llama.cpp and others serve it too.

    POST {url}/chat/completions   {"model", "messages", "max_tokens" or "max_completion_tokens", "temperature", "seed"?}
    200                           {"choices": [{"message": {"content"}, "finish_reason"}], ...}

What comes back is a whole answer, a half one that says so, or an error. A body that ends before its Content-Length,
that is not JSON or has no choices is an error; `finish_reason` other than "stop" (the length, a filter) and a content
of null give `finished=False`. What may pass by itself is asked again, each time after twice the wait: HTTP 408, 429 and
5xx, a timeout, a connection that breaks. A server that refuses the connection, and any other status, ends it at once.

The key stands in an environment variable that the user names. It goes to that one address: a redirect is refused,
nothing prints or stores it, and a server's message that repeats it is shown without. The servers' own client libraries
were rejected: they bring dozens of packages for one POST.
"""

import email.utils
import hashlib
import http.client
import itertools
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from json import dumps
from typing import Any

from minitune.errors import ConfigError, EndpointError, check_counts, check_seed, counted, type_name
from minitune.strict_json import loads

FIRST_WAIT = 1.0  # seconds before the first retry; each later one takes twice as long
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says
LARGEST_BODY = 8 << 20  # bytes of an answer

LIMIT_NAMES = ("max_tokens", "max_completion_tokens")

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """What was answered, and whether that is the whole of it."""

    text: str
    finished: bool


Responder = Callable[[Sequence[Conversation]], list[Reply]]
"""Conversations (lists of {"role", "content"}, the last one the user's) -> a reply to each, in their order."""


class _Passing(EndpointError):
    """A failure that may be gone the next time; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """A model behind an address, asked by calling it: a `Responder`.

    Raises ConfigError for an address or a number without meaning, or where the key's variable is not set.
    """

    url: str
    """As http://localhost:8000/v1, up to but without /chat/completions."""
    model: str
    """The name that the server knows the model by."""
    _: KW_ONLY
    key_variable: str | None = None
    """The environment variable that holds the key, where the server wants one."""
    timeout: float = 120.0
    """Seconds that one request may take in all."""
    retries: int = 4
    """How often a request that failed for the moment is sent again."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    limit_name: str = LIMIT_NAMES[0]
    """What the server calls that; OpenAI's reasoning models, whose thoughts count, want max_completion_tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """With a temperature: each request sends a seed of its own, made of this one, its place and what it asks."""
    parallel: int = 4
    """Requests under way at once."""

    def __post_init__(self):
        """Refuse what cannot be asked, before anything is sent."""
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/chat/completions"))
        _check_url(self.url)
        if not self.model.strip():
            raise ConfigError("the endpoint's model is empty; give the name that the server knows it by")
        check_counts(max_new_tokens=self.max_new_tokens, parallel=self.parallel)
        check_seed(self.seed)
        for name, good, wanted in (
            ("timeout", 0 < self.timeout <= threading.TIMEOUT_MAX, "above 0 (seconds)"),
            ("retries", self.retries >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("limit_name", self.limit_name in LIMIT_NAMES, " or ".join(LIMIT_NAMES)),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        self._key()

    def __call__(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the reply to each conversation, in their order.

        Raises EndpointError, with the first failure in that order, where one could not be had.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=self.parallel) as threads:
            try:
                return list(threads.map(lambda pair: self._ask(*pair, stop), enumerate(conversations)))
            finally:
                stop.set()  # after a failure: those that wait to be sent again are not

    def _ask(self, place: int, conversation: Conversation, stop: threading.Event) -> Reply:
        """Send one request, again where its failure may pass, and return the reply."""
        body = {"model": self.model, "messages": conversation, self.limit_name: self.max_new_tokens,
                "temperature": self.temperature}  # fmt: skip
        if self.seed is not None and self.temperature > 0:
            body["seed"] = derived_seed(self.seed, place, conversation) >> 32  # servers take 31 bits
        data = dumps(body).encode()
        for attempt in itertools.count():
            try:
                return _reply(self._post(data), self.url)
            except _Passing as error:
                wait = min(error.wait if error.wait is not None else FIRST_WAIT * 2**attempt, LONGEST_WAIT)
                if attempt == self.retries or stop.wait(wait):
                    tried = f" (asked {counted(attempt + 1, 'time')})" if attempt else ""
                    raise EndpointError(f"{error}{tried}") from None

    def _key(self) -> str | None:
        """Return the key; raises ConfigError, which never shows it, where it is missing or no header could hold it."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {self.key_variable} is not set; put the endpoint's key there")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {self.key_variable} holds more than a key: not plain ASCII")
        return key

    def _post(self, data: bytes) -> bytes:
        """Return the body of a good answer; `_Passing` or EndpointError for anything else."""
        key = self._key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers, method="POST")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                return _whole_body(response, deadline, self.url)
        except urllib.error.HTTPError as error:
            raise self._status_error(error, key, deadline) from None
        except TimeoutError:
            raise _Passing(f"{self.url}: no whole answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._connection_error(error) from None

    def _connection_error(self, error: Exception) -> EndpointError:
        """Return what to raise for a connection that was not made or broke."""
        cause = getattr(error, "reason", error)  # urllib wraps what happens before the request is sent
        if isinstance(cause, TimeoutError):
            return _Passing(f"{self.url}: no connection within {self.timeout:g} s")
        if isinstance(cause, ConnectionRefusedError):
            return EndpointError(f"{self.url}: the connection was refused; is the server running there?")
        if isinstance(cause, ConnectionError | http.client.HTTPException):
            return _Passing(f"{self.url}: the connection broke before the answer was whole ({_shown(str(cause))})")
        return EndpointError(f"{self.url} cannot be reached: {_shown(str(cause))}")

    def _status_error(self, error: urllib.error.HTTPError, key: str | None, deadline: float) -> EndpointError:
        """Return what to raise for a status that is not 200, with the server's own words."""
        if 300 <= error.code < 400:
            target = _shown(error.headers.get("Location", "nowhere"))
            return EndpointError(f"{self.url}: HTTP {error.code} to {target}; redirects are refused, give that address")
        try:
            text = _message(_whole_body(error, deadline, self.url))
        except (EndpointError, OSError, http.client.HTTPException):
            text = "no message"
        line = f"{self.url}: HTTP {error.code}: {_shown(text.replace(key, '***') if key else text)}"
        if error.code == 400 and (other := next((n for n in LIMIT_NAMES if n != self.limit_name and n in text), None)):
            line += f"; set limit_name to {other}"
        if error.code in (408, 429) or error.code >= 500:
            return _Passing(line, _retry_after(error.headers.get("Retry-After")))
        return EndpointError(line)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key and the data to an address that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def derived_seed(seed: int, *parts: Any) -> int:
    """Return a seed below 2 to the 63rd, a function of `seed` and what else JSON can hold."""
    digest = hashlib.sha256(dumps([seed, *parts], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"the endpoint's address is {url!r}; write it as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("the endpoint's address holds a user, a query or a fragment; a key goes in key_variable")


def _whole_body(response: Any, deadline: float, url: str) -> bytes:
    """Return all bytes of a response; an early end, too many bytes or the deadline are errors."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_BODY:
            raise EndpointError(f"{url}: the answer is longer than {LARGEST_BODY >> 20} MiB; lower max_new_tokens")
        if time.monotonic() > deadline:
            raise TimeoutError
    promised = response.headers.get("Content-Length", "")
    if promised.isdecimal() and size < int(promised):
        raise _Passing(f"{url}: half an answer: {size:,} of {counted(int(promised), 'byte')}")
    return b"".join(parts)


def _reply(body: bytes, url: str) -> Reply:
    """Return the first choice of an answer's JSON; raises EndpointError where it is not that."""
    try:
        found = loads(body.decode("utf-8"))
    except ValueError as error:
        start = _shown(body[:80].decode("utf-8", "replace"))
        raise EndpointError(f"{url}: the answer is not JSON ({error}): {start!r}; check the address") from None
    try:
        choice = found["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise EndpointError(f"{url}: the answer has no whole choice: {_shown(_message(body))}") from None
    if text is not None and not isinstance(text, str):
        raise EndpointError(f"{url}: the answer's content is {type_name(text)}, not text")
    return Reply(text or "", finished=reason == "stop" and text is not None)


def _message(body: bytes) -> str:
    """Return the message in an error's JSON where it is in the usual place, else the body itself."""
    text = body.decode("utf-8", "replace")
    try:
        error = loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _shown(text: str) -> str:
    """Return a stranger's text on one line, control characters escaped, not longer than a line or two."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line[:200] + "..." * (len(line) > 200) or "no message"


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None where there is none to be read."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
