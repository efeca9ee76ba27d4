"""The configuration of LiteLLM's proxy for the same servers. Nothing here has an effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.serve.server import GATEWAY, Server

from .settings import GatewaySettings

# LiteLLM's provider for a kind of server; `openai` for all others.
PROVIDERS = {"rerank": "hosted_vllm"}
OWN_KEY = "LITELLM_MASTER_KEY"
NO_KEY = "dangerously_permit_weak_or_unset_master_key"


class LiteLLM(Struct, frozen=True, kw_only=True):
    """What `litellm --config` reads, and for each environment variable in it the file whose first
    line is its value. Neither contains a key."""

    config: Mapping[str, Any]
    key_files: Mapping[str, str]


def litellm_config(instances: Iterable[Server], settings: GatewaySettings) -> LiteLLM:
    """Every name and alias as a model. Raises UsageError where LiteLLM lacks a kind of pattern."""
    key_files: dict[str, str] = {}
    models = []
    instances = [instance for instance in instances if instance.engine != GATEWAY]
    for instance in instances:
        if instance.api_key_file:
            key_files[_variable(instance)] = instance.api_key_file
        names = dict.fromkeys((instance.name, *instance.aliases))
        names |= dict.fromkeys(_patterns_for(names, settings.models))
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


def _patterns_for(names: Iterable[str], patterns: Mapping[str, str]) -> list[str]:
    """The patterns that map to one of `names`."""
    unsupported = [pattern for pattern in patterns if set("?[") & set(pattern)]
    if unsupported:
        raise UsageError(
            f"gateway.models: LiteLLM does not support ? and [ in {', '.join(unsupported)}",
            "use * alone, or our own gateway",
        )
    folded = {name.casefold() for name in names}
    return [pattern for pattern, name in patterns.items() if name.casefold() in folded]


def _model(name: str, instance: Server) -> dict[str, Any]:
    served = next(iter(instance.aliases), instance.name)
    key = f"os.environ/{_variable(instance)}" if instance.api_key_file else "none"
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"{PROVIDERS.get(instance.kind, 'openai')}/{served}",
            "api_base": f"{instance.url}/v1",
            "api_key": key,
        },
        "model_info": {"mode": instance.kind},
    }


def _variable(instance: Server) -> str:
    return f"LLAMA_PIPELINE_KEY_{re.sub(r'[^A-Z0-9]', '_', instance.name.upper())}_{instance.port}"
