"""What a server is started with."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.serve.instance import LLAMA_CPP, Instance
from pipeline.serve.launch import clean_environment

from . import asking, marker
from .state import Folder

VLLM_KEY = "VLLM_API_KEY"  # an inherited one would be asked for, and nobody knows it


def environment(instance: Instance, at: Folder) -> dict[str, str]:
    """Inherited, without what would change the launch unseen. Raises OSError."""
    without = (VLLM_KEY, marker.VARIABLE)
    env = {name: value for name, value in os.environ.items() if name not in without}
    if instance.engine == LLAMA_CPP:
        config = Path(instance.env.get("XDG_CONFIG_HOME", at.path / "xdg"))
        config.mkdir(parents=True, exist_ok=True)
        env = clean_environment(env, config)
    elif word := asking.key(instance):
        env[VLLM_KEY] = word
    return {**env, **instance.env}
