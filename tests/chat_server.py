"""A small chat-completions server on this machine, for the tests of whatever asks an endpoint.

    with chat_server(lambda request: "Paris") as server:
        Endpoint(server.url, "any")([[{"role": "user", "content": "..."}]])

`answer` gets a request's JSON and returns the reply's text, a whole `Answer`, or raises; `server.requests` keeps what
was asked, `server.headers` the headers. Every kind of failure that a server can show is an `Answer`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What is sent: a body as it is (bytes), as JSON (anything else), or one choice with `text`."""

    text: str | None = None
    finish_reason: str | None = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    missing: int = 0
    """Bytes that Content-Length promises beyond what is sent."""
    wait: float = 0.0
    """Seconds before anything is sent."""
    trickle: float = 0.0
    """Seconds between two bytes of the body."""

    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        choice = {"index": 0, "finish_reason": self.finish_reason}
        whole = {"choices": [choice | {"message": {"role": "assistant", "content": self.text}}]}
        return json.dumps(whole if self.body is None else self.body).encode()


class ChatServer:
    """Where it listens, and what it was asked."""

    def __init__(self, answer: Callable[[dict], str | Answer]):
        self.answer, self.requests, self.headers = answer, [], []
        self.url = ""
        self.lock = threading.Lock()


@contextmanager
def chat_server(answer: Callable[[dict], str | Answer]) -> Iterator[ChatServer]:
    """Serve on a free port of this machine while the block runs."""
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(request)
                server.headers.append(dict(self.headers))
            found = server.answer(request)
            found = found if isinstance(found, Answer) else Answer(found)
            if self.path != "/v1/chat/completions":
                found = Answer(status=404, body={"error": {"message": f"no such path {self.path}"}})
            time.sleep(found.wait)
            content = found.content()
            try:
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) + found.missing))
                self.end_headers()
                for start in range(0, len(content), 1 if found.trickle else max(1, len(content))):
                    self.wfile.write(content[start : start + (1 if found.trickle else len(content))])
                    time.sleep(found.trickle)
            except OSError:
                pass  # the other side has gone, as a time-out does
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_):
            pass  # an `answer` that raises breaks the connection without a status

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
