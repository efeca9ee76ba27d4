"""Groups of tests for pytest-xdist's workers, in the order in which they were collected.

pytest-xdist reads `xdist_group` by adding to the names of tests, which this pytest does not allow:
what the workers find is handed on in a file instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling


class Groups(LoadScopeScheduling):
    """Each group goes to the next worker that is free."""

    def __init__(self, config: Any, log: Any, file: Path) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # those with the most tests are not the longest
        self.file = file
        self.groups: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        if not self.groups:
            self.groups = json.loads(self.file.read_text(encoding="utf-8"))
        return self.groups[nodeid]
