"""What a file of instances or a profile asks for, read, checked, and turned into instances.

`toml_form.load` and `profiles.load_profile` read; `instances.check` and `instances.instances` turn
what was read into command lines and environments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.lazy import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__, __path__)
