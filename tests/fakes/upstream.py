"""A model server as the gateway meets it, which misbehaves on request; standard library only.

    python tests/fakes/upstream.py --port P --record FILE [switches]

Answers every POST with events, or with one JSON document that says what it was asked. Each
request, and each client that went away, is a line of JSON in FILE. A request may ask for its own
misbehaviour: its JSON's "do" is an object of switches, such as {"chunks": 3, "die_after": 1}.
"""

import argparse
import json
import os
import select
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

METRICS = """\
# HELP llamacpp:tokens_total Tokens.
# TYPE llamacpp:tokens_total counter
llamacpp:tokens_total 12345678
# HELP latency Latency.
# TYPE latency histogram
latency_bucket{le="0.5",instance="inner"} 3
latency_sum 0.25
latency_count 3
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    began = time.monotonic()
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.whole(200, METRICS.encode(), "text/plain")
        elif self.path == "/v1/models" and not self.loading():
            self.whole(200, self.options.models.encode())
        else:
            self.whole(503 if self.loading() else 200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.loading():
            error = {"message": "Loading model", "type": "unavailable_error", "code": 503}
            self.whole(503, json.dumps({"error": error}).encode())
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        types = self.headers.get_all("Content-Type", [])
        text = body.decode("latin-1")
        self.note(event="request", path=self.path, headers=headers, types=types, body=text)
        asked = self.asked(body)
        do = {**vars(self.options), **asked}
        if do["die"]:
            os._exit(1)
        if not self.pause(do["slow"]):
            return
        if do["status"] != 200:
            error = {"error": {"message": "as asked", "type": "some_error", "code": do["status"]}}
            self.whole(do["status"], asked.get("reply", json.dumps(error)).encode())
        elif do["chunks"]:
            self.events(do["chunks"], do["pause"], do["die_after"], do["reply"])
        elif do["reply"]:
            self.whole(200, do["reply"].encode())
        else:
            told = {"name": self.options.name, "path": self.path, "body": body.decode("latin-1")}
            self.whole(200, json.dumps(told).encode(), length=do["length"])

    def asked(self, body: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(body).get("do", {}))
        except (ValueError, AttributeError):
            return {}

    def loading(self) -> bool:
        return time.monotonic() - self.began < self.options.loading

    def whole(
        self, status: int, body: bytes, kind: str = "application/json", length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("X-Upstream", self.options.name)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def events(self, chunks: int, pause: float, die_after: int | None, reply: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number in range(chunks):
                if number == die_after:
                    os._exit(1)
                event = reply or json.dumps({"number": number})
                self.chunk(f"data: {event}\n\n".encode())
                if not self.pause(pause):
                    return
            self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.note(event="gone")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def pause(self, seconds: float) -> bool:
        """Wait, unless the client goes away."""
        if seconds and select.select([self.connection], [], [], seconds)[0]:
            try:
                gone = not self.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                gone = True
            if gone:
                self.note(event="gone")
                self.close_connection = True
                return False
        return True

    def note(self, **event: object) -> None:
        if self.options.record:
            with self.lock, self.options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="upstream")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--loading", type=float, default=0, help="seconds of 503 Loading model")
    parser.add_argument("--slow", type=float, default=0, help="seconds before an answer")
    parser.add_argument("--die", action="store_true", help="end when it is asked")
    parser.add_argument("--status", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=0, help="answer with so many events")
    parser.add_argument("--pause", type=float, default=0, help="seconds between events")
    parser.add_argument("--die-after", type=int, help="end after so many events")
    parser.add_argument("--reply", default="", help="what it answers, or each of its events")
    parser.add_argument("--models", default="{}", help="its list of models")
    parser.add_argument("--length", type=int, help="the length that it says its answer has")
    Handler.options = parser.parse_args()
    Server(("127.0.0.1", Handler.options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
