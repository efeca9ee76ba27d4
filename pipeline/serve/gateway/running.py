"""The gateway's process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pipeline.core import log
from pipeline.serve.health import require_free
from pipeline.serve.supervisor.state import Folder

from .app import app
from .settings import GatewaySettings, as_instance, check

GRACE_SECONDS = 0.5  # for answers under way when it is asked to stop
KEEP_ALIVE_SECONDS = 65  # longer than clients keep a connection, so that they close it


def run(at: Folder, settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises UsageError or PipelineError where it cannot start."""
    check(settings)
    require_free(settings.host, settings.port)
    config = uvicorn.Config(
        app(at, settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,  # type: ignore[arg-type]
    )
    log.info(f"gateway on {as_instance(at, settings).url}")
    with _stop_is_no_failure():
        uvicorn.Server(config).run()


@contextmanager
def _stop_is_no_failure() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again once it has ended, for who was there
    before it; that one takes no notice."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda _, frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
