"""A request's body that comes in chunks."""

from __future__ import annotations

import re

from .refusal import Refused

SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?")
MAX_LINE = 8000  # bytes
BROKEN = Refused(400, "the chunks of the request are not valid", closes=True)


class Chunks:
    """Reads the chunks and writes them anew, without extensions and trailers. A chunk is passed on
    as it comes."""

    def __init__(self) -> None:
        self.is_over = False
        self._held = b""  # a line that is not whole yet
        self._left = 0  # bytes of the chunk under way
        self._ends_chunk = self._is_last = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What is to be passed on, and what follows the body. Raises Refused."""
        data, self._held = self._held + data, b""
        blocks = []
        while data and not self.is_over:
            if self._left:
                block, data = data[: self._left], data[self._left :]
                self._left -= len(block)
                blocks.append(block)
                continue
            line, end, rest = data.partition(b"\r\n")
            if len(line) > MAX_LINE:
                raise BROKEN
            if not end:
                self._held = data
                break
            blocks.append(self._line(line))
            data = rest
        return b"".join(blocks), data if self.is_over else b""

    def _line(self, line: bytes) -> bytes:
        """What is passed on for a line: the end of a chunk, a size, or after the last a trailer."""
        if self._ends_chunk:
            self._ends_chunk = False
            if line:
                raise BROKEN
            return b"\r\n"
        if self._is_last:
            self.is_over = not line
            return b"\r\n" if self.is_over else b""
        size = SIZE.fullmatch(line)
        if not size:
            raise BROKEN
        self._left = int(size[1], 16)
        self._ends_chunk, self._is_last = self._left > 0, self._left == 0
        return b"%x\r\n" % self._left
