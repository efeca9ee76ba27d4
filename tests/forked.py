"""Python without its start: a process that has loaded what each run of doit loads, and forks.

Each run is a process of its own all the same, with its own variables, folder, session, output and
exit status. What it saves, the start of Python and the imports, is most of a short run. Where that
cannot be had, as with other variables for Python itself, or on Windows, a new Python is started.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_")  # variables that begin so
# What runs load later than their own modules. Not huggingface_hub: it reads its settings when it is
# imported.
LATE = (
    "filelock",
    "http.server",
    "httpcore2",
    "httpx2",
    "packaging.requirements",
    "psutil",
    "pydantic",
    "rich.progress",
    "yaml",
)
Request = tuple[Mapping[str, Any], Sequence[int]]  # what to run, and the files it prints to


def start(
    words: Sequence[str], out: int, err: int, env: Mapping[str, str]
) -> Started | subprocess.Popen[bytes]:
    """Python with these words, not waited for; it prints to the files `out` and `err`."""
    forker = own()
    if forker and forker.begins_with(env):
        return forker.start(words, env, [out, err])
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )


def run(words: Sequence[str], env: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Python with these words: its exit status and what it printed, on stdout and on stderr."""
    forker = own()
    if forker and forker.begins_with(env):
        return forker.run(words, env, timeout)
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    with process:
        out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@cache
def own() -> Forker | None:
    """The one of this process."""
    return Forker() if sys.platform == "linux" else None


class Forker:
    """A process that forks for each run; it ends with this one."""

    def __init__(self) -> None:
        env = dict(os.environ)
        self.variables = read_at_start(env)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # as in a run
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.end)

    def end(self) -> None:
        self.channel.close()
        self.process.wait()

    def begins_with(self, env: Mapping[str, str]) -> bool:
        """Whether Python would start with these variables as this process did."""
        return read_at_start(env) == self.variables

    def run(
        self, words: Sequence[str], env: Mapping[str, str], timeout: float
    ) -> tuple[int, str, str]:
        """The same for words that are `-m`, `-c` or a script's path, and what follows."""
        ours, theirs = zip(os.pipe(), os.pipe(), strict=True)
        try:
            process = self.start(words, env, theirs)
        finally:
            for file in theirs:
                os.close(file)
        with ThreadPoolExecutor(2) as pool:
            printed = [pool.submit(read, file) for file in ours]
            killer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
            killer.start()
            status = process.wait()
            killer.cancel()
            return status, printed[0].result(), printed[1].result()

    def start(self, words: Sequence[str], env: Mapping[str, str], files: Sequence[int]) -> Started:
        """A process that prints to these files, on stdout and on stderr."""
        asked = json.dumps({"words": words, "env": dict(env)}).encode()
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self.channel, [asked], [*files, theirs])
        finally:
            os.close(theirs)
        return Started(words, ours)


class Started:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, words: Sequence[str], told: int) -> None:
        self.args, self.returncode = words, None
        self._told = os.fdopen(told, "rb", buffering=0)  # select sees all that was not read
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def __del__(self) -> None:
        if told := getattr(self, "_told", None):  # of one that nobody has waited for
            told.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def read(file: int) -> str:
    with os.fdopen(file, encoding="utf-8") as pipe:
        return pipe.read()


def read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to Python before its first line."""
    return {name: env[name] for name in sorted(env) if name.startswith(READ_AT_START)}


def serve(channel: socket.socket) -> Request:
    """Fork for each request, and return it in the process that is to carry it out."""
    while True:
        data, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not data:
            sys.exit()
        if not os.fork():
            channel.close()
            watch(*files)
            return json.loads(data), files[:2]
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while any(os.waitpid(-1, os.WNOHANG)):
                pass  # those that have ended


def watch(out: int, err: int, told: int) -> None:
    """Fork, and return in the new process; this one tells its number and, then, its status."""
    if not (pid := os.fork()):
        os.close(told)
        return
    os.close(out)
    os.close(err)
    os.write(told, f"{pid}\n".encode())
    poll = select.poll()
    poll.register(told, 0)  # whether anybody still reads
    poll.register(os.pidfd_open(pid), select.POLLIN)
    if any(file == told for file, _ in poll.poll()):
        try:  # the tests were interrupted, and nobody else ends it
            os.killpg(pid, signal.SIGTERM)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(asked: Mapping[str, Any], files: Sequence[int]) -> None:
    """Be as a process that was started so."""
    os.setsid()
    for file, place in zip(files, (1, 2), strict=True):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    locks = importlib.import_module("pipeline.core.store.locks")
    locks.RUN = os.urandom(4).hex()  # of each run its own
    how, *words = asked["words"]
    if how == "-m":
        sys.argv = [how, *words[1:]]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = [how, *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [how, *words]
        sys.path[0] = os.path.dirname(how)  # noqa: PTH120
        runpy.run_path(how, run_name="__main__")


def end(status: int) -> NoReturn:
    """End as Python does, but take none of the modules apart: that takes longer than a run."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def load() -> None:
    """What runs import, once for all of them."""
    import pipeline

    sys.argv = ["__main__.py"]  # doit keeps the name
    for name in ("doit.doit_cmd", "doit.cmd_run", *LATE):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "ray":  # is in an environment of its own
                    raise
    # The converter's environment, whose 10,000 files each process looks at once.
    converter = importlib.import_module("pipeline.models.converter")
    home = importlib.import_module("pipeline.core.paths").Home(REPOSITORY)
    converter.installed(home).is_current()
    gc.freeze()  # no run looks through it for garbage


def main(channel: socket.socket) -> NoReturn:
    sys.path[0] = str(REPOSITORY)
    load()
    request = serve(channel)
    try:
        become(*request)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        end(ended.code if isinstance(ended.code, int) else bool(ended.code))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
