"""Code of a model's that must never run, and how a test learns that it did.

A canary tells in four ways at once, so that its firing is seen where the sandbox stops some of
them: it makes files where it can, connects to the test, prints, and ends its program with a word.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

WORD = "CANARY-FIRED"

# Only what Python has built in: one canary takes the place of the standard library.
CODE = """\
import sys
try:
    import posix
    sys.stderr.write({word!r} + "\\n")
    places = [{report!r}, __file__.rpartition("/")[0] or ".", ".", "/tmp"]
    places += [v.decode() for k, v in posix.environ.items() if k in (b"HOME", b"TMPDIR")]
    for place in places:
        try:
            posix.close(posix.open(place + "/" + {mark!r}, posix.O_CREAT | posix.O_WRONLY))
        except OSError:
            pass
    import _socket
    try:
        wire = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        wire.settimeout(2)
        wire.connect(("127.0.0.1", {port}))
        wire.close()
    except OSError:
        pass
except Exception as error:
    pass
class Evil(dict):
    pass
raise SystemExit({word!r})
"""


@dataclass(frozen=True)
class Canary:
    """A canary of one test, which watches the folder `top` with all below it."""

    top: Path
    mark: str
    port: int
    heard: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        report = self.top / "report"
        report.mkdir(exist_ok=True)
        return CODE.format(word=WORD, report=str(report), mark=self.mark, port=self.port)

    def effects(self) -> list[str]:
        """What it did that outlasts the program: files that it made, a connection."""
        files = [str(path) for path in self.top.rglob(self.mark)]
        return [*files, *(str(p) for p in [Path("/tmp", self.mark)] if p.exists()), *self.heard]

    def fired(self, told: str) -> list[str]:
        """All signs that it ran, with those in `told`: everything that was printed and logged."""
        logs = [path for path in self.top.rglob("*.log") if WORD in path.read_text("utf-8")]
        return [*self.effects(), *map(str, logs), *([WORD] if WORD in told else [])]


@contextmanager
def watching(top: Path) -> Iterator[Canary]:
    """A canary that is listened for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        canary = Canary(top, f"canary-{port}", port)

        def listen() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()
                    canary.heard.append("a connection")

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield canary
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            Path("/tmp", canary.mark).unlink(missing_ok=True)
