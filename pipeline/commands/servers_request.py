"""Which file of servers, or which profile, the command line names, or else the environment."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.errors import UsageError
from pipeline.core.paths import one_path
from pipeline.core.variables import fill
from pipeline.serve.config.named import CONFIGS, PROFILE, registry
from pipeline.serve.server import VLLM

from .variables import LITELLM, MODEL_NAMES, ROUTER, FileVariables


class ServersRequest(FileVariables):
    """What the command line says about servers of a file; `config` is an absolute path."""

    registry: str = ""  # of the profile: an absolute path
    variable: str = ""  # of the environment, where that names the file
    besides: str = ""  # a variable of the environment that names another file

    @property
    def source(self) -> str:
        """The file, or the profile of a registry; empty where none is named."""
        return self.config or (f"{self.registry}#{self.profile}" if self.profile else "")


def servers_request(values: Mapping[str, object], environ: Mapping[str, str]) -> ServersRequest:
    """The file or profile of the command line, else of the environment. Raises UsageError."""
    typed = fill(FileVariables, values)
    config, profile, engine = typed.config, typed.profile, typed.engine
    named = [name for name in ("config", "profile", *MODEL_NAMES) if name in values]
    if len(named) > 1 and named[0] not in MODEL_NAMES:
        raise UsageError(f"{named[0]}= and {named[1]}= contradict each other", "leave one out")
    variable = besides = ""
    if not named:
        config, engine, variable, besides = _configured(engine, environ)
        profile = "" if config else environ.get(PROFILE, "").strip()
    return fill(
        ServersRequest,
        values,
        config=str(one_path(config)) if config else "",
        profile=profile,
        registry=registry(environ) if profile else "",
        engine=engine,
        variable=variable,
        besides=besides,
    )


def _configured(engine: str, environ: Mapping[str, str]) -> tuple[str, str, str, str]:
    """The file that the environment names for the engine, or for the first engine that has one; its
    engine, its variable, and the one that names another file, which is not read."""
    files = {key: environ.get(name, "").strip() for key, name in CONFIGS.items()}
    fit = [key for key in CONFIGS if engine in ("", key, LITELLM, ROUTER) and files[key]]
    if not fit:
        return "", engine, "", ""
    first, *others = fit
    besides = "".join(CONFIGS[key] for key in others if files[key] != files[first])
    return files[first], engine or (VLLM if first == VLLM else ""), CONFIGS[first], besides
