"""seccomp: refuse system calls that a program which reads and writes files never needs.

Landlock limits files and TCP; this is for the rest: other sockets, new processes, other processes,
owners and modes of files, memory that no limit counts, and what only root may do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from errno import EACCES, ENOSYS, EPERM

from .policy import Sandbox

# Numbers on x86_64 and aarch64, of asm/unistd.h; None: no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "ioprio_set": (251, 30),
    "rt_tgsigqueueinfo": (297, 240), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # new processes; clone makes threads too, so its flags are checked
    "fork": (57, None), "vfork": (58, None),
    # owners, modes, times and attributes, which Landlock does not limit
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "mknod": (133, None),
    "mknodat": (259, 33), "open_by_handle_at": (304, 265),
    "truncate": (76, 45),  # before Linux 6.2; open files are shortened by ftruncate
    # what others share
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218),
    # ways around all this
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    "memfd_secret": (447, 447), "unshare": (272, 97), "setns": (308, 268),
    # root's
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "fsopen": (430, 430), "fsmount": (432, 432), "fsconfig": (431, 431), "fspick": (433, 433),
    "move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "ioperm": (173, None), "iopl": (172, None),
    "fanotify_init": (300, 262), "vhangup": (153, 58),
}  # fmt: skip
SOCKET, CLONE, CLONE3, MMAP = (41, 198), (56, 220), (435, 435), (9, 222)
KILL, TGKILL, PRLIMIT, MEMFD = (62, 129), (234, 131), (302, 261), (319, 279)
FCNTL, IOCTL, SETPRIORITY = (72, 25), (16, 29), (141, 140)
INOTIFY, INOTIFY1 = (253, None), (294, 26)
OPEN, OPENAT, OPENAT2 = (2, None), (257, 56), (437, 437)
SENDTO, SENDMSG, SENDMMSG = (44, 206), (46, 211), (307, 269)
CONNECT = (42, 203)

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_… of linux/audit.h
X32 = 0x40000000  # x86_64 has a second set of numbers from here on
LOAD, EQUAL, AT_LEAST, ANY_BIT, MASK, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # linux/filter.h
ALLOW, ERROR, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # bytes, in struct seccomp_data
UNIX, INET, INET6, STREAM, TCP = 1, 2, 10, 1, 6
MSG_FASTOPEN = 0x20000000
ACCESS_MODE, WRITE_ONLY, READ_WRITE, TRUNCATE = 3, 1, 2, 0x200
CLONE_THREAD, MAP_SHARED, MAP_ANONYMOUS = 0x10000, 0x01, 0x20
MAP_GROWSDOWN = 0x100  # counts as a stack, however large
# F_SETOWN, F_SETSIG, F_SETOWN_EX: the owner of a pipe is sent any signal when data arrives.
# F_SETLEASE, F_NOTIFY: they delay or observe other processes.
OWNERS = (8, 10, 15, 1024, 1026)
SOCKET_OWNERS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP

SET_NO_NEW_PRIVS, DROP_CAPABILITY = 38, 24  # prctl
SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}
# As without seccomp: the mitigations cost up to a third of the speed.
SET_FILTER, KEEP_SPECULATION = 1, 4
READ_ANY_FILE = {1, 2}  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root may read its users' models

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
OWN_PID = -1  # stands for the process's own number until it is known


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def is_here() -> bool:
    """Whether this system's calls can be filtered."""
    return sys.platform == "linux" and platform.machine() in ARCHITECTURES


