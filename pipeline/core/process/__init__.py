"""Running programs: each is shown first, logged, and never left behind.

`lifetime` ends a child with this process, `stop` stops one on request, or when it hangs; `cgroup`
keeps together what a program starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core import sandbox as sandboxes
from pipeline.core.environment import without_credentials
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.sandbox import Sandbox

from .lifetime import die_with, put_in_job, watch_from_outside
from .stop import running, watched

Argv = Sequence[str | os.PathLike[str]]
Process = subprocess.Popen[bytes]
WINDOWS = os.name == "nt"
LAST_LINES = 15  # that are quoted
KEPT_LINES = 200  # to quote from: a backtrace may follow what says why
BACKTRACE = re.compile(  # as gdb and glibc print it for ggml, which shows nothing to users
    r"#\d+ +0x|\[(New LWP|Thread debugging|Inferior) |Using host libthread_db|0x[0-9a-f]+ in |"
    r"(warning: )?\d+\t(in )?\S+|.*\[0x[0-9a-f]+\]$"
)
LEFT_SECONDS = 5.0  # for what a program that has ended left in its pipe
LONGEST_LINE = 1024 * 1024  # bytes; longer ones are split


def shown(argv: Argv) -> str:
    """The command as it could be typed."""
    words = [os.fspath(word) for word in argv]
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def _popen(
    argv: Argv,
    env: Mapping[str, str] | None,
    sandbox: Sandbox | None,
    steps: Sequence[Callable[[], None]] = (),
    **options: Any,
) -> Process:
    """Start a program with `env`, or by default the user's own without credentials. The child calls
    `steps` between fork and exec. Raises OSError, SubprocessError."""
    env = without_credentials(os.environ) if env is None else dict(env)
    process: Process | None = None
    with contextlib.ExitStack() as held:
        prefix: Sequence[str] = ()
        if sandbox is not None:
            entry = held.enter_context(sandboxes.entry(sandbox, env))
            prefix, options["pass_fds"] = entry.prefix, entry.files
            steps = [*steps, *entry.steps]
        try:
            with _signals_later():
                process = subprocess.Popen(
                    [*prefix, *argv], env=env, preexec_fn=_all(steps), **options
                )
        except BaseException:
            if process:
                with process:
                    process.kill()
            raise
    return process


@contextmanager
def _signals_later() -> Iterator[None]:
    """Have Ctrl-C, and what else ends this process, wait for the end of the block, in which a
    process is forked: Python then calls functions of its modules, such as `logging`, and drops what
    is raised in them."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _all(steps: Sequence[Callable[[], None]]) -> Callable[[], None] | None:
    def call() -> None:
        for step in steps:
            step()

    return call if steps else None


@contextmanager
def _start_errors(argv: Argv) -> Iterator[None]:
    """Turn the reason why a program cannot be started into a PipelineError."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:  # the latter between fork and exec
        raise PipelineError(_not_started(argv, error)) from None


def _not_started(argv: Argv, error: Exception) -> str:
    """Why a program was not started. Of one whose loader is missing the system says that the
    program itself is."""
    program, why = os.fspath(argv[0]), str(getattr(error, "strerror", None) or error)
    if isinstance(error, FileNotFoundError) and os.sep in program and Path(program).is_file():
        why += (
            ": it is there, but what starts it is not, the loader of another C library "
            "(glibc, musl) or a script's interpreter"
        )
    return f"{program}: cannot be started: {why}"


def outcome(
    argv: Argv,
    *,
    timeout: float = 20,
    env: Mapping[str, str] | None = None,
    sandbox: Sandbox | None = None,
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a short program; -1 where it is missing or hangs.

    Bytes that are not UTF-8 (in file names) are kept: `surrogateescape`.
    """
    try:
        pipe = subprocess.PIPE
        with _popen(
            argv, env, sandbox, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
        ) as process:
            if WINDOWS and sandbox:
                put_in_job(process, sandbox)
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
    except OSError as error:
        return -1, "", _not_started(argv, error)
    except subprocess.SubprocessError as error:
        return -1, "", str(error)
    stdout, stderr = (text.decode("utf-8", "surrogateescape") for text in (out, err))
    return process.returncode, stdout, stderr


def capture(argv: Argv, *, timeout: float = 20) -> str | None:
    """What a short program prints on both channels; None where it is missing, fails or hangs."""
    status, out, err = outcome(argv, timeout=timeout)
    return out + err if status == 0 else None


def start(
    argv: Argv,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    own_group: bool = False,
    killed_with_us: bool = False,
    sandbox: Sandbox | None = None,
    stdin: int = subprocess.DEVNULL,
    steps: Iterable[Callable[[], None]] = (),
) -> subprocess.Popen[bytes]:
    """Start a program whose output and errors arrive on `stdout`, and that ends with this process.

    With `own_group` the terminal's Ctrl-C does not reach it: the caller has to stop it. When this
    process dies it gets SIGTERM, which lets a build tool end its own children, or with
    `killed_with_us` SIGKILL. `stdin` is a file descriptor; on Linux the child calls `steps` between
    fork and exec. Raises PipelineError where it cannot be started.
    """
    linux = sys.platform == "linux"
    begin = [die_with(os.getpid(), killed_with_us), *steps] if linux else []
    with _start_errors(argv):
        process = _popen(
            argv,
            env,
            sandbox,
            begin,
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=own_group and not WINDOWS,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) * own_group,
        )
    if WINDOWS:
        put_in_job(process, sandbox)
    elif sys.platform != "linux":
        watch_from_outside(process)
    return process


