"""One process of an instance: started, its output kept, its answers watched, ended."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from pipeline.core.errors import PipelineError
from pipeline.core.process import LAST_LINES, ask_to_stop, end_group, group_is_empty, shown, start
from pipeline.serve.health import require_free
from pipeline.serve.instance import LLAMA_CPP, VLLM, Instance
from pipeline.serve.launch import clean_environment
from pipeline.serve.output import pumped, quoted

from . import asking, marker
from .logfile import Log
from .policy import Pace
from .state import Folder

VLLM_KEY = "VLLM_API_KEY"  # an inherited one would be asked for, and nobody knows it
LONGEST_LINE = 500  # characters, of what is quoted in a message


class Child:
    """A server that was started. `said` is what was last seen of it: READY, then STUCK if it is;
    `news` is set then, from another thread."""

    def __init__(self, instance: Instance, at: Folder, pace: Pace, news: Event) -> None:
        """Raises PipelineError or OSError where it cannot be started."""
        self.said, self.news = "", news
        require_free(instance.host, instance.port)
        if not Path(instance.folder).is_dir():
            raise PipelineError(f"{instance.folder}: there is no such folder")
        self.log, self.over = Log(Path(instance.log_file), pace.log_bytes), Event()
        self._by_launcher = instance.engine == VLLM  # such as pixi, that ends before its server
        self._group_may_end = False
        self.log(f"[{datetime.now().astimezone():%F %T %z}] + {shown(instance.command)}")
        self.process = start(
            instance.command,
            env=environment(instance, at),
            cwd=Path(instance.folder),
            own_group=True,
            killed_with_us=True,
        )
        try:
            self.started = marker.start_time(self.process.pid)
            self.last: deque[str] = deque(maxlen=LAST_LINES)
            self._pump = pumped(
                self.process, self.log, lambda line: self.last.append(line[:LONGEST_LINE])
            )
            told = (instance, self._say, self.over, pace.probe_every)
            Thread(target=asking.watch, args=told, daemon=True).start()
        except BaseException:
            self.kill()
            raise

    def _say(self, word: str) -> None:
        self.said = word
        self.news.set()

    def status(self) -> int | None:
        """Its exit status once it has ended; then what is left of its group is killed."""
        if self.process.poll() is None:
            return None
        if self._group_may_end and not group_is_empty(self.process):
            return None
        end_group(self.process)
        return self.process.wait()

    def ask_to_stop(self) -> None:
        self._group_may_end = self._by_launcher
        with contextlib.suppress(OSError):
            ask_to_stop(self.process, group=self._by_launcher)

    def kill(self) -> None:
        self._group_may_end = False
        with contextlib.suppress(OSError):
            self.process.kill()
        end_group(self.process)

    def finish(self) -> str:
        """Close what belonged to it; its last lines, to be quoted."""
        self.over.set()
        self._pump.join(timeout=1)
        if self._pump.is_alive():  # who moved away holds the pipe
            Thread(target=self._close, daemon=True).start()
        else:
            self._close()
        return quoted(self.last)

    def _close(self) -> None:
        self._pump.join()
        self.log.close()
        if self.process.stdout:
            self.process.stdout.close()


def environment(instance: Instance, at: Folder) -> dict[str, str]:
    """What the server is started with: inherited, without what would change the launch unseen."""
    env = {name: value for name, value in os.environ.items() if name != VLLM_KEY}
    if instance.engine == LLAMA_CPP:
        config = Path(instance.env.get("XDG_CONFIG_HOME", at.path / "xdg"))
        config.mkdir(parents=True, exist_ok=True)
        env = clean_environment(env, config)
    elif word := asking.key(instance):
        env[VLLM_KEY] = word
    # Programs that change their title write it over their environment, unless told not to.
    ours = {marker.VARIABLE: marker.server(at.marker, instance.name), "SPT_NOENV": "1"}
    return {**env, **instance.env, **ours}
