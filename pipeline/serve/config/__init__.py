"""Files of instances and profiles: read, checked, and turned into servers.

`toml_form.load` and `profiles.load_profile` read one into a `Configuration`, `checks.check` raises
all that is wrong with it, `instances.instances` makes command lines and environments of it.
"""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)
