"""Answers from a server: whole, marked as half, or an error that says which of the many things went wrong."""

import json
import socket
import threading
import time
from email.utils import formatdate

import pytest

from minitune import endpoint
from minitune.endpoint import Endpoint, Reply
from minitune.errors import ConfigError, EndpointError
from tests.chat_server import Answer, chat_server

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def ask(answer, conversations=(ASKED,), **options):
    with chat_server(answer) as server:
        return Endpoint(server.url, "small", **{"timeout": 5.0, "retries": 2, **options})(list(conversations)), server


def failure(answer, **options):
    with pytest.raises(EndpointError) as caught:
        ask(answer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_turn(*answers):
    left = list(answers)
    return lambda request: left.pop(0)


def test_the_request_is_the_form_that_servers_read():
    replies, server = ask(lambda request: "Paris", max_new_tokens=7, temperature=0.5, seed=3)
    (request,) = server.requests
    seed = request.pop("seed")
    assert request == {"model": "small", "messages": ASKED, "max_tokens": 7, "temperature": 0.5}
    assert 0 <= seed < 2**31
    assert replies == [Reply("Paris", True)]
    assert server.headers[0]["Content-Type"] == "application/json" and "Authorization" not in server.headers[0]


def test_a_server_that_wants_the_length_by_its_other_name_is_told_of_and_gets_it():
    """OpenAI's words for its reasoning models."""
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def answer(request):
        return Answer(status=400, body={"error": {"message": words}}) if "max_tokens" in request else "Paris"

    assert failure(answer).endswith(f"HTTP 400: {words}; set limit_name to max_completion_tokens")
    replies, server = ask(answer, max_new_tokens=7, limit_name="max_completion_tokens")
    assert replies == [Reply("Paris", True)] and server.requests[0]["max_completion_tokens"] == 7


def test_seeds_are_the_requests_own_and_the_same_each_time():
    seeds = []
    for _ in range(2):
        _, server = ask(lambda request: "x", [ASKED, ASKED, [*ASKED, *ASKED]], temperature=1.0, seed=0, parallel=1)
        seeds.append([request["seed"] for request in server.requests])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 3
    _, server = ask(lambda request: "x", temperature=0.0, seed=5)
    assert "seed" not in server.requests[0]  # greedy: it would have no effect


@pytest.mark.parametrize(
    "answer, expected",
    [
        (Answer("", "stop"), Reply("", True)),
        (Answer("cut of", "length"), Reply("cut of", False)),
        (Answer("I ca", "content_filter"), Reply("I ca", False)),
        (Answer("so far", None), Reply("so far", False)),
        (Answer(None, "stop"), Reply("", False)),
        (Answer("Zürich 🦋", "stop"), Reply("Zürich 🦋", True)),
    ],
)
def test_a_reply_says_whether_it_is_whole(answer, expected):
    assert ask(lambda request: answer)[0] == [expected]


def test_replies_keep_the_order_of_the_questions_though_answers_come_in_another():
    def answer(request):
        number = int(request["messages"][0]["content"])
        time.sleep(0.02 * (7 - number))  # the first is answered last
        return str(number)

    asked = [[{"role": "user", "content": str(number)}] for number in range(8)]
    assert [reply.text for reply in ask(answer, asked, parallel=8)[0]] == [str(number) for number in range(8)]


def test_as_many_requests_are_under_way_as_allowed():
    barrier = threading.Barrier(3, timeout=5)
    replies, _ = ask(lambda request: str(barrier.wait() >= 0), [ASKED] * 3, parallel=3, retries=0)
    assert [reply.text for reply in replies] == ["True"] * 3  # each waited for the two others
    running = []

    def alone(request):
        running.append(1)
        time.sleep(0.01)
        return str(len([running.pop()] + running))

    assert [reply.text for reply in ask(alone, [ASKED] * 4, parallel=1)[0]] == ["1"] * 4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(status):
    busy = Answer(status=status, body={"error": {"message": "busy"}})
    replies, server = ask(in_turn(busy, busy, "Paris"))
    assert replies == [Reply("Paris", True)] and len(server.requests) == 3


def test_a_server_that_always_fails_is_asked_a_bounded_number_of_times():
    asked = []
    message = failure(lambda request: asked.append(1) or Answer(status=500, body={"error": {"message": "no memory"}}))
    assert "HTTP 500: no memory (asked 3 times)" in message and len(asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_other_statuses_end_it_at_once_with_the_servers_words(status):
    asked = []
    body = {"error": {"message": "the context is\nfull\x1b[31m"}}
    message = failure(lambda request: asked.append(1) or Answer(status=status, body=body))
    assert f"HTTP {status}: the context is full\\x1b[31m" in message and len(asked) == 1
    assert "plain words" in failure(lambda request: Answer(status=status, body=b"plain words"))
    assert "no message" in failure(lambda request: Answer(status=status, body=b""))
    assert "no message" in failure(lambda request: Answer(status=status, body=b"x", missing=9))


def test_waits_double_and_retry_after_is_honoured_within_a_cap(monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 1.0)
    ask(in_turn(*[Answer(status=503)] * 3, "x"), retries=3)
    assert [wait for wait in waits if wait is not None and wait >= 1] == [1.0, 2.0, 4.0]
    assert endpoint._retry_after("7") == 7.0 and endpoint._retry_after("soon") is endpoint._retry_after(None) is None
    assert 28 < endpoint._retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert endpoint._retry_after(formatdate(time.time() - 30, usegmt=True)) == 0.0
    for asked_for, waited in (("3", 3.0), ("86400", endpoint.LONGEST_WAIT), ("0", 0.0)):
        waits.clear()
        ask(in_turn(Answer(status=429, headers={"Retry-After": asked_for}), "x"))
        assert waited in waits


def test_a_server_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(EndpointError, match="refused; is the server running there?"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "small", retries=4)([ASKED])
    assert time.monotonic() - began < 2
    with pytest.raises(EndpointError, match="nowhere.invalid/v1 cannot be reached"):
        Endpoint("http://nowhere.invalid/v1", "small")([ASKED])


def test_a_server_that_is_slow_to_begin_or_to_end():
    late = Answer("Paris", wait=0.6)
    assert "no whole answer within 0.2 s (asked 2 times)" in failure(lambda request: late, timeout=0.2, retries=1)
    trickling = Answer("Paris " * 20, trickle=0.02)  # each byte comes in time, all of them do not
    assert "no whole answer within 0.2 s" in failure(lambda request: trickling, timeout=0.2, retries=0)
    assert ask(in_turn(late, "Paris"), timeout=0.2)[0] == [Reply("Paris", True)]


def test_half_a_body_is_no_answer():
    half = Answer("Paris", missing=100)
    message = failure(lambda request: half)
    assert "half an answer" in message and "(asked 3 times)" in message
    assert ask(in_turn(half, "Paris"))[0] == [Reply("Paris", True)]

    def raises(request):
        raise RuntimeError

    assert "the connection broke before the answer was whole" in failure(raises)


@pytest.mark.parametrize(
    "body, expected",
    [
        (b"<html>Welcome</html>", "is not JSON .*: '<html>Welcome</html>'; check the address"),
        (b'{"choices": [{"message": {"content": "Par', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"choices": [], "choices": []}', "is given twice"),
        ({}, "has no whole choice: {}"),
        ([], "has no whole choice"),
        (3, "has no whole choice"),
        ({"choices": []}, "has no whole choice"),
        ({"choices": [None]}, "has no whole choice"),
        ({"choices": [{"finish_reason": "stop"}]}, "has no whole choice"),
        ({"choices": [{"message": {"content": "Paris"}}]}, "has no whole choice"),  # nobody says that it ended
        ({"choices": [{"message": {}, "finish_reason": "stop"}]}, "has no whole choice"),
        ({"error": {"message": "model is loading"}}, "has no whole choice: model is loading"),
        ({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, "content is an int, not text"),
    ],
)
def test_a_body_that_is_no_answer(body, expected):
    asked = []
    with pytest.raises(EndpointError, match=expected):
        ask(lambda request: asked.append(1) or Answer(body=body))
    assert len(asked) == 1  # asking again would bring the same


def test_an_answer_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST_BODY", 1 << 20)
    assert "longer than 1 MiB" in failure(lambda request: "x" * (2 << 20))


def test_a_redirect_is_refused_and_nothing_goes_there():
    with chat_server(lambda request: "stolen") as other:
        away = Answer(status=307, headers={"Location": f"{other.url}/chat/completions"})
        message = failure(lambda request: away)
        assert "HTTP 307" in message and other.url in message and "redirects are refused" in message
        assert other.requests == []


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-123\n")
    replies, server = ask(lambda request: "Paris", key_variable="SOME_KEY")
    assert server.headers[0]["Authorization"] == "Bearer secret-123"
    told = {"error": {"message": "wrong key secret-123"}}
    assert "wrong key ***" in failure(lambda request: Answer(status=401, body=told), key_variable="SOME_KEY")
    assert "secret" not in repr(Endpoint("http://localhost/v1", "m", key_variable="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "secret-123\nX-Other: 1")
    with pytest.raises(ConfigError, match="SOME_KEY holds more than a key") as caught:
        Endpoint("http://localhost/v1", "m", key_variable="SOME_KEY")
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="the environment variable SOME_KEY is not set"):
        Endpoint("http://localhost/v1", "m", key_variable="SOME_KEY")


def test_the_first_failure_stops_the_rest(monkeypatch):
    asked = []

    def answer(request):
        asked.append(1)
        return Answer(status=400, body={"error": "no"})

    failure(answer, conversations=[ASKED] * 200, parallel=2)
    assert len(asked) < 200


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"url": "localhost:8000"}, "write it as http://localhost:8000/v1"),
        ({"url": ""}, "write it as"),
        ({"url": "file:///etc/passwd"}, "write it as"),
        ({"url": "http://"}, "write it as"),
        ({"url": "http://host:99999/v1"}, "write it as"),
        ({"url": "http://host/v1 x"}, "write it as"),
        ({"url": "http://[::1/v1"}, "write it as"),
        ({"url": "http://me:secret@host/v1"}, "holds a user, a query or a fragment"),
        ({"url": "http://host/v1?key=secret"}, "holds a user, a query or a fragment"),
        ({"model": " "}, "model is empty"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"parallel": 0}, "parallel is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"limit_name": "length"}, "limit_name is length; it must be max_tokens or max_completion_tokens"),
    ],
)
def test_options_without_meaning(options, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        Endpoint(**{"url": "http://localhost:8000/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)


def test_the_whole_address_of_a_request_is_understood_too():
    with chat_server(lambda request: "Paris") as server:
        for url in (server.url, server.url + "/", server.url + "/chat/completions"):
            assert Endpoint(url, "m")([ASKED]) == [Reply("Paris", True)]
        assert Endpoint(server.url, "m")([]) == []
        with pytest.raises(EndpointError, match="HTTP 404: no such path /chat/completions"):
            Endpoint(server.url.removesuffix("/v1"), "m")([ASKED])
    assert json.dumps(server.requests[0])
