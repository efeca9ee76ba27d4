"""A server for conversations that answers as the question names it, bad answers included."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STREAM = "text/event-stream"
HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\x9b2Jb\u202ec\ud800"  # what a terminal would obey


def event(data: Any) -> bytes:
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else json.dumps(data).encode())


def piece(finish: str | None = None, **delta: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def timings(taken: int) -> bytes:
    counts = {"cache_n": 0, "prompt_n": taken, "predicted_n": 2, "predicted_per_second": 7.5}
    return event({"choices": [], "timings": counts})


HELLO = piece(content="Hel") + piece(content="lo")
END, DONE = piece("stop"), event(b"[DONE]")
TOO_LONG = {"type": "exceed_context_size_error", "n_prompt_tokens": 900, "n_ctx": 512}

# By the question: the status, the type and the body of the answer.
ANSWERS: dict[str, tuple[int, str, bytes]] = {
    "hello": (200, STREAM, HELLO + END + timings(5) + DONE),
    "comments": (200, STREAM, b": ping\n\nevent: x\nid: 1\n" + HELLO + b"\r\n" + END),
    "reasons": (200, STREAM, piece(reasoning_content="hm") + piece(content="so") + END + DONE),
    "hostile": (200, STREAM, piece(content=HOSTILE[:-1]) + END + DONE),
    "cut": (200, STREAM, HELLO),
    "full": (200, STREAM, HELLO + piece("length") + timings(510) + DONE),
    "limit": (200, STREAM, HELLO + piece("length") + timings(5) + DONE),
    "error inside": (200, STREAM, HELLO + event({"error": {"message": "out of\x1b luck"}})),
    "error line": (200, STREAM, HELLO + b'error: {"message": "out of luck"}\n\n'),
    "no json": (200, STREAM, event(b"{nope")),
    "other json": (200, STREAM, event({"choices": [None]})),
    "no end": (200, STREAM, b"data: " + b"x" * 3_000_000),
    "no stream": (200, "application/json", b'{"choices": []}'),
    "too long": (400, "application/json", json.dumps({"error": TOO_LONG}).encode()),
    "vllm too long": (400, "application/json", b'{"message": "maximum context length is 9"}'),
    "key": (401, "application/json", b'{"error": {"message": "Invalid API Key"}}'),
    "loading": (503, "application/json", b'{"error": {"message": "Loading model"}}'),
    "html": (502, "text/html", b"<html>" + b"bad gateway " * 10_000),
    "text error": (500, "application/json", b'{"error": "oh\\u001b no"}'),
    "moved": (302, "text/plain", b""),
}


class Answers(BaseHTTPRequestHandler):
    asked: list[Any]

    def do_GET(self) -> None:
        models = json.dumps({"data": [{"id": "one"}]}).encode()
        is_list = self.path == "/v1/models"
        self.tell(200 if is_list else 404, "application/json", models if is_list else b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**body, "key": self.headers["Authorization"]})
        self.tell(*ANSWERS[body["messages"][-1]["content"]])

    def tell(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who asked has gone


@contextmanager
def answering() -> Iterator[tuple[str, list[Any]]]:
    """Its URL, and the requests that it got."""
    handler = type("Own", (Answers,), {"asked": []})
    server = Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
