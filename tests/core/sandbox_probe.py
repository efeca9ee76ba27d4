"""What a program tries from inside the sandbox; run there, as a program of its own.

Gets its places as JSON, tries one thing after the other, and prints as JSON how each ended: `done`,
or the name of the error. Nothing here does harm where the sandbox has a hole.
"""

# The calls themselves are what is tried:
# ruff: noqa: PTH101, PTH102, PTH104, PTH108, PTH208
import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import socket
import sys
import threading
from pathlib import Path

COLUMN = ("x86_64", "aarch64").index(platform.machine())
LIBRARY = ctypes.CDLL(None, use_errno=True)
ANYWHERE = -100  # AT_FDCWD
THEIRS = {}  # the places, of which `pid` is a process outside
TRIES = {}


def tried(function):
    TRIES[function.__name__] = function
    return function


def call(numbers, *arguments):
    """A system call by its number on x86_64 and aarch64."""
    number = numbers[COLUMN]
    if number is None:
        raise OSError(errno.ENOSYS, "not on this machine")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBRARY.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def reading(name, path):
    TRIES[name] = lambda: Path(path.format(**THEIRS)).read_bytes()


for key in ("secret", "key", "receipts", "neighbour"):
    reading(f"read_{key}", f"{{{key}}}")
reading("read_shadow", "/etc/shadow")
reading("read_their_environment", "/proc/{pid}/environ")
reading("read_their_command", "/proc/{pid}/cmdline")
reading("read_their_memory", "/proc/{pid}/mem")
reading("read_by_own_root", "/proc/self/root{secret}")
reading("read_by_their_root", "/proc/{pid}/root{secret}")
reading("read_input", "{input}")
reading("read_input_folder", "{folder}/inner/b")
reading("read_input_link", "{link}")
reading("read_own_environment", "/proc/self/environ")


@tried
def list_home():
    os.listdir(THEIRS["home"])


@tried
def list_around():
    if "home" not in os.listdir(THEIRS["top"]):
        raise OSError(errno.ENOENT, "not seen")


@tried
def list_processes():
    if any(name.isdigit() and int(name) == int(THEIRS["pid"]) for name in os.listdir("/proc")):
        return
    raise OSError(errno.ENOENT, "not seen")


@tried
def read_by_symlink():
    link = Path(THEIRS["scratch"], "link")
    link.symlink_to(THEIRS["secret"])
    link.read_bytes()


@tried
def read_by_hard_link():
    os.link(THEIRS["secret"], Path(THEIRS["scratch"], "hard"))
    Path(THEIRS["scratch"], "hard").read_bytes()


@tried
def read_by_handle():
    call((304, 265), ANYWHERE, ctypes.create_string_buffer(128), os.O_RDONLY)


@tried
def run_a_foreign_program():
    os.execv(THEIRS["foreign"], ["foreign"])


@tried
def map_foreign_code():
    # A library beside the input: read it may be, run not.
    with Path(THEIRS["input"]).open("rb") as file:
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.execv(THEIRS["input"], ["input"])


# Writing


def writing(name, path):
    """Only opened: where there is a hole, what is written could do harm."""

    def write():
        os.close(os.open(path.format(**THEIRS), os.O_WRONLY | os.O_CREAT, 0o600))

    TRIES[name] = write


writing("write_home", "{home}/new")
writing("write_home_file", "{secret}")
writing("write_tmp", "/tmp/sandbox-{pid}")
writing("write_var_tmp", "/var/tmp/sandbox-{pid}")
writing("write_shared_memory", "/dev/shm/sandbox-{pid}")
writing("write_input", "{input}")
writing("write_input_folder", "{folder}/new")
writing("write_receipts", "{receipts}")
writing("write_beside_output", "{output}.new")
writing("write_root", "/sandbox-{pid}")
writing("write_device", "/dev/sandbox-{pid}")
writing("write_run", "/run/sandbox-{pid}")
writing("write_kernel", "/proc/sys/kernel/core_pattern")
writing("write_own_limits", "/proc/self/oom_score_adj")
writing("write_output", "{output}")
writing("write_scratch", "{scratch}/new")


@tried
def remove_output():
    os.unlink(THEIRS["output"])


@tried
def remove_input():
    os.unlink(THEIRS["input"])


@tried
def move_input():
    os.rename(THEIRS["input"], Path(THEIRS["scratch"], "moved"))


@tried
def move_receipts_away():
    os.rename(Path(THEIRS["scratch"], "."), THEIRS["receipts"])


