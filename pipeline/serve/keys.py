"""Files of API keys, and who needs one."""

from __future__ import annotations

import errno
import ipaddress
from pathlib import Path

from pipeline.core.errors import PipelineError


def keys_of(path: Path) -> tuple[str, ...]:
    """The keys in a file: one on each line, but for empty lines and those that begin with #, which
    llama-server leaves out too. Raises OSError, also where it is no text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError:
        raise OSError(errno.EINVAL, "is not UTF-8", str(path)) from None
    lines = (line.strip() for line in text.split("\n"))
    return tuple(line for line in lines if line and not line.startswith("#"))


def first_key(file: Path) -> str:
    """The key that we ask with. Raises PipelineError where there is none."""
    try:
        found = keys_of(file)
    except OSError as error:
        raise PipelineError(f"{file}: cannot be read: {error.strerror}") from None
    if not found:
        raise PipelineError(f"{file}: holds no key")
    return found[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False
