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
    "httpx2",
    "packaging.requirements",
    "psutil",
    "pydantic",
    "rich.progress",
    "yaml",
)
Request = tuple[Mapping[str, Any], Sequence[int]]  # what to run, and the files it prints to


def run(words: Sequence[str], env: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Python with these words: its exit status and what it printed, on stdout and on stderr."""
    env, forker = {**env, "PYTHONUNBUFFERED": "1"}, own()
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
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
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
        """The same for words that are `-m` or `-c` and what follows."""
        asked = json.dumps({"words": words, "env": dict(env)}).encode()
        ours, theirs = zip(os.pipe(), os.pipe(), os.pipe(), strict=True)
        try:
            socket.send_fds(self.channel, [asked], theirs)
        finally:
            for file in theirs:
                os.close(file)
        with ThreadPoolExecutor(2) as pool, os.fdopen(ours[2]) as told:
            printed = [pool.submit(read, file) for file in ours[:2]]
            pid = int(told.readline())
            killer = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
            killer.start()
            status = int(told.readline())
            killer.cancel()
            return status, printed[0].result(), printed[1].result()


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
    _, status = os.waitpid(pid, 0)
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
    how, what, *words = asked["words"]
    sys.argv = [how, *words]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


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
            importlib.import_module(module.name)
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
