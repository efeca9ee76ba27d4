"""How doit speaks here: on stderr, in one line a task, and without tracebacks for what users
can mend."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from doit.exceptions import InvalidDodoFile, TaskFailed
from doit.reporter import ConsoleReporter

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WRONG_USAGE = 3


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """doit's own marks, on stderr: `--` up to date, `.` done now."""

    desc = "one line a task, on stderr"

    def __init__(self, outstream: Any, options: dict[str, Any]) -> None:
        super().__init__(sys.stderr, options)

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """Before any work: what is selected must know its model, or its configuration."""
        for name in selected_tasks:
            if lacks := (tasks[name].meta or {}).get("lacks"):
                raise InvalidDodoFile(f"{name}: {lacks}")

    def complete_run(self) -> None:
        """Failures were told when they happened."""
        for message in self.runtime_errors:
            self.write(f"{message}\n")

    def _write_failure(self, result: dict[str, Any], write_exception: bool = True) -> None:
        name = result["task"].name
        if name.startswith("_"):  # a step that `doit list` does not show: of use is whose it is
            name = name.partition(":")[2]
        message = result["exception"].get_msg().strip()
        self.write(f"error: {name}: {message}\n" if name else f"error: {message}\n")


def guarded(action: Callable[[], None]) -> Callable[[], TaskFailed | None]:
    """The action as doit wants it: errors as messages, an interruption as a clean end."""

    @functools.wraps(action)
    def run() -> TaskFailed | None:
        try:
            action()
        except UsageError as error:
            log.info(f"error: {error}")
            raise SystemExit(WRONG_USAGE) from None
        except PipelineError as error:
            return TaskFailed(str(error))
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except OSError as error:
            return TaskFailed(f"{error.filename or 'the system'}: {error.strerror or error}")
        except KeyboardInterrupt:
            log.info("interrupted; what was finished stays, the next run goes on from there")
            raise SystemExit(INTERRUPTED) from None
        return None

    return run


def checked(question: Callable[[], bool]) -> Callable[[], bool]:
    """A question as doit's `uptodate` wants it: what goes wrong in it, the action will tell."""

    @functools.wraps(question)
    def ask() -> bool:
        try:
            return question()
        except (PipelineError, OSError):
            return False
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    return ask


def replace_closed_streams() -> None:
    """A closed stdout or stderr (`2>&-`) takes what is printed and keeps it to itself, and a
    letter that the terminal cannot show is shown as its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def interrupt_on_termination() -> None:
    """SIGTERM and a closed terminal end a run as Ctrl-C does: children first, then we."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)  # ignored already: that is how nohup works
