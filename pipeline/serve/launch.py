"""The command line and the environment of one llama-server. Nothing here has an effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import environment
from pipeline.core.environment import INHERITED
from pipeline.core.process import shown

from . import address
from .flags import Flag, arguments

OURS = ("LLAMA_SERVER_BINS_DIR",)

# Options for which llama-server needs the network (common/arg.cpp of the pinned llama.cpp): models
# by repository or address, and its own presets. With a projector it also fetches images that a
# request names by address.
MODEL = {"-m", "--model"}
DOWNLOADS = re.compile(
    r"-hf\w*|-mu|-mmu|-mm|-dr|--hf-(repo|file)(-draft)?|--spec-draft-hf|--docker-repo|--mmproj"
    r"|--(model|mmproj|lora)-url|--models-preset|--(embd|fim|gpt-oss|vision)-[\w.-]+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked for; None and empty mean llama-server's own default."""

    host: str = "127.0.0.1"
    port: int = 8080
    ctx_size: int | None = None
    threads: int | None = None
    gpu_layers: str | None = None
    parallel: int | None = None
    batch_size: int | None = None
    device: str | None = None
    alias: str | None = None
    api_key_file: Path | None = None
    server: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A server as it will be started."""

    executable: Path
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    log: Path
    folder: Path  # where it runs: relative paths among its options start there
    prefix: str = ""  # llama-server's --api-prefix
    tls: bool = False
    downloads: bool = False
    sandbox: str = "auto"

    @property
    def health(self) -> str:
        return f"{self.prefix}/health"

    @property
    def command(self) -> list[str]:
        return [str(self.executable), *self.arguments]

    @property
    def shown(self) -> str:
        return shown(self.command)

    @property
    def address(self) -> str:
        """The host under which this machine reaches it."""
        return address.reached(self.host)

    @property
    def url(self) -> str:
        return address.url(self.host, self.port, self.prefix, tls=self.tls)


def endpoint_options(pooling: str) -> list[str]:
    """Embedding models and rerankers get their endpoint, as their own metadata asks for it."""
    if pooling == "none":
        return []
    return ["--reranking" if pooling == "rank" else "--embeddings", "--pooling", pooling]


def batch_options(pooling: str, ctx_size: int, batch_size: int | None) -> list[str]:
    """Models that pool read a whole text in one batch, so it is as long as the context."""
    if pooling == "none":
        return ["--batch-size", str(batch_size)] if batch_size else []
    batch = str(batch_size or ctx_size)
    return ["--batch-size", batch, "--ubatch-size", batch]


def server_arguments(
    settings: Settings,
    flags: Mapping[str, Flag],
    *,
    model: Path,
    ctx_size: int,
    alias: str,
    pooling: str,
    mmproj: Path | None = None,
) -> list[str]:
    """llama-server's arguments, each under its own name. Raises UsageError."""
    given = arguments(settings.server, flags, "server.")
    words = ["--model", str(model), "--host", settings.host, "--port", str(settings.port)]
    if mmproj:
        words += ["--mmproj", str(mmproj)]
    words += ["--ctx-size", str(ctx_size), "--alias", settings.alias or alias]
    words += endpoint_options(pooling)
    words += batch_options(pooling, ctx_size, settings.batch_size)
    for name in ("threads", "gpu_layers", "parallel", "device", "api_key_file"):
        value = getattr(settings, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    # The server answers pages of any origin unless told otherwise.
    if "cors-origins" in flags and "--cors-origins" not in given:
        words += ["--cors-origins", "localhost"]
    return [*words, *given]


def inherited(environ: Mapping[str, str]) -> list[str]:
    """The variables that would change a launch unseen."""
    return sorted(name for name in environ if name.startswith(INHERITED) and name not in OURS)


def downloads(arguments: Iterable[str]) -> bool:
    """Whether llama-server may need the network when started with these arguments. Without a model
    it is a router, which fetches models on request."""
    options = {word.replace("_", "-") for word in arguments}
    return not options & MODEL or any(map(DOWNLOADS.fullmatch, options))


def clean_environment(
    environ: Mapping[str, str], config: Path, *, downloads: bool = False
) -> dict[str, str]:
    """What llama-server gets of the user's environment: nothing that changes a launch unseen.

    `config` is an empty folder of its own: llama.cpp reads a config.ini from the user's.
    """
    env = environment.servers(environ, downloads=downloads)
    return env | {"XDG_CONFIG_HOME": str(config)}
