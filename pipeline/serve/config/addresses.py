"""Where an instance listens, and who could reach it there."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from pipeline.serve.server import LLAMA_CPP, VLLM

from .mistakes import shown
from .options import ResolvedOptions

ANYWHERE = ("0.0.0.0", "::", "")  # noqa: S104
HOST = "127.0.0.1"
PORTS = {LLAMA_CPP: 8080, VLLM: 8000}


class Address(Struct, frozen=True):
    """Host and port."""

    host: str
    port: int

    def clashes(self, other: Address) -> bool:
        """Whether the two cannot be listened on at once."""
        one, two = self.host, other.host
        same = _plain(one) == _plain(two) or one in ANYWHERE or two in ANYWHERE
        return self.port == other.port and same


def address(given: ResolvedOptions) -> Address:
    """Where the instance listens, once `mistakes` finds none."""
    port = _port(given)
    return Address(given.text("host") or HOST, PORTS[given.draft.engine] if port is None else port)


def mistakes(given: ResolvedOptions) -> Iterator[str]:
    """A port that is none."""
    if _port(given) == 0:
        told = shown(given.value("port"))
        yield given.draft.tell("server.port", f" = {told}: must be a whole number from 1 to 65535")


def _port(given: ResolvedOptions) -> int | None:
    """None where it is not given, 0 where it is none."""
    told = given.value("port")
    if told is None or isinstance(told, bool):
        return None
    port = int(str(told)) if str(told).isascii() and str(told).isdecimal() else 0
    return port if port <= 65535 else 0


def _plain(host: str) -> str:
    return HOST if host.lower() == "localhost" else host.lower()
