"""One process of a server: started, its output logged, its health watched, ended."""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from pipeline.core.process import KEPT_LINES, shown
from pipeline.core.process.stop import ask_to_stop, end_group, group_is_empty
from pipeline.serve.guard.port import OwnPort
from pipeline.serve.logfile import Log, pumped, quoted

from . import client, marker, traces
from .environment import environment
from .policy import Timing
from .slots import Slots
from .state import Folder


class Child:
    """A server that was started. A thread sets `observed` to READY, or STUCK, and then `news`."""

    def __init__(self, port: OwnPort, at: Folder, timing: Timing, news: Event) -> None:
        """Raises PipelineError or OSError where it cannot be started."""
        self.observed, self.news = "", news
        instance, command = port.server, port.command()
        self.log, self.over = Log(Path(instance.log_file), timing.log_bytes), Event()
        self.slots = Slots(instance, at, self.log)
        self.stop_requested = False
        self.log(f"[{datetime.now().astimezone():%F %T %z}] + {shown(command)}")
        # Programs that set a process title overwrite their environment unless SPT_NOENV is set.
        mark = {marker.VARIABLE: marker.server(at, instance.name), "SPT_NOENV": "1"}
        with traces.left_on(at, instance.name) as more:
            self.process = port.start(command, environment(instance, at) | mark, **more)
        try:
            self.started = marker.start_time(self.process.pid)
            self._last: deque[str] = deque(maxlen=KEPT_LINES)
            printed = Event()
            sinks = (self.log, self._last.append, lambda line: printed.set())
            # A launcher may end before its server, whose output is still to be read.
            self._pump = pumped(self.process, *sinks, is_over=self.over.is_set)
            events, every = (self.over, printed), timing.probe_every
            arguments = (instance, self._report, *events, every, self.slots.restore)
            Thread(target=client.watch, args=arguments, daemon=True).start()
        except BaseException:
            self.kill()
            raise

    def _report(self, observed: str) -> None:
        self.observed = observed
        self.news.set()

    def exit_status(self) -> int | None:
        """Its exit status once it has ended; then the rest of its process group is killed. After a
        request to stop, the group has to end too: a launcher such as pixi ends before its server.
        """
        if self.process.poll() is None:
            return None
        if self.stop_requested and not group_is_empty(self.process):
            return None
        end_group(self.process)
        return self.process.wait()

    def ask_to_stop(self) -> None:
        self.stop_requested = True
        with contextlib.suppress(OSError):
            ask_to_stop(self.process, group=True)

    def kill(self) -> None:
        self.stop_requested = False  # do not wait for its group
        end_group(self.process)

    def finish(self) -> str:
        """Release its resources; return its last lines, to be quoted."""
        self.over.set()
        self._pump.join(timeout=1)  # longer only where an escaped descendant holds the pipe
        self.log.close()
        return quoted(self._last)
