"""One process of an instance: started, its output kept, its answers watched, ended."""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from pipeline.core.errors import PipelineError
from pipeline.core.process import LAST_LINES, shown, start
from pipeline.core.process.stop import ask_to_stop, end_group, group_is_empty
from pipeline.serve import sandbox
from pipeline.serve.health import require_free
from pipeline.serve.logfile import Log
from pipeline.serve.output import pumped, quoted
from pipeline.serve.server import Server

from . import client, marker
from .environment import environment
from .policy import Timing
from .state import Folder

LONGEST_LINE = 500  # characters, of what is quoted in a message


class Child:
    """A server that was started. `said` is what was last seen of it: READY, then STUCK if it is;
    `news` is set then, from another thread."""

    def __init__(self, instance: Server, at: Folder, pace: Timing, news: Event) -> None:
        """Raises PipelineError or OSError where it cannot be started."""
        self.said, self.news = "", news
        require_free(instance.host, instance.port)
        if not Path(instance.folder).is_dir():
            raise PipelineError(f"{instance.folder}: there is no such folder")
        self.log, self.over = Log(Path(instance.log_file), pace.log_bytes), Event()
        self._was_asked = False
        self.log(f"[{datetime.now().astimezone():%F %T %z}] + {shown(instance.command)}")
        # Programs that change their title write it over their environment, unless told not to.
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
            self.last: deque[str] = deque(maxlen=LAST_LINES)
            # A launcher may end before its server, which still has something to say.
            self._pump = pumped(self.process, self.log, self._keep, is_over=self.over.is_set)
            told = (instance, self._say, self.over, pace.probe_every)
            Thread(target=client.watch, args=told, daemon=True).start()
        except BaseException:
            self.kill()
            raise

    def _keep(self, line: str) -> None:
        self.last.append(line[:LONGEST_LINE])

    def _say(self, word: str) -> None:
        self.said = word
        self.news.set()

    def status(self) -> int | None:
        """Its exit status once it has ended; then what is left of its group is killed. Who was
        asked to stop ends with its group: a launcher such as pixi ends before its server."""
        if self.process.poll() is None:
            return None
        if self._was_asked and not group_is_empty(self.process):
            return None
        end_group(self.process)
        return self.process.wait()

    def ask_to_stop(self) -> None:
        self._was_asked = True
        with contextlib.suppress(OSError):
            ask_to_stop(self.process, group=True)

    def kill(self) -> None:
        self._was_asked = False  # there is nothing more to wait for
        end_group(self.process)

    def finish(self) -> str:
        """Close what belonged to it; its last lines, to be quoted."""
        self.over.set()
        self._pump.join(timeout=1)  # longer only where somebody who moved away holds the pipe
        self.log.close()
        return quoted(self.last)
