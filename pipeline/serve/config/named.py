"""The variables of the environment that name a file or a profile, or override what is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.environment import BINS
from pipeline.core.errors import did_you_mean
from pipeline.core.paths import REPOSITORY, one_path
from pipeline.serve.server import LLAMA_CPP, VLLM

CONFIGS = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_CONFIG", VLLM: "AUTO_INFER_VLLM_CONFIG"}
OVERRIDES = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_OVERRIDES", VLLM: "AUTO_INFER_VLLM_OVERRIDES"}
# Each override of a profile, with its option.
OF_PROFILES = {
    "LLAMACPP_CTX_SIZE_OVERRIDE": "ctx-size",
    "LLAMACPP_N_GPU_LAYERS_OVERRIDE": "n-gpu-layers",
    "LLAMACPP_THREADS_OVERRIDE": "threads",
    "LLAMACPP_PARALLEL_OVERRIDE": "parallel",
    "LLAMACPP_BATCH_SIZE_OVERRIDE": "batch-size",
    "LLAMACPP_HOST_OVERRIDE": "host",
    "LLAMACPP_PORT_OVERRIDE": "port",
    "LLAMACPP_API_KEY_FILE_OVERRIDE": "api-key-file",
}
CARDS = "CUDA_VISIBLE_DEVICES_OVERRIDE"
PROFILE = "LLM_PROFILE_NAME"
REGISTRY, DEFAULT_REGISTRY = "LLM_PROFILES_CONFIG_PATH", "configs/llm_profiles.yaml"
OVERRIDE = re.compile(r"(LLAMA_?CPP|VLLM|CUDA|AUTO_INFER)_\w*OVERRIDES?")
# All that users set, by what each begins with. Compose has HOST_PORT.
READ = {
    "LLAMACPP_": (*(name.removeprefix("LLAMACPP_") for name in OF_PROFILES), "HOST_PORT"),
    "LLM_PROFILE": ("_NAME", "S_CONFIG_PATH"),
    "LLAMA_PIPELINE_": ("HOME", "CACHE", "SANDBOX", "CWD", "COMMAND", "PROGRESS", "FLEET"),
    "AUTO_INFER_": (
        *("LLAMA_CPP_CONFIG", "LLAMA_CPP_OVERRIDES", "LLAMA_CPP_ON_BOOT"),
        *("LLAMA_CPP_GET_PKG_ON_BOOT", "LLAMA_CPP_PKG_PATH"),
        *("VLLM_CONFIG", "VLLM_OVERRIDES", "VLLM_ON_BOOT"),
    ),
}
KNOWN = [BINS, *(start + end for start, ends in READ.items() for end in ends)]
ALMOST = 0.9  # as alike are two names if the beginning may be misspelled, too
MOUNTED_REGISTRY = Path("/app/config/llm_profiles.yaml")  # where containers are given theirs


def registry(environ: Mapping[str, str]) -> str:
    """The path of the registry of profiles."""
    named = environ.get(REGISTRY, "").strip()
    if named:
        return str(one_path(named))
    is_mounted = MOUNTED_REGISTRY.is_file()
    return str(MOUNTED_REGISTRY if is_mounted else REPOSITORY / DEFAULT_REGISTRY)


def of_profile(profile: str, environ: Mapping[str, str]) -> str:
    """The name of a profile's folder under `run/`, which for a file is its path."""
    return f"{registry(environ)}#{profile}"


def misspelled(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that is almost one of those that are read here."""
    names = sorted(name for name in environ if name.startswith(("AUTO", "LLAMA", "LLM")))
    names = [name for name in names if name not in KNOWN and not OVERRIDE.fullmatch(name)]
    return [f"{name} is set, and not read{near}" for name in names if (near := _nearest(name))]


def _nearest(name: str) -> str:
    """What `did_you_mean` says of a name; of one that begins as ours do, by the rest of it."""
    near = did_you_mean(name, KNOWN, ALMOST)
    for start, ends in READ.items():
        if not near and name.startswith(start):
            end = name.removeprefix(start)
            longer = [each for each in ends if each.startswith(f"{end}_")]
            near = did_you_mean(longer[0] if longer else end, ends)
            near = near.replace(" mean ", f" mean {start}")
    return near


def unknown_overrides(environ: Mapping[str, str]) -> list[str]:
    """The errors of variables that look like overrides, and are none."""
    known = [*OF_PROFILES, CARDS, *OVERRIDES.values()]
    return [
        f"{name}: there is no such override{did_you_mean(name, known)}"
        for name, text in environ.items()
        if OVERRIDE.fullmatch(name) and name not in known and text.strip()
    ]
