"""The gateway's settings, and the gateway as one more instance."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.paths import REPOSITORY
from pipeline.serve.keys import is_loopback, wrong_file
from pipeline.serve.server import GATEWAY, Server
from pipeline.serve.supervisor.state import Folder

if TYPE_CHECKING:  # pydantic takes a while to load
    from pipeline.serve.config.tables import GatewayTable


class GatewaySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """They hold no key, only the absolute path of its file. `models` maps patterns of model names
    (`claude-*`) to names of instances. `hold_timeout` is the longest wait for a server that loads,
    in seconds; None: that server's own ready_timeout."""

    host: str = "127.0.0.1"
    port: int = 9000
    api_key_file: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    hold_timeout: float | None = None
    origins: tuple[str, ...] = ()  # beside those of this machine; `*` stands for any text
    hosts: tuple[str, ...] = ()
    stop_timeout: float = 0.5  # seconds that answers under way have at a stop
    peers: tuple[str, ...] = ()  # URLs of all gateways of the same servers, which count together
    comment_seconds: float = 10.0  # between two signs of life in a stream that waits for its server
    inspect: bool = False  # keep the contents of the last requests, for the dashboard
    pull: bool = False  # clients may have models prepared
    programs: tuple[str, ...] = ()  # of llama.cpp, as `prepare` takes them: `backend=cpu`
    config: str = ""  # the file of instances, where it wants every model on disk
    without_key: bool = False  # set explicitly: open to everyone who can reach the address


def of_table(table: GatewayTable, **others: Any) -> GatewaySettings:
    """The settings in the table of a file; `others` are decided elsewhere, and win."""
    return replace(msgspec.convert(table, GatewaySettings, from_attributes=True), **others)


def check(settings: GatewaySettings) -> None:
    """Raise UsageError where the gateway must not be started with these settings."""
    if settings.api_key_file is not None:
        if why := wrong_file(Path(settings.api_key_file)):
            raise UsageError(f"api_key_file: {why}", "write one key on each line of it")
    elif not (settings.without_key or is_loopback(settings.host)):
        raise UsageError(
            f"host={settings.host}: other machines can reach it, and there is no API key",
            "set api_key_file=PATH, or listen on 127.0.0.1",
        )


def as_instance(at: Folder, settings: GatewaySettings) -> Server:
    """The gateway of the configuration in `at`, for the supervisor."""
    return Server(
        name=GATEWAY,
        engine=GATEWAY,
        kind=GATEWAY,
        executable=sys.executable,
        cmd=("-m", __package__, str(at.path), msgspec.json.encode(settings).decode()),
        downloads=settings.pull,
        folder=str(REPOSITORY),
        log_file=str(Path(at.path) / "gateway.log"),
        host=settings.host,
        port=settings.port,
        api_key_file=settings.api_key_file,
        restart="always",
        ready_timeout=60,
        stop_timeout=5,
    )
