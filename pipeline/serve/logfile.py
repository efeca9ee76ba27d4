"""A server's log: one file per run, private to the user, and read while it is written.

The log of the run before, or what grew too long, is renamed to a dated file beside it:
`serve-8080.log` becomes `serve-8080.2026-11-29T06-20-11.log`. The youngest KEPT of these stay.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.core.errors import PipelineError, doitw
from pipeline.core.log import info
from pipeline.core.process import LAST_LINES, Process, lines_of, private, without_backtrace

KEPT = 5
LONGEST = 10_000_000  # bytes
LONGEST_QUOTED = 500  # characters of a line
LOOK_SECONDS = 0.2
LEAST_FREE = 64 * 1024  # bytes
LONGEST_CHAIN = 40  # of links, as the kernel has it
STREAM = re.compile(r"/dev/(std|fd)|/proc/")
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def trouble(path: Path) -> str:
    """Why `path` cannot take a log, or nothing. It waits for nobody, and leaves nothing there."""
    if any(map(STREAM.match, _followed(path))):
        return f"{path} is a stream of whoever opens it, not a file"
    path = real(path)
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        kind = stat.S_IFMT(place.stat().st_mode)
        expected = stat.S_IFREG if place == path else stat.S_IFDIR
        if kind != expected:
            return f"{place} is {KINDS.get(kind, 'a device')}, not {KINDS[expected]}"
        if place == path:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        else:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"\0" * LEAST_FREE)
        if shutil.disk_usage(place).free < LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _followed(path: Path) -> Iterator[str]:
    """The path itself, and each that its links lead to."""
    for _ in range(LONGEST_CHAIN):
        yield str(path)
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()


def real(path: Path) -> Path:
    """Where a log is written: not the link to it, so that the link stays what it is."""
    return Path(os.path.realpath(path))


def set_aside(path: Path) -> None:
    """Rename the log at `path`, if there is one, to the date of its last line; delete the oldest.

    Best effort: a log that cannot be renamed (on Windows, while somebody reads it) stays.
    """
    path = real(path)
    with contextlib.suppress(OSError):
        now = path.stat()
        if not stat.S_ISREG(now.st_mode) or not now.st_size:  # such as /dev/null
            return
        date = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(now.st_mtime))
        same = [number for (when, number), _ in _dated(path) if when == date]
        number = f"-{max(same) + 1}" if same else ""
        path.replace(path.with_name(f"{path.stem}.{date}{number}{path.suffix}"))
        for _, old in _dated(path)[:-KEPT]:
            old.unlink()


def _dated(path: Path) -> list[tuple[tuple[str, int], Path]]:
    """The logs set aside, oldest first, each with its date and its number within that second."""
    name = re.compile(
        rf"{re.escape(path.stem)}\.(\d{{4}}-\d\d-\d\dT\d\d-\d\d-\d\d)(?:-(\d+))?"
        rf"{re.escape(path.suffix)}"
    )
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    matches = ((name.fullmatch(file.name), file) for file in files)
    return sorted(((match[1], int(match[2] or 1)), file) for match, file in matches if match)


class Log:
    """Call it with a line. It never raises and never waits: lines that cannot be written are
    reported at once on stderr, counted, and reported in the log once it takes lines again."""

    def __init__(self, path: Path, limit: int = LONGEST) -> None:
        """`limit` in bytes; then a new file is begun."""
        self.path, self.limit = real(path), limit
        self._file: io.FileIO | None = None
        self._size = self._lost = 0

    def __call__(self, line: str) -> None:
        try:
            if self._file and self._is_gone(self._file):
                self._release()
            if self._file is None:
                self._open()
            if self._lost:
                self._write(f"[{self._lost} lines could not be written]")
                self._lost = 0
            self._write(line)
        except OSError as error:
            if not self._lost:
                self._say(f"warning: {self.path}: {error.strerror}; its lines are lost meanwhile")
            self._lost += 1
            self._release()

    def close(self) -> None:
        self._release()
        if self._lost:
            self._say(f"warning: {self.path}: {self._lost} lines could not be written")
            self._lost = 0

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr
            info(text)

    def _release(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _is_gone(self, file: io.FileIO) -> bool:
        """Whether somebody has deleted the file, or moved it away: its lines would be lost. A
        folder that was removed is not made again."""
        try:
            now, then = self.path.stat(), os.fstat(file.fileno())
        except OSError:
            return self.path.parent.is_dir()
        return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = io.FileIO(self.path, "a", opener=_without_waiting)
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a file")
        self._size = status.st_size

    def _write(self, line: str) -> None:
        data = line.encode("utf-8", "replace") + b"\n"
        if self._size and self._size + len(data) > self.limit:
            self._release()
            set_aside(self.path)
            self._open()
            self._size = 0  # where it could not be renamed it is tried again at the next `limit`
        if self._file and (written := self._file.write(data) or 0) != len(data):
            os.truncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(data)


def _without_waiting(path: str, flags: int) -> int:
    """As `private`; a pipe that nobody reads is an error instead of a wait."""
    return private(path, flags | getattr(os, "O_NONBLOCK", 0))


def pumped(
    process: Process,
    *sinks: Callable[[str], object],
    is_over: Callable[[], bool] | None = None,
) -> threading.Thread:
    """A thread that hands each line of its output to each of `sinks`, and closes the pipe at its
    end. A closed terminal or a full disk must not stop it: an unread pipe would stop the server."""

    def pump() -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed under us at the end
            for line in lines_of(process, is_over):
                for sink in sinks:
                    with contextlib.suppress(OSError, ValueError):
                        sink(line)
            if process.stdout:
                process.stdout.close()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def quoted(lines: Iterable[str]) -> str:
    """The last of them, indented and not too long, for an error message."""
    last = without_backtrace(lines)[-LAST_LINES:]
    return "\n".join(f"  | {line[:LONGEST_QUOTED]}" for line in last)


def lines(
    path: Path, count: int, *, follow: bool = False, over: Callable[[], bool] = lambda: False
) -> Iterator[str]:
    """The last `count` lines of a log, those of older ones included; with `follow` also what
    comes, until `over()` or Ctrl-C. Raises PipelineError where there is no log."""
    path = real(path)
    if not (follow or path.exists() or _dated(path)):
        raise PipelineError(
            f"{path}: no log yet", f"start the server that writes it: {doitw('up')}"
        )
    file, last = _last(path, count)
    rest = b""
    try:
        yield from last
        while follow:
            ending = over()  # asked first: what was written before it is still read
            renewed = file is None or _is_another(path, file)
            data = file.read() if file else b""
            *whole, rest = (rest + data).split(b"\n")
            yield from (_text(line) for line in whole)
            if renewed and path.exists():
                if file:
                    file.close()
                file = path.open("rb")
            elif ending:
                break
            elif not data:
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        return
    finally:
        if file:
            file.close()


def _last(path: Path, count: int) -> tuple[io.BufferedReader | None, list[str]]:
    """The file, read up to its last whole line, and the last lines of all."""
    file, last = None, list[bytes]()
    with contextlib.suppress(FileNotFoundError):
        file = path.open("rb")
        data = file.read()
        file.seek(data.rfind(b"\n") + 1)
        last = data.split(b"\n")[:-1]
    with contextlib.suppress(OSError):
        for _, older in reversed(_dated(path)):
            if len(last) >= count:
                break
            last = older.read_bytes().split(b"\n")[:-1] + last
    return file, [_text(line) for line in last[max(0, len(last) - count) :]]


def _is_another(path: Path, file: io.BufferedReader) -> bool:
    try:
        now, then = path.stat(), os.fstat(file.fileno())
    except OSError:
        return False  # between two renames
    return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev) or now.st_size < file.tell()


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
