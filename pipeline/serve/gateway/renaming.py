"""The name of a model in an answer: the one that the client used, in place of the server's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import msgspec
from msgspec import Raw

from .servers import Target

KEY = b'"model"'
LONGEST_LINE = 1024 * 1024  # bytes; of a longer one the name stands in the first part

Rename = Callable[[bytes], bytes]


def renaming(target: Target, model: str | None) -> Rename | None:
    """A function that puts `model`, the name in the request, in place of the server's own in its
    answer: llama-server always says its first alias. None where they are the same."""
    if not model or set(target.names) == {model}:
        return None
    spelled = [
        json.dumps(name, ensure_ascii=ascii) for name in target.names for ascii in (False, True)
    ]
    pattern = re.compile(rf'("model"\s*:\s*)(?:{"|".join(map(re.escape, spelled))})'.encode())
    own = json.dumps(model).encode()
    return lambda text: pattern.sub(lambda match: match[1] + own, text)


def rename_document(rename: Rename, text: bytes) -> bytes:
    """The same for a whole document, of which the outer `model` alone is meant: Anthropic's API has
    what a tool is called with as an object within it."""
    if KEY not in text:
        return text
    try:
        document = msgspec.json.decode(text, type=dict[str, Raw] | list[dict[str, Raw]])
    except (msgspec.DecodeError, RecursionError):
        return text
    for part in document if isinstance(document, list) else [document]:
        if "model" in part:
            named = rename(b"%b:%b" % (KEY, bytes(part["model"])))
            part["model"] = Raw(named.removeprefix(KEY + b":"))
    return msgspec.json.encode(document)


class Renamed:
    """Writes a stream with another name, line by line: the name may be cut between two blocks."""

    def __init__(self, write: Callable[[bytes], None], rename: Rename) -> None:
        self._write, self._rename = write, rename
        self._held: list[bytes] = []
        self._size = 0

    def write(self, block: bytes) -> None:
        before, end, after = block.rpartition(b"\n")
        if end:
            self._pass(b"".join([*self._held, before, end]))
        self._held.append(after)
        self._size += len(after)
        if self._size > LONGEST_LINE:
            self._pass(b"".join(self._held))

    def end(self) -> None:
        """Write what no line's end followed."""
        self._pass(b"".join(self._held))

    def _pass(self, text: bytes) -> None:
        self._write(self._rename(text))
        self._held.clear()
        self._size = 0
