"""A log that is begun anew when it is long, private to the user, and read while it is written."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.process import private

KEPT = 3  # older ones: name.log.1 is the youngest
LOOK_SECONDS = 0.2


class Log:
    """Call it with a line. It never raises: what a full disk takes is counted, and said later."""

    def __init__(self, path: Path, limit: int) -> None:
        """`limit` in bytes."""
        self.path, self.limit = path, limit
        self._file: io.FileIO | None = None
        self._size = self._lost = 0

    def __call__(self, line: str) -> None:
        try:
            if self._file is None:
                self._open()
            if self._lost:
                self._write(f"[{self._lost} lines could not be written]")
                self._lost = 0
            self._write(line)
        except OSError:
            self._lost += 1
            self.close()

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = io.FileIO(self.path, "a", opener=private)
        self._size = os.fstat(self._file.fileno()).st_size

    def _write(self, line: str) -> None:
        data = line.encode("utf-8", "replace") + b"\n"
        if self._size and self._size + len(data) > self.limit:
            self.close()
            with contextlib.suppress(OSError):  # Windows does not rename what is being read
                for number in range(KEPT, 0, -1):
                    if _older(self.path, number - 1).exists():
                        _older(self.path, number - 1).replace(_older(self.path, number))
            self._open()
            self._size = 0  # where it could not be renamed it is tried again at the next `limit`
        if self._file:
            self._size += self._file.write(data) or 0


def lines(
    path: Path, count: int, *, follow: bool = False, over: Callable[[], bool] = lambda: False
) -> Iterator[str]:
    """The last `count` lines of a log, those of older ones included; with `follow` also what
    comes, until `over()` or Ctrl-C. Raises PipelineError where there is no log."""
    if not path.exists() and not follow:
        raise PipelineError(f"{path}: there is no log yet", "`doit up` starts what writes it")
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
    found: deque[str] = deque(maxlen=count)
    file = None
    for number in range(KEPT, -1, -1):
        with contextlib.suppress(FileNotFoundError):
            file = _older(path, number).open("rb")
            data = file.read()
            if number:
                file.close()
            else:
                file.seek(data.rfind(b"\n") + 1)
            found.extend(_text(line) for line in data.split(b"\n")[:-1])
    return (file, list(found)) if file and not file.closed else (None, list(found))


def _is_another(path: Path, file: io.BufferedReader) -> bool:
    try:
        now, then = path.stat(), os.fstat(file.fileno())
    except OSError:
        return False  # between two renames
    return (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev) or now.st_size < file.tell()


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
