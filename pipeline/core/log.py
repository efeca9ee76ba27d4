"""Messages on stderr; results go to stdout. Neither can control the terminal."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from .text import printable


def info(text: str) -> None:
    """Print a line about what is being done."""
    print(text, file=sys.stderr, flush=True)


class PrintableStream(io.TextIOWrapper):
    """Writes what is printable. A letter that the terminal cannot show is written as its number.

    File names, the hub's answers and the logs of servers are the words of others, and reach the
    terminal through many messages: so it is here that they lose what would control it.
    """

    def __init__(self, unfiltered: io.TextIOWrapper) -> None:
        # What doit took of it before goes on writing there, and nothing would empty it at the end.
        unfiltered.reconfigure(errors="backslashreplace", write_through=True)
        super().__init__(
            unfiltered.buffer,
            encoding=unfiltered.encoding,
            errors="backslashreplace",
            line_buffering=unfiltered.line_buffering,
            write_through=unfiltered.write_through,
        )
        self.unfiltered = unfiltered  # kept: its end would close the file

    def write(self, text: str) -> int:
        # Halves of letters stand for the bytes of file names that are not UTF-8.
        whole = text.encode("utf-8", "backslashreplace").decode()
        super().write(printable(whole))
        return len(text)


def guard_streams() -> None:
    """Print only what is printable from now on. A closed stdout or stderr (`2>&-`) takes what is
    printed and keeps it to itself."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            setattr(sys, name, PrintableStream(stream))


def unfiltered(stream: TextIO) -> TextIO:
    """The stream itself, for what draws on the terminal, and shows nobody's words unfiltered."""
    return stream.unfiltered if isinstance(stream, PrintableStream) else stream
