"""`python -m pipeline.serve.gateway FOLDER SETTINGS`: the gateway of the configuration in FOLDER.

SETTINGS is a JSON object with the fields of `GatewaySettings`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.supervisor.state import Folder

from .settings import GatewaySettings


def main() -> int:
    """Exit status: 0 after a requested stop, 1 on failure, 3 for wrong usage."""
    settings = msgspec.json.decode(sys.argv[2], type=GatewaySettings)
    try:
        from .app import run

        run(Folder(Path(sys.argv[1])), settings)
    except PipelineError as error:
        log.info(str(error))
        return 3 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
