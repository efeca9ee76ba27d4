"""Where an instance listens, and who could reach it there."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from pipeline.serve.server import LLAMA_CPP, VLLM

from .configuration import Value
from .messages import shown
from .options import ResolvedOptions, words

ANYWHERE = ("0.0.0.0", "::", "")  # noqa: S104
HOST = "127.0.0.1"
PORTS = {LLAMA_CPP: 8080, VLLM: 8000}


class Address(Struct, frozen=True):
    """Host and port."""

    host: str
    port: int

    def clashes(self, other: Address) -> bool:
        """Whether the two cannot be listened on at once."""
        hosts = {_plain(self.host), _plain(other.host)}
        return self.port == other.port and (len(hosts) == 1 or not hosts.isdisjoint(ANYWHERE))


def address(resolved: ResolvedOptions) -> Address:
    """Where the instance listens, once `errors` finds none."""
    port = _port(resolved)
    return Address(
        resolved.text("host") or HOST, PORTS[resolved.spec.engine] if port is None else port
    )


def missing(resolved: ResolvedOptions, at: Address, alias: str) -> list[str]:
    """Host (vLLM's own default is every interface), port and name, where it does not say them;
    `alias` is the option for the name."""
    options: dict[str, Value] = {"host": at.host, "port": at.port, alias: resolved.spec.name}
    return words({name: value for name, value in options.items() if not resolved.text(name)})


def errors(resolved: ResolvedOptions) -> Iterator[str]:
    """A port that is none."""
    if _port(resolved) == 0:
        why = f" = {shown(resolved.value('port'))}: must be a whole number from 1 to 65535"
        yield resolved.spec.line("server.port", why)


def _port(resolved: ResolvedOptions) -> int | None:
    """None where it is not given, 0 where it is none."""
    value = resolved.value("port")
    if value is None or isinstance(value, bool):
        return None
    text = str(value)
    port = int(text) if text.isascii() and text.isdecimal() else 0
    return port if port <= 65535 else 0


def _plain(host: str) -> str:
    return HOST if host.lower() == "localhost" else host.lower()