@tried
def make_folder():
    os.mkdir(Path(THEIRS["home"], "made"))


def _cut(path):
    call((76, 45), os.fsencode(path), 0)


TRIES["cut_secret"] = lambda: _cut(THEIRS["secret"])
TRIES["cut_input"] = lambda: _cut(THEIRS["input"])
TRIES["cut_by_opening"] = lambda: os.open(THEIRS["input"], os.O_RDONLY | os.O_TRUNC)
TRIES["cut_by_odd_mode"] = lambda: os.open(THEIRS["secret"], 3 | os.O_TRUNC)
TRIES["cut_by_openat2"] = lambda: call(
    (437, 437),
    ANYWHERE,
    os.fsencode(THEIRS["input"]),
    (ctypes.c_uint64 * 3)(os.O_RDONLY | os.O_TRUNC),
    24,
)
for what in ("secret", "input", "output"):
    TRIES[f"chmod_{what}"] = lambda what=what: os.chmod(THEIRS[what], 0o777)
    TRIES[f"chown_{what}"] = lambda what=what: os.chown(THEIRS[what], os.getuid(), os.getgid())
    TRIES[f"utime_{what}"] = lambda what=what: os.utime(THEIRS[what], (1, 1))
    TRIES[f"xattr_{what}"] = lambda what=what: os.setxattr(THEIRS[what], "user.a", b"b")


@tried
def chmod_open_input():
    with Path(THEIRS["input"]).open("rb") as file:
        os.fchmod(file.fileno(), 0o777)


@tried
def make_device():
    os.mknod(Path(THEIRS["scratch"], "device"), 0o600 | 0o20000, os.makedev(1, 3))


# Talking


def opening(name, *kind):
    TRIES[name] = lambda: socket.socket(*kind).close()


opening("tcp", socket.AF_INET, socket.SOCK_STREAM)
opening("tcp6", socket.AF_INET6, socket.SOCK_STREAM)
opening("udp", socket.AF_INET, socket.SOCK_DGRAM)
opening("udp6", socket.AF_INET6, socket.SOCK_DGRAM)
opening("unix", socket.AF_UNIX, socket.SOCK_STREAM)
opening("netlink", 16, socket.SOCK_RAW)
opening("mptcp", socket.AF_INET, socket.SOCK_STREAM, 262)
opening("sctp", socket.AF_INET, socket.SOCK_STREAM, 132)
opening("raw", socket.AF_INET, socket.SOCK_RAW, 1)
opening("packet", 17, socket.SOCK_RAW)
opening("vsock", 40, socket.SOCK_STREAM)
opening("kernel_crypto", 38, 5)


@tried
def watch_files():
    descriptor = call((294, 26), 0)
    os.close(descriptor)


@tried
def watch_files_of_old():
    call((253, None))


# Memory that no limit counts


@tried
def memfd():
    os.close(os.memfd_create("x"))


@tried
def shared_memory():
    mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS).close()


@tried
def shared_memory_of_validated_flags():
    mmap.mmap(-1, 4096, flags=0x03 | mmap.MAP_ANONYMOUS).close()


@tried
def shared_memory_of_a_device():
    descriptor = os.open("/dev/zero", os.O_RDWR)
    mmap.mmap(descriptor, 4096, flags=mmap.MAP_SHARED).close()


@tried
def memory_like_a_stack():
    size = int(THEIRS["memory"]) * 2
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100  # MAP_GROWSDOWN: counted as a stack
    mmap.mmap(-1, size, flags=flags).close()


@tried
def memory_made_writable_later():
    size = int(THEIRS["memory"]) * 2
    LIBRARY.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = LIBRARY.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, flags, -1, 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if LIBRARY.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "refused")


TRIES["too_much_memory"] = lambda: bytearray(100 << 30)
TRIES["memory_of_system_v"] = lambda: call((29, 194), 0, 4096, 0o1600)
TRIES["messages_of_system_v"] = lambda: call((68, 186), 0, 0o1600)
TRIES["semaphores_of_system_v"] = lambda: call((64, 190), 0, 1, 0o1600)
TRIES["secret_memory"] = lambda: call((447, 447), 0)

# New processes


@tried
def fork():
    if not os.fork():
        os._exit(0)
    os.wait()


@tried
def clone():
    if not call((56, 220), signal.SIGCHLD, 0, 0, 0, 0):
        os._exit(0)
    os.wait()


@tried
def clone3():
    arguments = (ctypes.c_uint64 * 8)()
    arguments[4] = signal.SIGCHLD
    if not call((435, 435), arguments, 64):
        os._exit(0)
    os.wait()


