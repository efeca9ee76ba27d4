"""The programs that llama.cpp's own project publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__, __path__)
