"""bins=package: the programs that `install_package` put there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, doitw

from . import install


@dataclass(frozen=True, slots=True)
class Packaged:
    """An installed package. It is made by nothing but its archive."""

    target: Path

    @property
    def tag(self) -> str:
        return "package"

    @property
    def programs(self) -> Path:
        return self.target / "bin"

    @property
    def commit(self) -> str:
        """The commit that its manifest names, else what its llama-server says, as one word."""
        found = install.installed(self.target)
        version = found.version.removeprefix("version: ") if found else ""
        word = re.sub(r"[^A-Za-z0-9.]+", "-", version)[:64].strip("-.")
        return (found.commit if found else "") or word or "package"

    @property
    def bytes(self) -> int:
        return 0

    @property
    def download(self) -> int:
        return 0

    def recipe(self) -> Mapping[str, Any]:
        return {"step": "package", "commit": self.commit}

    def is_current(self) -> bool:
        return install.is_current(self.target)

    def make(self, *, force: bool = False, offline: bool = False, refresh: bool = False) -> None:
        """Hash once what was copied or restored. Raises PipelineError where that is not enough."""
        if not install.settle(self.target):
            raise PipelineError(
                f"bins=package: there is no package in {self.target}, or it was changed",
                f"install one: {doitw('install_package pkg=PATH')}",
            )

    def clean(self) -> None:
        install.clean(self.target)

    def forget(self) -> None:
        install.forget(self.target)
