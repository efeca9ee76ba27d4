"""A server that starts like llama-server and misbehaves on request; standard library only.

    python tests/fakes/server.py --host H --port P [switches]

Answers 503 on /health until it is ready, then 200. Ends on SIGTERM with status 0.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType


class Handler(BaseHTTPRequestHandler):
    ready = False

    def do_GET(self) -> None:
        self.send_response(200 if Handler.ready and self.path == "/health" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ready-after", type=float, default=0, help="seconds of loading")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--exit", type=int, help="end by itself with this status")
    parser.add_argument("--die", action="store_true", help="end by itself with SIGABRT")
    parser.add_argument("--after", type=float, default=0, help="seconds until it ends by itself")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--no-newline", type=int, default=0, help="print so many bytes first")
    parser.add_argument("--lines", type=int, default=0, help="print so many lines first")
    parser.add_argument("--grandchild", type=Path, help="start one; its pid goes to this file")
    options = parser.parse_args()

    def terminate(number: int, frame: FrameType | None) -> None:
        say("SIGTERM is ignored" if options.ignore_term else "ending on SIGTERM")
        if not options.ignore_term:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    say(f"pid {os.getpid()}")
    if options.grandchild:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        options.grandchild.write_text(str(child.pid))
    for number in range(options.lines):
        print(f"line {number}")
    block = "x" * 65536
    for at in range(0, options.no_newline, len(block)):
        sys.stdout.write(block[: options.no_newline - at])
    sys.stdout.flush()

    def end() -> None:
        time.sleep(options.after)
        print("the last words", flush=True)
        if options.die:
            os.abort()
        os._exit(options.exit)

    if options.die or (options.exit is not None and not options.after):
        end()
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    if options.exit is not None:
        threading.Thread(target=end, daemon=True).start()

    def load() -> None:
        time.sleep(options.ready_after)
        Handler.ready = not options.never_ready
        say("still loading" if options.never_ready else "model loaded")

    threading.Thread(target=load, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
