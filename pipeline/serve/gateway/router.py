"""llama-server's own router mode for the same instances. Nothing here has an effect.

One llama-server starts the others itself, each on a port of its own choice, from a preset file:
a section for each model, its options without their dashes (the pinned llama.cpp,
tools/server/README.md, "Model presets", and common/preset.cpp).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.serve.server import GATEWAY, LLAMA_CPP, Server

from .settings import GatewaySettings

# What the router decides itself.
ITS_OWN = {"host", "port", "alias", "a", "api-key", "api-key-file", "cors-origins"}
# Its own start, and not what an instance is.
PRIVATE = {"XDG_CONFIG_HOME"}


def router_preset(instances: Iterable[Server], settings: GatewaySettings) -> str:
    """The preset file. Raises UsageError with every reason why these do not fit a router."""
    instances = [one for one in instances if one.engine != GATEWAY]
    wrong = [*_together(instances)]
    if settings.models:
        wrong.append("gateway.models: a router knows no patterns of names")
    if settings.hold_timeout is not None:
        wrong.append("gateway.hold_timeout: a router has no such limit")
    sections = []
    for one in instances:
        options = _options(one.cmd)
        wrong += [f"{one.name}: {why}" for why in _alone(one, options)]
        lines = [f"{name} = {value}" for name, value in options if name not in ITS_OWN]
        if one.aliases:
            lines.append(f"alias = {','.join(one.aliases)}")
        lines += ["load-on-startup = true", f"stop-timeout = {max(1, round(one.stop_timeout))}"]
        sections.append("\n".join([f"[{one.name}]", *lines, ""]))
    if wrong:
        raise UsageError(
            "these instances do not fit llama-server's router mode:\n" + "\n".join(wrong),
            "leave engine=router out: the project's own gateway takes them",
        )
    return "\n".join(["version = 1", "", *sections])


def router_arguments(preset: Path, models: int, settings: GatewaySettings) -> list[str]:
    """The arguments of the llama-server that is the router of so many models."""
    # 0 means without limit, and is refused where models are loaded at the start.
    words = ["--models-preset", str(preset), "--models-max", str(models)]
    words += ["--host", settings.host, "--port", str(settings.port), "--cors-origins", "localhost"]
    if settings.api_key_file:
        words += ["--api-key-file", settings.api_key_file]
    return words


def _together(instances: Sequence[Server]) -> Iterable[str]:
    """Why one server cannot start them all."""
    if not instances:
        yield "there is none"
    for what, values in (
        ("programs", {one.executable for one in instances}),
        ("hosts", {one.host for one in instances}),
        ("folders", {one.folder for one in instances}),
        ("GPUs", {one.gpu_ids or "all" for one in instances}),
    ):
        if len(values) > 1:
            yield f"they want different {what}: {', '.join(sorted(values))}"
    environments = [
        {name: value for name, value in one.env.items() if name not in PRIVATE} for one in instances
    ]
    if any(env != environments[0] for env in environments):
        yield "they want different environments"
    names = Counter(name for one in instances for name in {one.name, *one.aliases})
    for name, count in names.items():
        if count > 1:
            yield f"{count} of them answer to {name}; a router knows one"


def _alone(one: Server, options: Sequence[tuple[str, str]]) -> Iterable[str]:
    """Why a preset cannot say what `one` is."""
    if one.engine != LLAMA_CPP:
        yield f"it runs in {one.engine}, not in llama-server"
    if one.tls or one.prefix:
        yield "TLS and --api-prefix are the router's alone"
    if one.name in ("default", "*") or set("]:\n") & set(one.name):
        yield "a preset cannot have this name"
    if any("," in alias for alias in one.aliases):
        yield "an alias has a comma in it"
    if "model" not in dict(options) and "m" not in dict(options):
        yield "its command names no --model"
    for name, count in Counter(name for name, _ in options).items():
        if count > 1:
            yield f"--{name} stands {count} times; in a preset once"
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
