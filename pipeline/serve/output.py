"""What a server prints."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

from pipeline.core.process import LAST_LINES, Process, lines_of


def pumped(
    process: Process,
    *sinks: Callable[[str], object],
    is_over: Callable[[], bool] | None = None,
) -> threading.Thread:
    """A thread that hands each line of its output to each of `sinks`, and closes the pipe at its
    end. A closed terminal or a full disk must not stop it: an unread pipe would stop the server."""

    def pump() -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed under us at the end
            for line in lines_of(process, is_over):
                for sink in sinks:
                    with contextlib.suppress(OSError, ValueError):
                        sink(line)
            if process.stdout:
                process.stdout.close()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def quoted(lines: Iterable[str]) -> str:
    """The last of them, indented, for an error message."""
    return "\n".join(f"  | {line}" for line in list(lines)[-LAST_LINES:])
