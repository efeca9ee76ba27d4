"""Files of API keys, and which hosts need none."""

from __future__ import annotations

import codecs
import errno
import ipaddress
import os
import re
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.text import decoded

# What all programs read and send alike; spaces and other letters they do not.
KEY = re.compile(r"(?!#)[!-~]{1,4096}")
RULE = "a key must not begin with # or hold spaces, control characters or letters beyond ASCII"


def keys_of(path: Path) -> tuple[str, ...]:
    """The keys in a file: one on each line, but for empty lines and those that begin with #, which
    llama-server leaves out too. Raises OSError, also for what is not a key everywhere."""
    data = Path(path).read_bytes()
    try:
        if data.startswith(codecs.BOM_UTF8):
            raise ValueError("begins with a byte order mark (BOM); save it as UTF-8 without")
        lines = [line.strip() for line in decoded(data).split("\n")]
        keys = {number: key for number, key in enumerate(lines, 1) if key and key[0] != "#"}
        if wrong := [number for number, key in keys.items() if not KEY.fullmatch(key)]:
            raise ValueError(f"line {wrong[0]}: {RULE}")
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    return tuple(keys.values())


def wrong_file(path: Path, *, is_read_as_it_is: bool = False) -> str:
    """Why a file of keys cannot be used, or nothing. llama-server reads a line as it is, with the
    spaces around a key or a #."""
    if not path.is_file():
        return f"{path} is not a file"
    try:
        keys, data = keys_of(path), path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not keys:
        return f"{path} holds no key"
    lines = data.decode().split("\n" if os.name != "nt" else os.linesep)
    if is_read_as_it_is and any(line != line.strip() for line in lines):
        return f"{path}: has a space or a carriage return beside a key, which becomes part of it"
    return ""


def first_key(file: Path) -> str:
    """The key for our own requests. Raises PipelineError where the file has none."""
    try:
        keys = keys_of(file)
    except OSError as error:
        raise PipelineError(f"{file}: cannot be read: {error.strerror}") from None
    if not keys:
        raise PipelineError(f"{file}: holds no key")
    return keys[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False