@tried
def vfork():
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}), 0)


TRIES["new_user_namespace"] = lambda: call((272, 97), 0x10000000)
TRIES["new_mount_namespace"] = lambda: call((272, 97), 0x00020000)
TRIES["their_namespace"] = lambda: call((308, 268), 0, 0)

# Other processes


@tried
def signal_them():
    os.kill(THEIRS["pid"], 0)


@tried
def signal_parent():
    os.kill(os.getppid(), 0)


@tried
def signal_group():
    os.kill(0, 0)


@tried
def signal_all():
    os.kill(-1, 0)


@tried
def signal_thread_of_theirs():
    call((234, 131), THEIRS["pid"], THEIRS["pid"], 0)


@tried
def signal_by_descriptor():
    descriptor = call((434, 434), THEIRS["pid"], 0)  # pidfd_open
    call((424, 424), descriptor, 0, None, 0)


@tried
def signal_by_owner():
    """Who owns a pipe is sent any signal, once something comes."""
    import fcntl

    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, THEIRS["pid"])
    fcntl.fcntl(reader, 10, signal.SIGKILL)  # F_SETSIG
    fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(writer, b"x")


@tried
def lease_input():
    """Who opens it for writing then waits for us."""
    import fcntl

    with Path(THEIRS["input"]).open("rb") as file:
        fcntl.fcntl(file.fileno(), 1024, fcntl.F_RDLCK)  # F_SETLEASE


@tried
def watch_folder():
    import fcntl

    descriptor = os.open(THEIRS["folder"], os.O_RDONLY)
    fcntl.fcntl(descriptor, 1026, 2)  # F_NOTIFY, DN_MODIFY


TRIES["trace_them"] = lambda: call((101, 117), 16, THEIRS["pid"], 0, 0)
TRIES["read_their_memory_by_call"] = lambda: call(
    (310, 270), THEIRS["pid"], ctypes.create_string_buffer(16), 1, None, 0, 0
)
TRIES["limit_them"] = lambda: call((302, 261), THEIRS["pid"], 7, None, None)
TRIES["slow_them"] = lambda: os.setpriority(os.PRIO_PROCESS, THEIRS["pid"], 19)
# Of its user's processes, and as they are: where it is not refused nothing is changed.
TRIES["slow_their_user"] = lambda: os.setpriority(
    os.PRIO_USER, 65534, os.getpriority(os.PRIO_PROCESS, 0)
)
TRIES["slow_their_disk"] = lambda: call((251, 30), 1, THEIRS["pid"], 2 << 13)

# The kernel, with words that do nothing where they are let in
TRIES["io_uring"] = lambda: call((425, 425), 1, ctypes.create_string_buffer(256))
TRIES["bpf"] = lambda: call((321, 280), 0, None, 0)
TRIES["performance"] = lambda: call((298, 241), None, 0, -1, -1, 0)
TRIES["page_faults"] = lambda: call((323, 282), 0)
TRIES["keys"] = lambda: call((250, 219), 0, -3, 0)
TRIES["mount"] = lambda: call((165, 40), None, b"/no", None, 0, None)
TRIES["open_mount"] = lambda: call((428, 428), -1, b"/no", 0)
TRIES["change_root"] = lambda: call((161, 51), b"/no")
TRIES["load_module"] = lambda: call((175, 105), None, 0, None)
TRIES["host_name"] = lambda: call((170, 161), None, 1 << 20)
TRIES["set_clock"] = lambda: call((227, 112), 99, None)

# What it needs


@tried
def threads():
    ended = []
    made = [threading.Thread(target=ended.append, args=(n,)) for n in range(8)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    assert len(ended) == 8


TRIES["some_memory"] = lambda: bytearray(64 << 20)
TRIES["signal_itself"] = lambda: os.kill(os.getpid(), 0)
TRIES["limit_itself"] = lambda: call((302, 261), 0, 7, None, None)
TRIES["slow_itself"] = lambda: os.setpriority(
    os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0)
)
TRIES["bind_itself"] = lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))


def outcome(function):
    try:
        function()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    except MemoryError:
        return "ENOMEM"
    return "done"


def main():
    THEIRS.update(json.loads(sys.argv[1]))
    only = sys.argv[2:]
    if only == ["exec"]:  # as a program that it started
        os.execv(sys.executable, [sys.executable, "-I", "-B", __file__, sys.argv[1]])
    print(json.dumps({n: outcome(f) for n, f in TRIES.items() if not only or n in only}))


if __name__ == "__main__":
    main()
