"""The variables of many servers: which file or profile asks for them, and what to do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.paths import one_path
from pipeline.core.variables import Variable, choice, flag, integer, text
from pipeline.serve.config.named import CONFIGS as CONFIGS
from pipeline.serve.config.named import OVERRIDES as OVERRIDES
from pipeline.serve.config.named import PROFILE, registry
from pipeline.serve.config.named import REGISTRY as REGISTRY
from pipeline.serve.server import LLAMA_CPP, VLLM

LINES = 50  # of a log
LITELLM, ROUTER = "litellm", "router"  # other programs for the gateway

TABLE = (
    Variable("config", text),
    Variable("profile", text),
    Variable("engine", choice(LLAMA_CPP, VLLM, LITELLM, ROUTER)),
    Variable("name", text),
    Variable("background", flag),
    Variable("max_loading", integer(1, 10_000)),
    Variable("dry_run", flag),
    Variable("follow", flag),
    Variable("lines", integer(0, 1_000_000)),
    Variable("url", text),
    Variable("start", flag),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """What the command line says about servers of a file; `config` is an absolute path."""

    config: str = ""
    profile: str = ""
    registry: str = ""  # of the profile: an absolute path
    engine: str = ""
    besides: str = ""  # a variable of the environment that names another file
    names: tuple[str, ...] = ()
    background: bool | None = None
    max_loading: int | None = None
    dry_run: bool = False
    follow: bool = False
    lines: int = LINES
    url: str = ""
    start: bool = False

    @property
    def source(self) -> str:
        """What is asked for: a file, or a profile of a registry; empty where nothing is."""
        return self.config or (f"{self.registry}#{self.profile}" if self.profile else "")


def many(values: Mapping[str, object], environ: Mapping[str, str], models: Sequence[str]) -> Many:
    """What is said here, or else in the environment, unless one of `models` names a model. Raises
    UsageError."""
    config, profile = str(values.get("config", "")), str(values.get("profile", ""))
    engine = str(values.get("engine", ""))
    named = [name for name in ("config", "profile", *models) if name in values]
    if len(named) > 1 and named[0] not in models:
        raise UsageError(f"{named[0]}= and {named[1]}= contradict each other", "leave one out")
    besides = ""
    if not named:
        config, engine, besides = _configured(engine, environ)
        profile = "" if config else environ.get(PROFILE, "").strip()
    limit, lines = values.get("max_loading"), values.get("lines")
    background = values.get("background")
    return Many(
        config=str(one_path(config)) if config else "",
        profile=profile,
        registry=registry(environ) if profile else "",
        engine=engine,
        besides=besides,
        names=tuple(filter(None, map(str.strip, str(values.get("name", "")).split(",")))),
        background=background if isinstance(background, bool) else None,
        max_loading=limit if isinstance(limit, int) else None,
        dry_run=bool(values.get("dry_run", False)),
        follow=bool(values.get("follow", False)),
        lines=lines if isinstance(lines, int) else LINES,
        url=str(values.get("url", "")),
        start=bool(values.get("start", False)),
    )


def _configured(engine: str, environ: Mapping[str, str]) -> tuple[str, str, str]:
    """The file that the environment names for the engine, or for the first that has one; its
    engine, and the variable of another one that was not asked for."""
    named = {one: environ.get(name, "").strip() for one, name in CONFIGS.items()}
    fit = [one for one in CONFIGS if engine in ("", one, LITELLM, ROUTER) and named[one]]
    if not fit:
        return "", engine, ""
    besides = "".join(CONFIGS[one] for one in fit[1:] if named[one] != named[fit[0]])
    return named[fit[0]], engine or (VLLM if fit[0] == VLLM else ""), besides
