"""Files of instances and profiles: read, checked, and turned into servers.

`toml_form.load` and `profiles.load_profile` read one into a `Configuration`, `checks.check` raises
all that is wrong with it, `instances.instances` makes command lines and environments of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__, __path__)
