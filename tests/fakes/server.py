"""A server that starts like llama-server and misbehaves on request; standard library only.

    python tests/fakes/server.py --host H --port P [switches]

Answers 503 on /health until it is ready, then 200, and requests for tokens with an empty object.
Ends on SIGTERM with status 0. With --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1 it sleeps as vLLM
does: its weights move into main memory, and a request that comes meanwhile waits until it wakes.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from types import FrameType
from typing import Any

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]
# It leaves its session, its parent and its environment behind.
ESCAPE = """
import os, pathlib, sys, time
os.setsid()
if os.fork():
    os._exit(0)
note = pathlib.Path(sys.argv[1])
made = note.with_suffix(".part")
made.write_text(str(os.getpid()))
made.replace(note)
time.sleep(120)
"""


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who asked has gone


class UnixServer(Server):
    """The same at the path of a socket."""

    address_family = getattr(socket, "AF_UNIX", socket.AF_INET)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # and asks for no host name


class Handler(BaseHTTPRequestHandler):
    ready = False
    wedged = False  # health answers, nothing else does
    metrics = False
    working = False  # the counters move
    asked = 0
    looks = 0
    sleeps = False  # it has the calls for it
    asleep = False
    weights = 0  # bytes
    sleep_does = wake_does = ""  # instead: hang, fail, die, nothing
    in_memory = b""

    def do_GET(self) -> None:
        if self.path == "/is_sleeping" and Handler.sleeps:
            self.tell(200, json.dumps({"is_sleeping": Handler.asleep}))
        elif self.path == "/metrics" and Handler.metrics:
            Handler.looks += 1
            made = time.monotonic() if Handler.working else float(Handler.asked)
            self.tell(
                200,
                "# TYPE llamacpp:tokens_predicted_total counter\n"
                f"llamacpp:tokens_predicted_total {made}\n"
                f"llamacpp:requests_processing {int(Handler.working)}\n"
                f"llamacpp:requests_deferred {Handler.looks if Handler.wedged else 0}\n"
                "llamacpp:predicted_tokens_seconds 12.5\n",
            )
        elif self.path in ("/metrics", "/slots"):
            self.tell(501, "")
        else:
            self.tell(200 if Handler.ready and self.path == "/health" else 503, "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"] or "no key"
        say(f"asked {self.path} {body.decode()} {key}")
        if Handler.wedged:
            time.sleep(120)
        if self.path in ("/sleep?level=1", "/wake_up"):
            self.sleep_or_wake(self.path != "/wake_up")
            return
        if Handler.asleep:
            say("asked while asleep")
        while Handler.asleep:
            time.sleep(0.05)
        Handler.asked += 1
        self.tell(200, "{}")

    def sleep_or_wake(self, sleep: bool) -> None:
        does = Handler.sleep_does if sleep else Handler.wake_does
        if does == "hang":
            time.sleep(120)
        if does == "die":
            os._exit(1)
        if not Handler.sleeps or does == "fail":
            self.tell(500 if does else 404, "CUDA Error: out of memory" if does else "Not Found")
            return
        Handler.asleep = sleep and does != "nothing"
        Handler.in_memory = os.urandom(1024) * (Handler.weights // 1024) if sleep else b""
        status = {"status": "sleeping", "level": 1} if sleep else {"status": "awake", "tags": None}
        self.tell(200, json.dumps(status))

    def tell(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def say(text: str, flush: bool = True) -> None:
    sys.stdout.write(f"{text}\n")  # in one piece: several threads speak
    if flush:
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ready-after", type=float, default=0, help="seconds of loading")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--wedge-after", type=float, help="seconds until it makes no tokens")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--working", action="store_true", help="its counters move")
    parser.add_argument("--exit", type=int, help="end by itself with this status")
    parser.add_argument("--die", action="store_true", help="end by itself with SIGABRT")
    parser.add_argument("--after", type=float, default=0, help="seconds until it ends by itself")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--stop-after", type=float, default=0, help="seconds that SIGTERM takes")
    parser.add_argument("--no-newline", type=int, default=0, help="print so many bytes first")
    parser.add_argument("--lines", type=int, default=0, help="print so many lines first")
    parser.add_argument("--rate", type=int, default=0, help="go on to print so many a second")
    parser.add_argument("--grandchild", type=Path, help="start one; its pid goes to this file")
    parser.add_argument("--setsid", action="store_true", help="it moves to another session")
    parser.add_argument("--escaped", type=Path, help="start one without session, parent and")
    parser.add_argument("--closed", action="store_true", help="environment; and without our files")
    parser.add_argument("--environment", type=Path, help="write it to this file as JSON")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--weights", type=int, default=0, help="bytes in main memory, asleep")
    parser.add_argument("--sleep-does", default="", help="hang, fail, die or nothing")
    parser.add_argument("--wake-does", default="", help="hang, fail or die")
    options = parser.parse_args()

    def terminate(number: int, frame: FrameType | None) -> None:
        # No print here: the signal may have come in the midst of one.
        time.sleep(options.stop_after)
        text = "SIGTERM is ignored\n" if options.ignore_term else "ending on SIGTERM\n"
        os.write(1, text.encode())
        if not options.ignore_term:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    say(f"pid {os.getpid()}")
    if options.environment:
        options.environment.write_text(json.dumps(dict(os.environ)))
    if options.grandchild:
        child = subprocess.Popen(SLEEP, start_new_session=options.setsid)
        made = options.grandchild.with_suffix(".part")
        made.write_text(str(child.pid))
        made.replace(options.grandchild)
    if options.escaped:
        files = subprocess.DEVNULL if options.closed else None
        words = [sys.executable, "-c", ESCAPE, options.escaped]
        subprocess.run(words, env={}, stdin=files, stdout=files, stderr=files, check=True)
    for number in range(options.lines):
        print(f"line {number}")
    block = "x" * 65536
    for at in range(0, options.no_newline, len(block)):
        sys.stdout.write(block[: options.no_newline - at])
    sys.stdout.flush()

    def end() -> None:
        time.sleep(options.after)
        print("the last words", flush=True)
        if options.die:  # as ggml does, where gdb is installed
            for number in range(40):
                print(f"#{number}  0x00007f5b8156c7de in ggml_abort () from libggml-base.so.0")
            print("[Inferior 1 (process 21253) detached]", flush=True)
            os.abort()
        os._exit(options.exit)

    if options.die or (options.exit is not None and not options.after):
        end()
    Handler.metrics, Handler.working = options.metrics, options.working
    Handler.sleeps = options.enable_sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    Handler.weights = options.weights
    Handler.sleep_does, Handler.wake_does = options.sleep_does, options.wake_does
    is_unix = options.host.endswith(".sock")
    where: Any = options.host if is_unix else (options.host, options.port)
    server = (UnixServer if is_unix else Server)(where, Handler)
    if options.exit is not None:
        threading.Thread(target=end, daemon=True).start()

    def load() -> None:
        time.sleep(options.ready_after)
        Handler.ready = not options.never_ready
        say("still loading" if options.never_ready else "model loaded")
        if options.wedge_after is not None:
            time.sleep(options.wedge_after)
            Handler.wedged = True

    def talk() -> None:
        number = 0
        while True:
            for _ in range(options.rate // 10):
                number += 1
                say(f"talk {number}", flush=False)
            sys.stdout.flush()
            time.sleep(0.1)

    threading.Thread(target=load, daemon=True).start()
    if options.rate:
        threading.Thread(target=talk, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