def instructions(sandbox: Sandbox, machine: str) -> list[Instruction]:
    """The filter as the kernel runs it for each system call of the program."""
    column = list(ARCHITECTURES).index(machine)
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, ERROR | ENOSYS)]

    def add(call: tuple[int | None, int | None], *steps: Instruction) -> None:
        """Let `steps` decide about this call; they end the filter."""
        number = call[column]
        if number is not None:
            program.extend([(EQUAL, 0, len(steps), number), *steps])

    for call in CALLS.values():
        add(call, _error(EPERM))
    # Their flags cannot be checked; the C library falls back to clone and openat.
    for call in (CLONE3, OPENAT2):
        add(call, _error(ENOSYS))
    for call, flags in ((OPEN, 1), (OPENAT, 2)):  # before Linux 6.2 a reader may shorten a file
        add(
            call,
            _load(flags),
            (ANY_BIT, 0, 3, TRUNCATE),
            (MASK, 0, 0, ACCESS_MODE),
            (EQUAL, 1, 0, WRITE_ONLY),
            (EQUAL, 0, 1, READ_WRITE),
            _allow(),
            _error(EPERM),
        )
    add(CLONE, _load(0), (ANY_BIT, 1, 0, CLONE_THREAD), _error(EPERM), _allow())
    for call in (KILL, TGKILL):
        add(call, _load(0), (EQUAL, 1, 0, OWN_PID), _error(EPERM), _allow())
    for call, commands in ((FCNTL, OWNERS), (IOCTL, SOCKET_OWNERS)):
        last = len(commands) - 1
        compared = ((EQUAL, last - n, int(n == last), word) for n, word in enumerate(commands))
        add(call, _load(1), *compared, _error(EPERM), _allow())
    own = (EQUAL, 0, 3, 0), _load(1), (EQUAL, 0, 1, 0)  # PRIO_PROCESS, and of that its own
    add(SETPRIORITY, _load(0), *own, _allow(), _error(EPERM))
    add(PRLIMIT, _load(0), (EQUAL, 2, 0, 0), (EQUAL, 1, 0, OWN_PID), _error(EPERM), _allow())
    if not sandbox.gpus:  # no limit counts shared memory; drivers need it, and may watch files
        for call in (MEMFD, INOTIFY, INOTIFY1):
            add(call, _error(EPERM))
        shared = (ANY_BIT, 0, 2, MAP_SHARED), (ANY_BIT, 0, 1, MAP_ANONYMOUS)
        add(MMAP, _load(3), (ANY_BIT, 2, 0, MAP_GROWSDOWN), *shared, _error(EPERM), _allow())
    if sandbox.sockets:  # to listen on, where Landlock allows it
        add(
            SOCKET,
            _load(0),
            (EQUAL, 0, 3, UNIX),
            _load(1),
            (MASK, 0, 0, 0xF),
            (EQUAL, 1, 0, STREAM),
            _error(EACCES),
            _allow(),
        )
        add(CONNECT, _error(EACCES))
    elif sandbox.ports is not None and not sandbox.ports:
        add(SOCKET, _error(EACCES))
    elif sandbox.ports:  # TCP alone, which Landlock limits to its ports
        add(
            SOCKET,
            _load(0),
            (EQUAL, 1, 0, INET),
            (EQUAL, 0, 5, INET6),
            _load(1),
            (MASK, 0, 0, 0xF),
            (EQUAL, 0, 2, STREAM),
            _load(2),
            (EQUAL, 2, 1, 0),
            _error(EACCES),
            (EQUAL, 0, 1, TCP),
            _allow(),
            _error(EACCES),
        )
        for call, flags in ((SENDTO, 3), (SENDMSG, 2), (SENDMMSG, 3)):
            # It connects while it sends, without a check by Landlock.
            add(call, _load(flags), (ANY_BIT, 0, 1, MSG_FASTOPEN), _error(EACCES), _allow())
    return [*program, _allow()]


def compiled(steps: Sequence[Instruction], own_pid: int) -> bytes:
    """The filter in the kernel's own form: struct sock_filter of linux/filter.h."""
    operands = (own_pid if step[3] == OWN_PID else step[3] for step in steps)
    rows = zip(steps, operands, strict=True)
    return b"".join(struct.pack("=HBBI", *step[:3], operand) for step, operand in rows)


def prepare(sandbox: Sandbox) -> Callable[[], None]:
    """What the child calls last between fork and exec. Raises OSError there."""
    machine = platform.machine()
    steps = instructions(sandbox, machine)
    call, number = ctypes.CDLL(None, use_errno=True).syscall, SECCOMP_CALL[machine]

    def enter() -> None:
        code = ctypes.create_string_buffer(compiled(steps, os.getpid()))
        program = Program(len(steps), ctypes.addressof(code))
        if call(number, SET_FILTER, KEEP_SPECULATION, ctypes.byref(program)) < 0 and (
            call(number, SET_FILTER, 0, ctypes.byref(program)) < 0  # before Linux 4.17
        ):
            raise OSError(ctypes.get_errno(), "seccomp rejects its filter")

    return enter


def drop_rights() -> Callable[[], None]:
    """What the child calls first: no program that it starts gets more rights, and root keeps only
    those to read files."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    is_root = os.geteuid() == 0

    def enter() -> None:
        if is_root:
            for capability in range(64):
                if capability not in READ_ANY_FILE:
                    prctl(DROP_CAPABILITY, capability, 0, 0, 0)  # fails for those it does not have
        if prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the kernel knows no PR_SET_NO_NEW_PRIVS")

    return enter


def _load(argument: int) -> Instruction:
    """Load the lower half of an argument: of these the kernel uses no more."""
    return (LOAD, 0, 0, ARGUMENTS + 8 * argument)


def _error(number: int) -> Instruction:
    return (RETURN, 0, 0, ERROR | number)


def _allow() -> Instruction:
    return (RETURN, 0, 0, ALLOW)
