"""Where a server listens, and where this machine reaches it."""

from __future__ import annotations

import ipaddress
import re


def is_anywhere(host: str) -> bool:
    """Whether a server with this host listens on every address of its machine."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def reached(host: str) -> str:
    """The host to connect to: this machine, for a server that listens on every address."""
    if not is_anywhere(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def url(host: str, port: int, prefix: str = "", *, tls: bool = False) -> str:
    """The URL of a server; `prefix` stands before every path."""
    host = reached(host)
    return f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{port}{prefix}"


def shown(host: str, port: int, prefix: str = "", *, tls: bool = False) -> str:
    """The URL for people, who may think of one with 127.0.0.1 that only this machine reaches it."""
    more = f" (from other machines: port {port} of this one)" if is_anywhere(host) else ""
    return url(host, port, prefix, tls=tls) + more


LABEL = r"[A-Za-z0-9_]([\w-]{0,61}[A-Za-z0-9_])?"
NAME = re.compile(rf"(?!(.*\.)?\d+$)({LABEL}\.)*{LABEL}", re.A)  # all digits at the end: no name


def host(text: str) -> str:
    """A host name or a bare address; one of IPv6 in its shortest form, so that two that are alike
    are seen to be. Raises ValueError with what is allowed."""
    bare = text.strip()
    address = bare[1:-1] if bare.startswith("[") and bare.endswith("]") else bare
    try:
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address):
            return address if ip.ipv4_mapped else str(ip)
        if address == bare:
            return address
    except ValueError:
        if NAME.fullmatch(bare) and len(bare) <= 253:
            return bare
    raise ValueError(
        "one host name or address alone, such as 127.0.0.1 or ::1, without http:// "
        "and without a port, which is an option of its own"
    )


def prefix(text: str) -> str:
    """What stands before every path, as llama-server joins it to them: with a slash before it and
    none behind it. Raises ValueError with what is allowed."""
    path = text.strip().strip("/")
    if not re.fullmatch(r"[\w.~/-]*", path, re.ASCII):
        raise ValueError("a path, such as /llm, without a host")
    return f"/{path}" if path else ""


def origin(text: str) -> str:
    """A pattern of origins; `*` stands for any text. Raises ValueError with what is allowed."""
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.*-]*://[^/?#\s]*", text, re.IGNORECASE):
        raise ValueError(
            "as browsers send it, such as https://chat.example, http://192.168.1.5:* "
            "or app://obsidian.md, with no slash after the host"
        )
    return text


def host_pattern(text: str) -> str:
    """A pattern of host names; `*` stands for any text. Raises ValueError with what is allowed."""
    if not re.fullmatch(r"[a-z0-9_.*-]+", text, re.IGNORECASE):
        raise ValueError("a name without scheme and port, such as gpu-box.lan or *.lan")
    return text
