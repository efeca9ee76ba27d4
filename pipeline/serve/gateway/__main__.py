"""`python -m pipeline.serve.gateway FOLDER [SETTINGS]`: the gateway of the configuration in FOLDER.

SETTINGS is a JSON object with the fields of `GatewaySettings`; by hand, options are easier to type.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.supervisor.state import Folder

from .settings import GatewaySettings


def main() -> int:
    """Exit status: 0 after a requested stop, 1 on failure, 3 for wrong usage."""
    log.guard_streams()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.serve.gateway",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="?", default="{}")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key-file")
    parser.add_argument("--models", type=json.loads, help="JSON: pattern to name")
    parser.add_argument("--hold-timeout", type=float, help="seconds")
    parser.add_argument("--origins", type=json.loads, help="JSON: a list of patterns")
    parser.add_argument("--hosts", type=json.loads, help="JSON: a list of patterns")
    parser.add_argument("--without-key", action="store_true")
    options = vars(parser.parse_args())
    at = Folder(options.pop("folder"))
    settings = msgspec.json.decode(options.pop("settings"), type=GatewaySettings)
    try:
        from .app import run
        from .servers import View

        run(View(at), replace(settings, **options))
    except PipelineError as error:
        log.info(str(error))
        return 3 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
