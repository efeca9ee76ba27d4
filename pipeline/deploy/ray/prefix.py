"""Which replica has the prompt of a conversation.

A request's text is cut into blocks that grow with it, and each is hashed together with all that
comes before it: two requests share so many hashes as they begin alike. A server keeps the prompts
that it has evaluated, and continues one that begins alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b

import msgspec
from msgspec import Raw, Struct

BLOCK = 256  # bytes, some 60 tokens: less is evaluated in no time
GROWTH = 16  # a block is at least this part of what comes before it: 10 MB are 150 blocks
MOST_HASHES = 100_000  # that a memory holds, some 20 MB: the last thousands of conversations


class _Prompt(Struct):
    """What a prompt is made of, in its order."""

    tools: Raw = Raw()
    system: Raw = Raw()
    messages: Raw = Raw()
    prompt: Raw = Raw()
    input: Raw = Raw()


def hashes(body: bytes) -> list[int]:
    """The hashes of a request's growing prefix, the shortest first; none of what is not a prompt.
    The last block, which the next request of the conversation changes, is left out."""
    try:
        document = msgspec.json.decode(body, type=_Prompt)
    except (msgspec.DecodeError, RecursionError):
        return []
    parts = [document.tools, document.system, document.messages, document.prompt, document.input]
    return list(_chained(b"".join(map(bytes, parts))))


def _chained(text: bytes) -> Iterator[int]:
    start, digest = 0, b""
    while (end := start + max(BLOCK, start // GROWTH)) < len(text):
        digest = blake2b(digest + text[start:end], digest_size=8).digest()
        yield int.from_bytes(digest)
        start = end


class PrefixMemory:
    """The replicas that evaluated the last prompts."""

    def __init__(self, most: int = MOST_HASHES) -> None:
        self._replicas: OrderedDict[int, str] = OrderedDict()  # by hash, the oldest first
        self._most = most

    def best(self, prefix: Sequence[int], replicas: Collection[str]) -> str | None:
        """The one of `replicas` with the longest known part of `prefix`."""
        for each in reversed(prefix):
            if (replica := self._replicas.get(each)) in replicas:
                return replica
        return None

    def add(self, prefix: Sequence[int], replica: str) -> None:
        """A replica evaluates a prompt."""
        for each in prefix:
            self._replicas[each] = replica
            self._replicas.move_to_end(each)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)
