"""The same servers behind another program: LiteLLM's proxy, or llama-server's own router. Nothing
here has an effect.

As a router, one llama-server starts the others itself, on ports that it chooses, from a preset file
with a section for each model: its options without their dashes (see the pinned llama.cpp,
tools/server/README.md, "Model presets", and common/preset.cpp).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.serve.server import DEMAND, GATEWAY, LLAMA_CPP, Server

from .settings import GatewaySettings

# LiteLLM's provider for a kind of server; `openai` for all others.
PROVIDERS = {"rerank": "hosted_vllm"}
OWN_KEY = "LITELLM_MASTER_KEY"
NO_KEY = "dangerously_permit_weak_or_unset_master_key"
# Options that the router sets itself.
SET_BY_ROUTER = {"host", "port", "alias", "a", "api-key", "api-key-file", "cors-origins"}
# Variables that may differ: they belong to the start, not to the server.
PRIVATE = {"XDG_CONFIG_HOME"}


class LiteLLM(Struct, frozen=True, kw_only=True):
    """What `litellm --config` reads, and for each environment variable in it the file whose first
    line is its value. Neither contains a key."""

    config: Mapping[str, Any]
    key_files: Mapping[str, str]


def litellm_config(instances: Sequence[Server], settings: GatewaySettings) -> LiteLLM:
    """Every name and alias as a model. Raises UsageError where LiteLLM lacks a kind of pattern."""
    if unsupported := [pattern for pattern in settings.models if set("?[") & set(pattern)]:
        raise UsageError(
            f"gateway.models: LiteLLM does not support ? and [ in {', '.join(unsupported)}",
            "use * alone, or our own gateway",
        )
    key_files: dict[str, str] = {}
    models = []
    instances = [instance for instance in instances if instance.engine != GATEWAY]
    for instance in instances:
        if instance.api_key_file:
            key_files[_variable(instance)] = instance.api_key_file
        folded = {name.casefold() for name in instance.names}
        patterns = [p for p, name in settings.models.items() if name.casefold() in folded]
        names = dict.fromkeys((*instance.names, *patterns))
        models += [_model(name, instance) for name in names]
    config: dict[str, Any] = {
        "model_list": models,
        "router_settings": {"routing_strategy": "least-busy"},
    }
    if any(instance.tls for instance in instances):  # our own servers, on this machine
        config["litellm_settings"] = {"ssl_verify": False}
    if settings.api_key_file:
        key_files[OWN_KEY] = settings.api_key_file
        config["general_settings"] = {"master_key": f"os.environ/{OWN_KEY}"}
    elif settings.without_key:  # it refuses to start otherwise
        config["general_settings"] = {NO_KEY: True}
    return LiteLLM(config=config, key_files=key_files)


def _model(name: str, instance: Server) -> dict[str, Any]:
    key = f"os.environ/{_variable(instance)}" if instance.api_key_file else "none"
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"{PROVIDERS.get(instance.kind, 'openai')}/{instance.model_name}",
            "api_base": f"{instance.url}/v1",
            "api_key": key,
        },
        "model_info": {"mode": instance.kind},
    }


def _variable(instance: Server) -> str:
    return f"LLAMA_PIPELINE_KEY_{re.sub(r'[^A-Z0-9]', '_', instance.name.upper())}_{instance.port}"


def router_preset(instances: Sequence[Server], settings: GatewaySettings) -> str:
    """The preset file. Raises UsageError with every reason why a router cannot serve these."""
    errors = [*_common_obstacles(instances)]
    if settings.models:
        errors.append("gateway.models: a router has no patterns of names")
    if settings.hold_timeout is not None:
        errors.append("gateway.hold_timeout: a router has no such limit")
    if settings.origins or settings.hosts:
        errors.append("gateway.origins, gateway.hosts: a router knows pages of localhost alone")
    if settings.pull:
        errors.append("gateway.pull: a router has no models prepared")
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
    names = Counter(name for instance in instances for name in instance.names)
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
