"""Models: from what `model=` means to the GGUF that is served. A module is imported when it is
used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import autoquant as autoquant
    from . import chain as chain
    from . import converter as converter
    from . import gguf as gguf
    from . import hub_errors as hub_errors
    from . import imatrix as imatrix
    from . import lockfile as lockfile
    from . import projector as projector
    from . import resolve as resolve
else:

    def __getattr__(name: str) -> object:
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"{__name__} has no {name}") from None
