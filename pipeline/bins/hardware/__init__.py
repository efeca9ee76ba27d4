"""What this machine has, and which backend it can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__, __path__)
