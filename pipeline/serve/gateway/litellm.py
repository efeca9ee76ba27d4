"""The configuration of LiteLLM's proxy for the same instances. Nothing here has an effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.serve.server import GATEWAY, Server

from .settings import GatewaySettings

# How LiteLLM calls a server that speaks OpenAI's API, and one whose reranking it knows.
PROVIDERS = {"rerank": "hosted_vllm"}
OWN_KEY = "LITELLM_MASTER_KEY"
NO_KEY = "dangerously_permit_weak_or_unset_master_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteLLM:
    """What `litellm --config` reads, and for each environment variable that it refers to the
    file whose first line is its value. No key stands in either."""

    config: Mapping[str, Any]
    key_files: Mapping[str, str]


def litellm_config(instances: Iterable[Server], settings: GatewaySettings) -> LiteLLM:
    """Every name and alias as a model. Raises UsageError for a pattern that LiteLLM lacks."""
    key_files: dict[str, str] = {}
    models = []
    instances = [one for one in instances if one.engine != GATEWAY]
    for one in instances:
        if one.api_key_file:
            key_files[_variable(one)] = one.api_key_file
        names = dict.fromkeys((one.name, *one.aliases))
        names |= dict.fromkeys(_patterns_for(names, settings.models))
        models += [_model(name, one) for name in names]
    config: dict[str, Any] = {
        "model_list": models,
        "router_settings": {"routing_strategy": "least-busy"},
    }
    if any(one.tls for one in instances):  # our own servers, on this machine
        config["litellm_settings"] = {"ssl_verify": False}
    if settings.api_key_file:
        key_files[OWN_KEY] = settings.api_key_file
        config["general_settings"] = {"master_key": f"os.environ/{OWN_KEY}"}
    elif settings.without_key:  # else it refuses to start
        config["general_settings"] = {NO_KEY: True}
    return LiteLLM(config=config, key_files=key_files)


def _patterns_for(names: Iterable[str], patterns: Mapping[str, str]) -> list[str]:
    """The patterns that lead to one of `names`."""
    odd = [pattern for pattern in patterns if set("?[") & set(pattern)]
    if odd:
        raise UsageError(
            f"gateway.models: LiteLLM does not know ? and [ in {', '.join(odd)}",
            "use * alone, or the project's own gateway",
        )
    folded = {name.casefold() for name in names}
    return [pattern for pattern, name in patterns.items() if name.casefold() in folded]


def _model(name: str, one: Server) -> dict[str, Any]:
    served = next(iter(one.aliases), one.name)
    key = f"os.environ/{_variable(one)}" if one.api_key_file else "none"
    return {
        "model_name": name,
        "litellm_params": {
            "model": f"{PROVIDERS.get(one.kind, 'openai')}/{served}",
            "api_base": f"{one.url}/v1",
            "api_key": key,
        },
        "model_info": {"mode": one.kind},
    }


def _variable(one: Server) -> str:
    return f"LLAMA_PIPELINE_KEY_{re.sub(r'[^A-Z0-9]', '_', one.name.upper())}_{one.port}"