def start_detached(
    argv: Argv, *, log: Path, env: Mapping[str, str], cwd: Path, tied: bool = False
) -> Process:
    """Start a program that outlives this process and its terminal; its output is appended to `log`.

    With `tied` its stdin ends with this process, so that it may end itself. Raises PipelineError.
    """
    # Windows: with a hidden console of its own it can still send Ctrl-Break to its children.
    flags = [getattr(subprocess, f"CREATE_{x}", 0) for x in ("NO_WINDOW", "NEW_PROCESS_GROUP")]
    away = getattr(subprocess, "CREATE_BREAKAWAY_FROM_JOB", 0)
    try:
        with open(log, "ab", opener=private) as out:

            def begin(more: int) -> Process:
                return subprocess.Popen(
                    argv,
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.PIPE if tied else subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=not WINDOWS,
                    creationflags=sum(flags) | more,
                )

            try:
                process = begin(away)
            except PermissionError:  # the job of this process forbids leaving it
                process = begin(0)
    except OSError as error:
        if error.filename == os.fspath(log):
            hint = "see whether its folder is there, and the disk full, failing or read-only"
            raise PipelineError(f"{log}: cannot be written: {error.strerror}", hint) from None
        raise PipelineError(f"{argv[0]}: cannot be started: {error}") from None
    # If it ends first, this reaps it; otherwise it would stay a zombie.
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def allow_many_files() -> None:
    """Let this process have as many files open as the system permits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def private(path: str, flags: int) -> int:
    """An opener for files that only the user may read."""
    return os.open(path, flags, 0o600)


def lines_of(
    process: subprocess.Popen[bytes], is_over: Callable[[], bool] | None = None
) -> Iterator[str]:
    """The output of a process by line; a carriage return (a progress bar's) ends a line too.

    Ends with the pipe, or when nothing comes any more and the process has ended, or `is_over` says
    so: a grandchild may hold the pipe forever.
    """
    over = is_over or (lambda: process.returncode is not None)
    buffer, ended_by_return = b"", False
    while process.stdout and (chunk := _read(over, process.stdout.fileno())):
        if ended_by_return:  # the other half of a \r\n
            chunk = chunk.removeprefix(b"\n")
        ended_by_return = chunk.endswith(b"\r")
        *lines, buffer = re.split(rb"\r\n|\n|\r", buffer + chunk)
        if len(buffer) > LONGEST_LINE:
            lines, buffer = [*lines, buffer], b""
        for line in lines:
            yield line.decode("utf-8", "replace")
    if buffer:
        yield buffer.decode("utf-8", "replace")


def _read(is_over: Callable[[], bool], pipe: int) -> bytes:
    if not WINDOWS:  # where pipes cannot be polled
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not poll.poll(LEFT_SECONDS * 1000):
            if is_over():
                return b""
    return os.read(pipe, 65536)


def run(
    argv: Argv,
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    append: bool = False,
    patience: float | None = None,
    timeout: float | None = None,
    sandbox: Sandbox | None = None,
) -> int:
    """Run a program to its end: its output goes to `log`, each line to `on_line`.

    With `patience` it is killed, with all that it started, when it prints nothing for so many
    seconds; with `timeout` it is killed after that many. Returns the exit status. Shows the command
    on stderr first.
    """
    info(f"+ {shown(argv)}")
    log.parent.mkdir(parents=True, exist_ok=True)

    def begin() -> Process:
        return start(argv, env=env, cwd=cwd, own_group=patience is not None, sandbox=sandbox)

    with (
        running(begin) as process,
        _log(log, append) as write,
        watched(process, patience, timeout, write) as heard,
    ):
        write(f"+ {shown(argv)}")
        for line in lines_of(process):
            heard()
            write(line)
            if on_line:
                on_line(line)
        return process.wait()


@contextmanager
def _log(path: Path, append: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes a line. What cannot be written is dropped: a full disk must not
    hide the program's own error."""
    file = path.open("a" if append else "w", encoding="utf-8", errors="replace")

    def write(line: str) -> None:
        with contextlib.suppress(OSError):
            file.write(line + "\n")

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            file.close()


def attached(argv: Argv, *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a program on the user's own terminal; returns its exit status."""
    info(f"+ {shown(argv)}")
    return subprocess.run(argv, cwd=cwd, env=env, check=False).returncode


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The end of a log, indented, for an error message."""
    with contextlib.suppress(OSError):
        return indented(log.read_text(encoding="utf-8", errors="replace"), count)
    return ""


def indented(output: str, count: int = LAST_LINES) -> str:
    """The last lines of a program's output, for an error message."""
    return "\n".join(f"  | {line}" for line in without_backtrace(output.splitlines())[-count:])


def without_backtrace(lines: Iterable[str]) -> list[str]:
    """What a program that crashed has said, without where it was."""
    return [line for line in lines if not BACKTRACE.match(line)]


def start_attached(
    argv: Argv, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Process:
    """Start a program on this process's own stdin, stdout and stderr; it gets SIGTERM if this
    process is killed. Raises PipelineError where it cannot be started."""
    steps = [die_with(os.getpid(), False)] if sys.platform == "linux" else []
    with _start_errors(argv):
        return _popen(argv, env, None, steps, cwd=cwd)


def become(argv: Argv, *, env: Mapping[str, str], cwd: Path | None = None) -> NoReturn:
    """Replace this process by another program, which gets its signals and sets its exit status.
    Raises PipelineError where it cannot be started."""
    with _start_errors(argv):
        if cwd:
            os.chdir(cwd)
        os.execvpe(argv[0], [*argv], env)  # noqa: S606
