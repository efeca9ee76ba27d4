"""Many servers under one supervisor: what is wanted is in one file, what is there in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__, __path__)
