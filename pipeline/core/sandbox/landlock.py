"""Landlock: the kernel refuses every file and TCP port that no rule names (Linux 5.13 and later).

Needs no privileges and no setup, also in a container. What a kernel can limit grows with its ABI
version; structures and numbers are those of linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from stat import S_ISDIR

from . import policy
from .policy import Sandbox

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all architectures
VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
PATH_BENEATH, NET_PORT = 1, 2  # enum landlock_rule_type
PORTS_SINCE, SCOPES_SINCE = 4, 6  # ABI versions

EXECUTE, WRITE, READ, LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FOLDER, REMOVE_FILE, MAKE_FOLDER, MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
MAKE_SOCKET = 1 << 9
TRUNCATE, IOCTL = 1 << 14, 1 << 15
BIND, CONNECT = 1 << 0, 1 << 1
SCOPES = 0b11  # abstract sockets of others, and signals to them
OF_FILES = EXECUTE | WRITE | READ | TRUNCATE | IOCTL
CHANGE = READ | LIST | WRITE | TRUNCATE
CHANGE |= MAKE_FILE | MAKE_FOLDER | REMOVE_FILE | REMOVE_FOLDER
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights on files an ABI has


class Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


class Port(ctypes.Structure):
    _fields_ = (("rights", ctypes.c_uint64), ("port", ctypes.c_uint64))


@cache
def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none, or a container's rules forbid it."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_library().syscall(CREATE_RULESET, None, 0, VERSION)))


def prepare(sandbox: Sandbox, env: Mapping[str, str]) -> tuple[int, Callable[[], None]]:
    """A ruleset's descriptor, to be closed once the program was started, and what the child calls
    between fork and exec. Raises OSError."""
    limits_network = sandbox.ports is not None and abi() >= PORTS_SINCE
    every = (1 << RIGHTS.get(abi(), 16)) - 1
    ruleset = Ruleset(
        every, (BIND | CONNECT) * limits_network, SCOPES if abi() >= SCOPES_SINCE else 0
    )
    size = 8 if abi() < PORTS_SINCE else 16 if abi() < SCOPES_SINCE else 24
    rules = _checked(_library().syscall(CREATE_RULESET, ctypes.byref(ruleset), size, 0))
    try:
        _allow(rules, policy.executable(sandbox, env), (EXECUTE | READ | LIST) & every)
        _allow(rules, policy.readable(sandbox), (READ | LIST) & every)
        _allow(rules, sandbox.write, CHANGE & every)
        _allow(rules, policy.devices(sandbox), (READ | WRITE | IOCTL) & every)
        _allow(rules, sandbox.sockets, MAKE_SOCKET)
        for port in sandbox.ports or () if limits_network else ():
            _add(rules, NET_PORT, Port(BIND, port))
    except BaseException:
        os.close(rules)
        raise
    call = _library().syscall  # looked up before the fork: after it, locks may be held

    def enter() -> None:
        _allow(rules, [Path("/proc/self")], READ | LIST)  # the child's own
        _checked(call(RESTRICT_SELF, rules, 0))

    return rules, enter


def _allow(rules: int, paths: Iterable[Path], rights: int) -> None:
    for path in paths:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # does not exist
            continue
        try:
            allowed = rights if S_ISDIR(os.fstat(folder).st_mode) else rights & OF_FILES
            _add(rules, PATH_BENEATH, Beneath(allowed, folder))
        finally:
            os.close(folder)


def _add(rules: int, kind: int, rule: ctypes.Structure) -> None:
    _checked(_library().syscall(ADD_RULE, rules, kind, ctypes.byref(rule), 0))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "Landlock rejects its rules")
    return result


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
