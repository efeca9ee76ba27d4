"""Where an instance listens, and who could reach it there."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from pipeline.serve.instance import LLAMA_CPP, VLLM

from .mistakes import shown
from .options import Given

ANYWHERE = ("0.0.0.0", "::", "")  # noqa: S104
HOST = "127.0.0.1"
PORTS = {LLAMA_CPP: 8080, VLLM: 8000}


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port. A path of a socket has no port."""

    host: str
    port: int
    wrong: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return all(_is_loopback(host) for host in self.hosts)

    @property
    def hosts(self) -> list[str]:
        """llama-server takes several, with commas."""
        return [host.strip() for host in self.host.split(",")]

    def clashes(self, other: Address) -> bool:
        """Whether the two cannot be listened on at once."""
        return any(
            (one == two) if _is_socket(one) or _is_socket(two) else self._meets(other, one, two)
            for one in self.hosts
            for two in other.hosts
        )

    def _meets(self, other: Address, one: str, two: str) -> bool:
        same = _plain(one) == _plain(two) or one in ANYWHERE or two in ANYWHERE
        return self.port == other.port and same


def address(given: Given) -> Address:
    """Where the instance listens; `wrong` says why its port is none."""
    default = PORTS[given.draft.engine]
    host = given.text("host") or HOST
    told = given.value("port")
    if told is None or isinstance(told, bool):
        return Address(host, default)
    port = int(str(told)) if str(told).isascii() and str(told).isdecimal() else 0
    if not 1 <= port <= 65535:
        return Address(host, default, f" = {shown(told)}: must be a whole number from 1 to 65535")
    return Address(host, port)


def _is_socket(host: str) -> bool:
    return host.endswith(".sock")


def _plain(host: str) -> str:
    return HOST if host.lower() == "localhost" else host.lower()


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost" or _is_socket(host):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False
