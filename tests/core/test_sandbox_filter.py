"""The filter of system calls, run as the kernel would, for machines that are not here too."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from pipeline.core.sandbox import Sandbox, seccomp
from pipeline.core.sandbox.seccomp import ARCHITECTURES, Instruction

ALLOWED, KILLED = "allowed", "killed"
PID, OTHER = 4321, 1
LONGEST = 4096  # BPF_MAXINSNS
SHUT = Sandbox(programs=[])
SERVER = Sandbox(programs=[], ports=[8080])
OPEN = Sandbox(programs=[], ports=None)
GPU = Sandbox(programs=[], gpus=True)


def run(code: bytes, arch: int, number: int, arguments: tuple[int, ...]) -> str:
    """What the kernel does with a system call: `allowed`, `killed`, or an error's name."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(word & (1 << 64) - 1 for word in words))
    steps = list(struct.iter_unpack("<HBBI", code))
    at, value = 0, 0
    while True:
        kind, if_true, if_false, operand = steps[at]
        at += 1
        match kind:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (value,) = struct.unpack_from("<I", data, operand)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                value &= operand
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if value == operand else if_false
            case 0x35:  # BPF_JGE
                at += if_true if value >= operand else if_false
            case 0x45:  # BPF_JSET
                at += if_true if value & operand else if_false
            case 0x06:  # BPF_RET | BPF_K
                if operand == 0x80000000:
                    return KILLED
                if operand == 0x7FFF0000:
                    return ALLOWED
                assert operand & 0xFFFF0000 == 0x00050000
                return errno.errorcode[operand & 0xFFFF]
            case _:
                raise AssertionError(f"an unknown instruction: {kind:#x}")


def decide(machine: str, sandbox: Sandbox, call: tuple[int | None, int | None], *words: int) -> str:
    number = call[list(ARCHITECTURES).index(machine)]
    assert number is not None
    code = seccomp.compiled(seccomp.instructions(sandbox, machine), PID)
    return run(code, ARCHITECTURES[machine], number, words)


machines = pytest.mark.parametrize("machine", ARCHITECTURES)
policies = pytest.mark.parametrize("sandbox", [SHUT, SERVER, OPEN, GPU])

READ, WRITE, EXIT, EXECVE = (0, 63), (1, 64), (231, 94), (59, 221)
SOCKET, MMAP, CLONE, PRCTL, FUTEX = (41, 198), (9, 222), (56, 220), (157, 167), (202, 98)
THREAD = 0x3D0F00  # as the C library makes one
FORK = 0x1200011
HIGH = 1 << 32  # the kernel itself takes these as 32 bits long


@machines
@policies
def test_all_jumps_stay_inside_and_all_ways_end(machine: str, sandbox: Sandbox) -> None:
    steps: list[Instruction] = seccomp.instructions(sandbox, machine)
    assert len(steps) < LONGEST
    assert steps[-1][0] == seccomp.RETURN
    for at, (kind, if_true, if_false, _) in enumerate(steps):
        if kind in (seccomp.EQUAL, seccomp.AT_LEAST, seccomp.ANY_BIT):
            assert at + 1 + max(if_true, if_false) < len(steps)
        else:
            assert (if_true, if_false) == (0, 0)


@machines
@policies
def test_what_every_program_needs(machine: str, sandbox: Sandbox) -> None:
    for call in (READ, WRITE, EXIT, EXECVE, PRCTL, FUTEX):
        assert decide(machine, sandbox, call, 1, 2, 3) == ALLOWED
    assert decide(machine, sandbox, CLONE, THREAD) == ALLOWED


@machines
@policies
def test_what_none_needs(machine: str, sandbox: Sandbox) -> None:
    column = list(ARCHITECTURES).index(machine)
    here = {name: call for name, call in seccomp.CALLS.items() if call[column] is not None}
    assert len(here) > 80
    for name, call in here.items():
        assert decide(machine, sandbox, call, 0, 0, 0) == "EPERM", name


