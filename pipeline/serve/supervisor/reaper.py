"""Ends the servers of a supervisor that was killed.

    python -m pipeline.serve.supervisor.reaper FOLDER

Its stdin is a pipe that only the supervisor holds open: at its end the supervisor is gone. On Linux
the kernel already ends the servers themselves; the reaper also ends what they have started.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.serve.stopping import asked_to_stop

from .marker import end_all
from .state import Folder


def main() -> None:
    with asked_to_stop():  # the supervisor decides
        sys.stdin.buffer.read()
    end_all(Folder(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
