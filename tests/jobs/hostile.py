"""A chat-completions server on loopback that misbehaves as the passage tells it to.

A passage reads `<behaviour> <grade>`: the honest answer gives that grade probability 0.7 and 0.1 to
each of the others. A behaviour that begins with `once-` is honest from the second request on, with
`nine-` from the tenth. Whatever holds no passage is answered honestly. Once it has answered as
often as `quota` says, it refuses all that it is asked.
"""

import json
import math
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-do-not-tell"


def probs(grade: int) -> list[float]:
    return [0.7 if label == grade else 0.1 for label in range(4)]


def honest(grade: int, body: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI and vLLM answer: top tokens, or `n` samples."""
    if not body.get("logprobs"):
        one = {"finish_reason": "stop", "message": {"content": f"{grade}"}}
        return {"choices": [one] * body.get("n", 1)}
    top = [{"token": str(k), "logprob": math.log(p)} for k, p in enumerate(probs(grade))]
    top += [{"token": f"word{k}", "logprob": -9999.0} for k in range(body["top_logprobs"] - 4)]
    token = {"token": str(grade), "logprob": math.log(0.7), "top_logprobs": top}
    message = {"role": "assistant", "content": str(grade)}
    only = {"finish_reason": "length", "message": message, "logprobs": {"content": [token]}}
    return {"id": "1", "object": "chat.completion", "choices": [only]}


class Handler(BaseHTTPRequestHandler):
    server: "Hostile"

    def do_POST(self) -> None:
        server = self.server
        try:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            said = body["messages"][-1]["content"]
            found = re.search(r"Passage:\n([a-z0-9-]+) (\d)", said)
            behaviour, grade = (found[1], int(found[2])) if found else ("honest", 0)
            with server.lock:
                server.requests[said] += 1
                if server.requests.total() > server.quota:
                    behaviour = server.beyond
                attempt = server.requests[said]
                server.times.setdefault(said, []).append(time.monotonic())
            for prefix, times in (("once-", 1), ("nine-", 9)):
                if behaviour.startswith(prefix):
                    behaviour = behaviour.removeprefix(prefix) if attempt <= times else "honest"
            BEHAVIOURS[behaviour](self, grade, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # The client has given up on us.

    def reply(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "content_length" not in headers:
            self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def close_hard(self) -> None:
        """A reset instead of a farewell."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


Behaviour = Callable[[Handler, int, dict[str, Any]], None]


def answer(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    server = handler.server
    with server.lock:
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
    time.sleep(0.02)
    with server.lock:  # Before the reply: afterwards the client may be faster than we are.
        server.in_flight -= 1
    handler.reply(json.dumps({**honest(grade, body), "usage": server.usage}).encode())


def changed(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """An honest answer, spoilt."""

    def spoil(handler: Handler, grade: int, body: dict[str, Any]) -> None:
        reply = {**change(honest(grade, body)), "usage": handler.server.usage}
        handler.reply(json.dumps(reply).encode())

    return spoil


def status(code: int, **headers: str) -> Behaviour:
    echo = json.dumps({"error": {"message": f"your key is {KEY}"}}).encode()
    return lambda handler, grade, body: handler.reply(echo, code, **headers)


def constant(data: bytes, **headers: str) -> Behaviour:
    return lambda handler, grade, body: handler.reply(data, 200, **headers)


def drip(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000000")
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def flood(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("connection", "close")
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b"[" * 65536)


def reset(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    handler.close_hard()


def half(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    """Cut off in the middle, and what has come is JSON by itself."""
    data = json.dumps(honest(grade, body)).encode()
    handler.reply(data, content_length=str(len(data) + 1000))
    handler.close_hard()


def hang(handler: Handler, grade: int, body: dict[str, Any]) -> None:
    handler.server.over.wait(30)


def first_token(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        change(reply["choices"][0]["logprobs"]["content"][0])
        return reply

    return changed(spoil)


def twice(reply: dict[str, Any]) -> list[Any]:
    tokens: list[Any] = reply["choices"][0]["logprobs"]["content"]
    return tokens * 2


HTML = b"<!doctype html><html><body>3</body></html>"

BEHAVIOURS: dict[str, Behaviour] = {
    "honest": answer,
    "500": status(500),
    "503": status(503, retry_after="nonsense"),
    "429": status(429, retry_after="0"),
    "429-one": status(429, retry_after="1"),
    "429-years": status(429, retry_after="99999999"),
    "400": status(400),
    "401": status(401),
    "402": status(402),
    "403": status(403),
    "redirect": status(307, location="http://elsewhere.invalid/v1/chat/completions"),
    "html": constant(HTML, content_type="text/html"),
    "empty": constant(b""),
    "number": constant(b"3", content_type="application/json"),
    "cut-json": constant(b'{"choices": [{"message": {"content": "3"'),
    "nested": constant(b"[" * 100_000),
    "not-gzip": constant(HTML, content_encoding="gzip"),
    "not-utf8": constant(b'{"choices": "\xff\xfe"}', content_type="application/json; charset=x"),
    "hang": hang,
    "drip": drip,
    "flood": flood,
    "reset": reset,
    "half": half,
    "no-choices": changed(lambda reply: {"choices": []}),
    "many-choices": changed(lambda reply: {"choices": reply["choices"] * 9}),
    "null-choice": changed(lambda reply: {"choices": [None]}),
    "no-logprobs": changed(lambda r: {"choices": [{**r["choices"][0], "logprobs": None}]}),
    "two-tokens": changed(lambda r: {"choices": [{"logprobs": {"content": twice(r)}}]}),
    "few-top": first_token(lambda token: token["top_logprobs"].pop()),
    "nan": first_token(lambda token: token["top_logprobs"][3].update(logprob=math.nan)),
    "above-one": first_token(lambda token: token["top_logprobs"][7].update(logprob=-0.5)),
    "words": first_token(lambda token: [t.update(token="no") for t in token["top_logprobs"][1:4]]),
    "surrogate": changed(lambda reply: {"choices": [{"message": {"content": "\ud800"}}]}),
}  # fmt: skip
"""What a server can do to a client."""


class Hostile(ThreadingHTTPServer):
    """Counts what it is asked, and says `usage` of each answer, honest or spoilt."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.quota = math.inf
        self.beyond = "429-years"
        self.usage: dict[str, int] | None = None
        self.in_flight = 0
        self.most_in_flight = 0
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
