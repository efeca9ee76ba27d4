"""`python -m pipeline.serve.gateway FOLDER SETTINGS`: the gateway of the configuration in FOLDER,
as the supervisor starts it.

SETTINGS is a JSON object with the fields of `GatewaySettings`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from pipeline.core import lazy, log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.supervisor.state import Folder

from .app import run
from .servers import View
from .settings import GatewaySettings


def main() -> int:
    """Exit status: 0 after a requested stop, 1 on failure, 3 for wrong usage."""
    log.guard_streams()
    folder, settings = sys.argv[1:]
    lazy.load_all()
    try:
        run(View(Folder(Path(folder))), msgspec.json.decode(settings, type=GatewaySettings))
    except PipelineError as error:
        log.info(str(error))
        return 3 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
