"""One process of a server: started, its output logged, its health watched, ended."""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from pipeline.core.errors import PipelineError
from pipeline.core.process import LAST_LINES, shown, start
from pipeline.core.process.stop import ask_to_stop, end_group, group_is_empty
from pipeline.core.text import plural
from pipeline.serve import sandbox
from pipeline.serve.logfile import Log, pumped, quoted
from pipeline.serve.server import Server

from . import client, marker, slots
from .environment import environment
from .liveness import require_port
from .policy import Timing
from .state import Folder

LONGEST_LINE = 500  # characters, of what is quoted in a message


class Child:
    """A server that was started. `observed` becomes READY, and STUCK should it hang; `news` is set
    then, from another thread."""

    def __init__(self, instance: Server, at: Folder, timing: Timing, news: Event) -> None:
        """Raises PipelineError or OSError where it cannot be started."""
        self.instance, self.observed, self.news = instance, "", news
        self._saving: Thread | None = None
        require_port(instance, at)
        if has_slots := slots.are_ours(instance, at):
            Path(instance.argument(slots.OPTION)).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not Path(instance.folder).is_dir():
            raise PipelineError(f"{instance.folder}: there is no such folder")
        self.log, self.over = Log(Path(instance.log_file), timing.log_bytes), Event()
        self._stop_requested = False
        self.log(f"[{datetime.now().astimezone():%F %T %z}] + {shown(instance.command)}")
        # Programs that set a process title overwrite their environment unless SPT_NOENV is set.
        mark = {marker.VARIABLE: marker.server(at.marker, instance.name), "SPT_NOENV": "1"}
        self.process = start(
            instance.command,
            env=environment(instance, at) | mark,
            cwd=Path(instance.folder),
            own_group=True,
            killed_with_us=True,
            sandbox=sandbox.policy(instance),
        )
        try:
            self.started = marker.start_time(self.process.pid)
            self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
            # A launcher may end before its server, whose output is still to be read.
            self._pump = pumped(self.process, self.log, self._keep, is_over=self.over.is_set)
            prepare = self._restore if has_slots else None
            arguments = (instance, self._report, self.over, timing.probe_every, prepare)
            Thread(target=client.watch, args=arguments, daemon=True).start()
        except BaseException:
            self.kill()
            raise

    def _keep(self, line: str) -> None:
        self.last_lines.append(line[:LONGEST_LINE])

    def _restore(self) -> None:
        if count := slots.restore(self.instance):
            self.log(f"restored {plural(count, 'conversation')}")

    def save(self, limit: int) -> bool:
        """Save its conversations, in a thread of its own; True once that is over."""
        if self._saving is None:
            self._saving = Thread(target=slots.save, args=(self.instance, limit), daemon=True)
            self._saving.start()
        return not self._saving.is_alive()

    def _report(self, observed: str) -> None:
        self.observed = observed
        self.news.set()

    def exit_status(self) -> int | None:
        """Its exit status once it has ended; then the rest of its process group is killed. After a
        request to stop, the group has to end too: a launcher such as pixi ends before its server.
        """
        if self.process.poll() is None:
            return None
        if self._stop_requested and not group_is_empty(self.process):
            return None
        end_group(self.process)
        return self.process.wait()

    def ask_to_stop(self) -> None:
        self._stop_requested = True
        with contextlib.suppress(OSError):
            ask_to_stop(self.process, group=True)

    def kill(self) -> None:
        self._stop_requested = False  # do not wait for its group
        end_group(self.process)

    def finish(self) -> str:
        """Release its resources; return its last lines, to be quoted."""
        self.over.set()
        self._pump.join(timeout=1)  # longer only where an escaped descendant holds the pipe
        self.log.close()
        return quoted(self.last_lines)