@machines
def test_another_architecture_is_the_end(machine: str) -> None:
    code = seccomp.compiled(seccomp.instructions(SHUT, machine), PID)
    others = {0x40000003, 0x40000028, *ARCHITECTURES.values()} - {ARCHITECTURES[machine]}
    for arch in others:
        assert run(code, arch, 0, ()) == KILLED


def test_the_old_way_to_open_a_file_cuts_none_either() -> None:
    """x86_64 alone has it."""
    assert decide("x86_64", SHUT, seccomp.OPEN, 0, 0x200) == "EPERM"
    assert decide("x86_64", SHUT, seccomp.OPEN, 0, 0x201) == ALLOWED


def test_the_second_numbers_of_x86_64_are_not_there() -> None:
    for number in (0, 41, 57, 512):
        assert decide("x86_64", OPEN, (number | 0x40000000, None)) == "ENOSYS"


SHARED, PRIVATE, VALIDATED, ANONYMOUS, GROWS = 1, 2, 3, 0x20, 0x100
TCP, MPTCP, SCTP, NONBLOCK, CLOEXEC = 6, 262, 132, 0o4000, 0o2000000
FAST_OPEN = 0x20000000
MINUS_ONE = (1 << 32) - 1


@machines
@pytest.mark.parametrize(
    ("sandbox", "call", "words", "how"),
    [
        # New processes, and threads
        (SHUT, CLONE, (FORK,), "EPERM"),
        (SHUT, CLONE, (FORK | HIGH * 0x10000,), "EPERM"),
        (SHUT, seccomp.CLONE3, (), "ENOSYS"),
        # Signals
        (SHUT, seccomp.KILL, (PID, 9), ALLOWED),
        (SHUT, seccomp.KILL, (PID | HIGH, 9), ALLOWED),
        (SHUT, seccomp.KILL, (OTHER, 9), "EPERM"),
        (SHUT, seccomp.KILL, (0, 9), "EPERM"),
        (SHUT, seccomp.KILL, (MINUS_ONE, 9), "EPERM"),
        (SHUT, seccomp.KILL, (-PID & (1 << 64) - 1, 9), "EPERM"),
        (SHUT, seccomp.TGKILL, (PID, 5, 9), ALLOWED),
        (SHUT, seccomp.TGKILL, (OTHER, 5, 9), "EPERM"),
        (SHUT, seccomp.PRLIMIT, (0, 7), ALLOWED),
        (SHUT, seccomp.PRLIMIT, (PID, 7), ALLOWED),
        (SHUT, seccomp.PRLIMIT, (OTHER, 7), "EPERM"),
        *((SHUT, seccomp.FCNTL, (3, n), "EPERM") for n in (8, 10, 15, 1024, 1026)),
        *((SHUT, seccomp.FCNTL, (3, n), ALLOWED) for n in (0, 1, 2, 3, 4, 6, 9, 1030, 1031)),
        *((SERVER, seccomp.IOCTL, (3, n), "EPERM") for n in (0x8901, 0x8902)),
        *((SERVER, seccomp.IOCTL, (3, n), ALLOWED) for n in (0x5401, 0x5421, 0x8903)),
        (SHUT, seccomp.SETPRIORITY, (0, 0), ALLOWED),
        (SHUT, seccomp.SETPRIORITY, (0, OTHER), "EPERM"),
        (SHUT, seccomp.SETPRIORITY, (1, 0), "EPERM"),
        (SHUT, seccomp.SETPRIORITY, (2, 0), "EPERM"),
        # Files
        *((SHUT, seccomp.OPENAT, (3, 0, n), ALLOWED) for n in (0, 1, 2, 0o2000000, 0x241, 0x242)),
        *((SHUT, seccomp.OPENAT, (3, 0, n), "EPERM") for n in (0x200, 0x203, 0x240, 0o2001000)),
        (SHUT, seccomp.OPENAT2, (3,), "ENOSYS"),
        # Memory
        (SHUT, MMAP, (0, 1, 3, PRIVATE | ANONYMOUS), ALLOWED),
        (SHUT, MMAP, (0, 1, 3, PRIVATE), ALLOWED),
        (SHUT, MMAP, (0, 1, 3, SHARED), ALLOWED),
        (SHUT, MMAP, (0, 1, 3, SHARED | ANONYMOUS), "EPERM"),
        (SHUT, MMAP, (0, 1, 3, VALIDATED | ANONYMOUS), "EPERM"),
        (SHUT, MMAP, (0, 1, 3, PRIVATE | ANONYMOUS | GROWS), "EPERM"),
        (SHUT, seccomp.MEMFD, (), "EPERM"),
        (SHUT, seccomp.INOTIFY1, (), "EPERM"),
        (GPU, MMAP, (0, 1, 3, SHARED | ANONYMOUS), ALLOWED),
        (GPU, seccomp.MEMFD, (), ALLOWED),
        # Sockets
        *((SHUT, SOCKET, (f, k, 0), "EACCES") for f in (1, 2, 10, 16) for k in (1, 2, 3)),
        *((GPU, SOCKET, (f, 1, 0), "EACCES") for f in (1, 2, 10, 16)),
        *((SERVER, SOCKET, (f, 1, p), ALLOWED) for f in (2, 10) for p in (0, TCP)),
        (SERVER, SOCKET, (2, 1 | NONBLOCK | CLOEXEC, TCP), ALLOWED),
        (SERVER, SOCKET, (10 | HIGH, 1 | HIGH, HIGH), ALLOWED),
        *((SERVER, SOCKET, (f, 2, 0), "EACCES") for f in (2, 10)),
        *((SERVER, SOCKET, (f, 2 | CLOEXEC, 17), "EACCES") for f in (2, 10)),
        *((SERVER, SOCKET, (f, 3, 1), "EACCES") for f in (2, 10)),
        *((SERVER, SOCKET, (f, 1, p), "EACCES") for f in (2, 10) for p in (MPTCP, SCTP, 1)),
        *((SERVER, SOCKET, (f, 1, 0), "EACCES") for f in (0, 1, 3, 16, 17, 38, 40)),
        *((OPEN, SOCKET, (f, k, 0), ALLOWED) for f in (1, 2, 10) for k in (1, 2)),
        (SERVER, seccomp.SENDTO, (3, 0, 1, 0x4000), ALLOWED),
        (SERVER, seccomp.SENDTO, (3, 0, 1, FAST_OPEN | 0x4000), "EACCES"),
        (SERVER, seccomp.SENDMSG, (3, 0, 0x4000), ALLOWED),
        (SERVER, seccomp.SENDMSG, (3, 0, FAST_OPEN), "EACCES"),
        (SERVER, seccomp.SENDMMSG, (3, 0, 1, FAST_OPEN), "EACCES"),
        (OPEN, seccomp.SENDTO, (3, 0, 1, FAST_OPEN), ALLOWED),
    ],
)
def test_calls_that_are_looked_into(
    machine: str,
    sandbox: Sandbox,
    call: tuple[int | None, int | None],
    words: tuple[int, ...],
    how: str,
) -> None:
    assert decide(machine, sandbox, call, *words) == how


@pytest.mark.parametrize(
    ("column", "header"), [(0, "*/asm/unistd_64.h"), (1, "asm-generic/unistd.h")]
)
def test_the_numbers_are_the_systems_own(column: int, header: str) -> None:
    """Of the C library's headers, where they are installed."""
    file = next(Path("/usr/include").glob(header), None)
    if file is None:
        pytest.skip(f"there is no {header}")
    lines = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", file.read_text(), re.M)
    known = {name: int(number) for name, number in lines}
    looked_into = {
        "CLONE CLONE3 FCNTL IOCTL KILL MMAP OPEN OPENAT OPENAT2 SENDMMSG SENDMSG SENDTO SETPRIORITY"
        " SOCKET TGKILL": "",
        "PRLIMIT": "prlimit64",
        "MEMFD": "memfd_create",
        "INOTIFY": "inotify_init",
        "INOTIFY1": "inotify_init1",
    }
    calls = dict(seccomp.CALLS)
    for names, other in looked_into.items():
        calls |= {other or name.lower(): getattr(seccomp, name) for name in names.split()}
    for name, call in calls.items():
        number = call[column]
        if name in known:
            assert number == known[name], name
        else:
            assert number is None or number > max(known.values()), f"{name} is not there"
