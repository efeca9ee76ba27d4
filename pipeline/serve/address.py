"""Where this machine reaches a server that listens on `host` and `port`."""

from __future__ import annotations

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


def reached(host: str) -> str:
    """The host to connect to: one that listens anywhere is here, too."""
    return ANYWHERE.get(host, host)


def url(host: str, port: int, prefix: str = "", *, tls: bool = False) -> str:
    """Its address, with what stands before every path."""
    host = reached(host)
    return f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{port}{prefix}"
