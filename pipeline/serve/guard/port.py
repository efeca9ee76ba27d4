"""A server's host and port, listened on in its place while it serves on a private Unix socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bins import binaries
from pipeline.core.errors import PipelineError
from pipeline.core.process import WINDOWS, Process, allow_many_files, start
from pipeline.serve import health, sandbox
from pipeline.serve.server import LLAMA_CPP, Server

from .rules import Rules

if TYPE_CHECKING:
    import asyncio

HOST, CORS = "--host", "--cors-origins"  # options of llama-server
LOCAL = "localhost"  # pages of this machine
LONGEST = 100  # bytes of a socket's path; macOS takes 103
PREFIX = "llama-pipeline-"
NAME = f"/{PREFIX}12345678/12345.sock"
YOUNG_SECONDS = 60.0  # a folder may not be locked yet
FLUSH_SECONDS = 0.5  # for clients to take the end of their answers


class OwnPort:
    """The port of a server that listens itself."""

    folder: Path | None = None  # of its socket
    socket = ""  # the path of the one that it was last started on

    def __init__(self, server: Server) -> None:
        """Raises PipelineError where the port is taken."""
        self.server = server
        health.require_free(server.host, server.port)

    def command(self) -> list[str]:
        """The server's command line for its next start."""
        return self.server.command

    def start(self, command: list[str], env: Mapping[str, str], **more: Any) -> Process:
        """Start the server by `command`, in its sandbox; it ends with this process. `more` as for
        `process.start`. Raises PipelineError."""
        return start(
            command,
            env=env,
            cwd=Path(self.server.folder),
            own_group=True,
            killed_with_us=True,
            sandbox=sandbox.policy(self.server, self.folder),
            **more,
        )

    def serve(self) -> None:
        """The server was started."""

    def close(self) -> None:
        """The server has ended, and is not started again."""


class GuardedPort(OwnPort):
    """A port that is listened on in the server's place: taken at once, kept while the server is
    started again, and answered on from `serve` on, with 503 while the server loads."""

    def __init__(self, server: Server) -> None:
        """Raises PipelineError where the port is taken, or there is no place for a socket."""
        self.server = server
        self._listener = health.listening(server.host, server.port)
        try:
            self._sockets = self.folder = _private_folder()
        except BaseException:
            self._listener.close()
            raise
        self._lock: int | None = None
        with contextlib.suppress(OSError):  # nothing can be locked: nobody removes it either
            self._lock = _lock(self._sockets)
        self._starts = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_up = threading.Event()

    def command(self) -> list[str]:
        """The command line with a socket in place of the address, a new one for each start."""
        self._starts += 1
        self.socket = str(self._sockets / f"{self._starts}.sock")
        return private_command(self.server, self.socket)

    def serve(self) -> None:
        """Begin to answer, in a thread: what that needs is loaded while the server loads."""
        if not self._thread:
            allow_many_files()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End all connections and give the port back."""
        if self._thread:
            self._is_up.wait()
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                if self._loop:
                    self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
        self._listener.close()
        shutil.rmtree(self._sockets, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _run(self) -> None:
        import asyncio

        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(self._relay())
        finally:
            self._is_up.set()

    async def _relay(self) -> None:
        import asyncio

        from .relay import ClientSide

        connections, allowed = set[ClientSide](), rules(self.server)
        loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        listener = await loop.create_server(
            lambda: ClientSide(allowed, lambda: self.socket, connections),
            sock=self._listener,
            backlog=health.BACKLOG,
        )
        self._loop = loop
        self._is_up.set()
        await self._end.wait()
        listener.close()
        for connection in connections:
            connection.transport.close()  # once what was written is sent
        deadline = time.monotonic() + FLUSH_SECONDS
        while connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def taken(server: Server) -> OwnPort:
    """The port of `server`: taken where guarded, else free. Raises PipelineError where in use."""
    return GuardedPort(server) if server.guard else OwnPort(server)


def rules(server: Server) -> Rules:
    """Whose pages may ask it, and under which names."""
    own = [name.strip() for name in server.argument(CORS).split(",")]
    origins = [*server.origins, *(name for name in own if name not in ("", LOCAL))]
    return Rules(server.host, origins, server.hosts, who="this server", place="the server's {key}")


def private_command(server: Server, path: str) -> list[str]:
    """Its command line, with the socket at `path` in place of its address. It lets all pages read
    its answers that may ask at all, where others than this machine's are added."""
    instead = {HOST: path}
    if server.origins and server.argument(CORS) == LOCAL:
        instead[CORS] = "*"
    words = server.command
    for at, word in enumerate(words[:-1]):
        if word in instead:
            words[at + 1] = instead[word]
    return words


def can_guard(server: Server) -> bool:
    """Whether a guard is possible, and wanted at all: a key is as good."""
    is_direct = server.api_key_file or server.tls or WINDOWS
    return server.engine == LLAMA_CPP and not is_direct


def shown(server: Server) -> str:
    """The guard in words, for a plan and a summary."""
    if server.guard:
        return "pages of other sites cannot use the server"
    if server.api_key_file:
        return "not needed: clients send a key"
    why = "on Windows" if WINDOWS else "with TLS of its own" if server.tls else "guard=0"
    if can_guard(server) and not binaries.is_ours(Path(server.executable)):
        why = "not made by the pipeline; guard=1, if it serves on a socket"
    return f"none ({why}): any page in a browser can use the server"


def _private_folder() -> Path:
    """A new folder that only this user may enter. In the temporary folder, not in the user's
    runtime folder: that one goes when the user logs out. Raises PipelineError."""
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108
        # To llama-server a comma separates addresses.
        if len(os.fsencode(base + NAME)) > LONGEST or "," in base:
            continue
        with contextlib.suppress(OSError):
            _remove_stale(Path(base))
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    raise PipelineError(
        f"{tempfile.gettempdir()}: cannot hold the server's socket",
        "point TMPDIR to a folder with a short name, such as /tmp, or pass guard=0",
    )


def _remove_stale(base: Path) -> None:
    """Remove this user's folders that a killed process left behind: nobody holds their lock."""
    for path in base.glob(f"{PREFIX}????????"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            is_old = time.time() - status.st_mtime > YOUNG_SECONDS
            if is_old and status.st_uid == os.getuid():
                handle = _lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _lock(folder: Path) -> int:
    """A file descriptor that holds the folder's lock until it is closed. Raises OSError where
    another process holds it, or nothing can be locked."""
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
