"""llama-server's own router mode for the same servers. Nothing here has an effect.

One llama-server starts the others itself, on ports that it chooses, from a preset file with a
section for each model: its options without their dashes (see the pinned llama.cpp,
tools/server/README.md, "Model presets", and common/preset.cpp).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.serve.server import DEMAND, GATEWAY, LLAMA_CPP, Server

from .settings import GatewaySettings

# Options that the router sets itself.
SET_BY_ROUTER = {"host", "port", "alias", "a", "api-key", "api-key-file", "cors-origins"}
# Variables that may differ: they belong to the start, not to the server.
PRIVATE = {"XDG_CONFIG_HOME"}


def router_preset(instances: Iterable[Server], settings: GatewaySettings) -> str:
    """The preset file. Raises UsageError with every reason why a router cannot serve these."""
    instances = [instance for instance in instances if instance.engine != GATEWAY]
    errors = [*_common_obstacles(instances)]
    if settings.models:
        errors.append("gateway.models: a router has no patterns of names")
    if settings.hold_timeout is not None:
        errors.append("gateway.hold_timeout: a router has no such limit")
    if settings.origins or settings.hosts:
        errors.append("gateway.origins, gateway.hosts: a router knows pages of localhost alone")
    sections = []
    for instance in instances:
        options = _options(instance.cmd)
        errors += [f"{instance.name}: {why}" for why in _own_obstacles(instance, options)]
        lines = [f"{name} = {value}" for name, value in options if name not in SET_BY_ROUTER]
        if instance.aliases:
            lines.append(f"alias = {','.join(instance.aliases)}")
        stop_timeout = max(1, round(instance.stop_timeout))
        lines += ["load-on-startup = true", f"stop-timeout = {stop_timeout}"]
        sections.append("\n".join([f"[{instance.name}]", *lines, ""]))
    if errors:
        raise UsageError(
            "llama-server's router mode cannot serve these instances:\n" + "\n".join(errors),
            "leave out engine=router: our own gateway can",
        )
    return "\n".join(["version = 1", "", *sections])


def router_arguments(preset: Path, models: int, settings: GatewaySettings) -> list[str]:
    """The arguments of the llama-server that is the router for `models` models."""
    # Not 0 (no limit): that is refused where models are loaded at startup.
    words = ["--models-preset", str(preset), "--models-max", str(models)]
    words += ["--host", settings.host, "--port", str(settings.port), "--cors-origins", "localhost"]
    if settings.api_key_file:
        words += ["--api-key-file", settings.api_key_file]
    return words


def _common_obstacles(instances: Sequence[Server]) -> Iterable[str]:
    """Why one llama-server cannot start them all."""
    if not instances:
        yield "there are none"
    for what, values in (
        ("programs", {instance.executable for instance in instances}),
        ("hosts", {instance.host for instance in instances}),
        ("folders", {instance.folder for instance in instances}),
        ("GPUs", {instance.gpu_ids or "all" for instance in instances}),
    ):
        if len(values) > 1:
            yield f"they have different {what}: {', '.join(sorted(values))}"
    environments = [
        {name: value for name, value in instance.env.items() if name not in PRIVATE}
        for instance in instances
    ]
    if any(env != environments[0] for env in environments):
        yield "they have different environments"
    names = Counter(name for instance in instances for name in {instance.name, *instance.aliases})
    for name, count in names.items():
        if count > 1:
            yield f"{count} of them are called {name}; a router allows one"


def _own_obstacles(instance: Server, options: Sequence[tuple[str, str]]) -> Iterable[str]:
    """Why a preset cannot describe this instance."""
    if instance.engine != LLAMA_CPP:
        yield f"it runs in {instance.engine}, not in llama-server"
    if instance.start == DEMAND or instance.idle_timeout or instance.pinned:
        yield "a router counts models, not memory: no start = demand, idle_timeout, pinned"
    if instance.tls or instance.prefix:
        yield "TLS and --api-prefix are for the router itself"
    if instance.name in ("default", "*") or set("]:\n") & set(instance.name):
        yield "a preset cannot have this name"
    if any("," in alias for alias in instance.aliases):
        yield "an alias contains a comma"
    if "model" not in dict(options) and "m" not in dict(options):
        yield "its command has no --model"
    for name, count in Counter(name for name, _ in options).items():
        if count > 1:
            yield f"--{name} is given {count} times; a preset allows it once"
    for name, value in options:
        if set(";#\r\n") & set(value) or value != value.strip() or not value:
            yield f"--{name}: a preset cannot hold the value {value!r}"


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line without their dashes; a flag's value is `true`."""
    options: list[tuple[str, str]] = []
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            options.append((word.lstrip("-"), "true"))
        elif options:
            options[-1] = (options[-1][0], word)
    return options
