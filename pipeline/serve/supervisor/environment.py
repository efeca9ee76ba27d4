"""The environment of a server, and of the supervisor that starts it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.core import lazy
from pipeline.core.environment import own, servers, vllm
from pipeline.serve import health
from pipeline.serve.server import GATEWAY, LLAMA_CPP, OFF, VLLM, Server

from .state import VARIABLE, Folder

VLLM_KEY = "VLLM_API_KEY"
RELAY = "pipeline.serve.guard.relay"  # takes 4 MB
SANDBOX = [f"pipeline.core.sandbox.{x}" for x in ("bubblewrap", "landlock", "seatbelt", "seccomp")]


def environment(instance: Server, at: Folder) -> dict[str, str]:
    """What its engine needs of our environment; its own `env` wins. Raises OSError."""
    env = _needed(instance, os.environ)
    env.pop(VARIABLE, None)
    if instance.engine == LLAMA_CPP:
        config = Path(instance.env.get("XDG_CONFIG_HOME", at.path / "xdg"))
        config.mkdir(parents=True, exist_ok=True)
        env["XDG_CONFIG_HOME"] = str(config)  # empty: llama.cpp reads a config.ini there
    elif instance.engine == VLLM and (key := health.key(instance)):
        env[VLLM_KEY] = key
    return {**env, **instance.env}


def load_for(instance: Server) -> None:
    """Load the modules that its start takes. It may start later, when the project's files are those
    of another version, which do not fit what is loaded."""
    for module in [RELAY] * instance.guard + SANDBOX * (instance.sandbox != OFF):
        lazy.load(module)


def for_supervisor(environ: Mapping[str, str], instances: Iterable[Server]) -> dict[str, str]:
    """What the supervisor needs of `environ`, to pass it on. Servers of any engine may be added
    later, so it gets what each needs; the hub's token and proxies only if one of these downloads.
    """
    env = own(environ) | servers(environ) | vllm(environ)
    for instance in instances:
        env |= _needed(instance, environ)
    return env


def missing(pid: int, instances: Iterable[Server]) -> list[str]:
    """The variables for downloads that the running supervisor `pid` was started without."""
    import psutil  # slow to load, and not needed to start a server

    more = for_supervisor(os.environ, instances).keys() - for_supervisor(os.environ, ()).keys()
    with suppress(psutil.Error, OSError):
        return sorted(more - psutil.Process(pid).environ().keys())
    return []


def _needed(instance: Server, environ: Mapping[str, str]) -> dict[str, str]:
    if instance.engine == GATEWAY:
        return own(environ, downloads=instance.downloads)
    listed = vllm if instance.engine == VLLM else servers
    return listed(environ, downloads=instance.downloads)
