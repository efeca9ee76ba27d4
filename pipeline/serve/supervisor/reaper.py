"""Ends the servers of a supervisor that was killed.

    python -m pipeline.serve.supervisor.reaper FOLDER

Its stdin is a pipe that only the supervisor holds open: at its end the supervisor is gone. On Linux
the kernel already ends the servers themselves; the reaper also ends what they have started.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from pipeline.serve.stopping import STOP_SIGNALS

from .marker import end_all
from .state import Folder


def main() -> None:
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the supervisor decides
    sys.stdin.buffer.read()
    end_all(Folder(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
