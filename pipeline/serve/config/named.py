"""Which file or profile the environment names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.paths import REPOSITORY, one_path
from pipeline.serve.server import LLAMA_CPP, VLLM

CONFIGS = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_CONFIG", VLLM: "AUTO_INFER_VLLM_CONFIG"}
OVERRIDES = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_OVERRIDES", VLLM: "AUTO_INFER_VLLM_OVERRIDES"}
PROFILE = "LLM_PROFILE_NAME"
REGISTRY, DEFAULT_REGISTRY = "LLM_PROFILES_CONFIG_PATH", "configs/llm_profiles.yaml"
MOUNTED_REGISTRY = Path("/app/config/llm_profiles.yaml")  # where containers are given theirs


def registry(environ: Mapping[str, str]) -> str:
    """The file of profiles."""
    named = environ.get(REGISTRY, "").strip()
    if named:
        return str(one_path(named))
    is_mounted = MOUNTED_REGISTRY.is_file()
    return str(MOUNTED_REGISTRY if is_mounted else REPOSITORY / DEFAULT_REGISTRY)


def of_file(config: str) -> str:
    """What is asked for, as its folder under `run/` is named by it: a file."""
    return str(one_path(config))


def of_profile(profile: str, environ: Mapping[str, str]) -> str:
    """The same: a profile of the registry."""
    return f"{registry(environ)}#{profile}"
