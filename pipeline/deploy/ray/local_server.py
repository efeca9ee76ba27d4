"""The server of an instance on one node: `up` in the foreground, in a process of its own.

    <home>/run/ray/<instance>-<number>/    of one replica on this node, used again by later ones
        <instance>.toml                    the file of this one instance
        pipeline.lock                      what its model is made of

The supervisor in that process has the server's probes and its restart policy. It is killed when
the replica's process ends, and its server with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY, Home
from pipeline.core.process import KEPT_LINES, Process, lines_of, start
from pipeline.core.process.stop import ask_to_stop, end_group
from pipeline.core.store.locks import file_lock
from pipeline.core.store.publish import disk_errors
from pipeline.models import lockfile
from pipeline.serve.config.named import OVERRIDES
from pipeline.serve.gateway.servers import Target, View
from pipeline.serve.logfile import quoted
from pipeline.serve.server import BOOT, LLAMA_CPP
from pipeline.serve.supervisor import state

from .config import REPLICAS

HOST = "127.0.0.1"
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # beyond the server's own stop_timeout
LAST_SECONDS = 2.0  # for the last lines of a process that has ended


class LocalServer:
    """A server that runs on this node from `start` to `stop`."""

    _process: Process | None = None

    def __init__(
        self,
        home: Home,
        name: str,
        configuration: str,
        lock: str,
        log_file: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Write its files: `configuration` is the text of a file with this one instance, `lock`
        that of its pipeline.lock or empty, `env` more variables of the server. Raises
        PipelineError."""
        self.name, self._home, self._log_file = name, home, log_file
        self._env = dict(env or {})
        self._held = contextlib.ExitStack()
        file_name = re.sub(r"[^\w.-]+", "-", name)
        with disk_errors(home.run):
            self._folder = self._held.enter_context(own_folder(home.run / REPLICAS, file_name))
            self._file = self._folder / f"{file_name}.toml"
            self._file.write_text(configuration, encoding="utf-8")
            self.lock_file = self._folder / lockfile.FILE
            self.lock_file.unlink(missing_ok=True)
            if lock:
                self.lock_file.write_text(lock, encoding="utf-8")
        self._words = ["frozen=1"] if lock else []
        at = state.folder(home, str(self._file))
        at.state.unlink(
            missing_ok=True
        )  # of an earlier replica: that its server is stopped, or ready
        self._view = View(at)
        self._last: deque[str] = deque(maxlen=KEPT_LINES)

    def start(self) -> None:
        """Begin to prepare its model and to start it. It ends with the thread that calls this.
        Raises PipelineError."""
        words = ["up", f"config={self._file}", "background=0", *self._words]
        self._process = start(
            [sys.executable, "-m", "pipeline", *words],
            env={
                **os.environ,
                "LLAMA_PIPELINE_HOME": str(self._home.root),
                "LLAMA_PIPELINE_CWD": str(self._folder),  # where pipeline.lock is looked for
                OVERRIDES[LLAMA_CPP]: self._overrides(),
            },
            cwd=REPOSITORY,
            own_group=True,
            killed_with_us=True,
        )
        self._pump = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._pump.start()

    def _overrides(self) -> str:
        """What differs on a cluster: several replicas of an instance may run on this node, and
        Serve decides how long each does."""
        control: dict[str, Any] = {"log_file": str(self._log_file), "start": BOOT}
        control |= {"idle_timeout": 0, "env": self._env}
        server = {"host": HOST, "port": _free_port()}
        instance = {self.name: {"control": control, "server": server}}
        return json.dumps({"instance": instance, "gateway": {"enable": False}})

    def _read(self, process: Process) -> None:
        for line in lines_of(process):
            self._last.append(line)
            log.info(line)
        if process.stdout:
            process.stdout.close()

    def wait_until_ready(self) -> Target:
        """The server once it answers. Raises PipelineError where it cannot be started."""
        while not (target := self.target()) or not target.is_ready:
            self.require_running()
            time.sleep(POLL_SECONDS)
        return target

    def target(self) -> Target | None:
        """The server in its present state; None before it is started."""
        return next(iter(self._view.now().targets), None)

    def require_running(self) -> None:
        """Raise PipelineError where the server has ended, and is not started again."""
        target = self.target()
        if target and target.state in state.ENDED:
            raise PipelineError(f"{self.name} is {target.state}: {target.reason}")
        if self._process and self._process.poll() is not None:
            self._pump.join(timeout=LAST_SECONDS)
            lines = quoted(self._last)
            raise PipelineError(f"{self.name} could not be started:\n{lines}")

    def stop(self) -> None:
        """Stop the server, and release its folder."""
        if process := self._process:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    ask_to_stop(process)
                target = self.target()
                seconds = target.instance.stop_timeout if target else 0.0
                deadline = time.monotonic() + seconds + GRACE_SECONDS
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
            end_group(process)
            process.wait()
            self._pump.join(timeout=LAST_SECONDS)
        self._held.close()


@contextmanager
def own_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder that no other replica on this node uses while the block runs: the first free one of
    `name`-0, `name`-1, …"""
    from filelock import Timeout

    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in count():
        lock = file_lock(parent / f".{name}-{number}.lock", mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            folder = parent / f"{name}-{number}"
            folder.mkdir(exist_ok=True, mode=0o700)
            yield folder
        finally:
            lock.release()
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
