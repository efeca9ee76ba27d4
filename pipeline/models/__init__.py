"""Models: from what `model=` means to the GGUF that is served. A module is imported when it is
used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import load_modules_when_used

if TYPE_CHECKING:
    from . import adapter as adapter
    from . import chain as chain
    from . import converter as converter
    from . import gguf as gguf
    from . import hub_access as hub_access
    from . import imatrix as imatrix
    from . import lockfile as lockfile
    from . import one_pass as one_pass
    from . import projector as projector
    from . import quantize as quantize
    from . import reference as reference
    from . import resolve as resolve

load_modules_when_used(__name__)
