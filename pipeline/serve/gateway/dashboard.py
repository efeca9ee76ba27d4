"""/dashboard: a page about all servers, and the figures that it shows."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
from anyio.to_thread import run_sync
from msgspec import to_builtins
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipeline.core.text import printable
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.supervisor import memory, status

from .counters import INTERVAL, SAMPLES
from .proxy import Proxy
from .servers import Target
from .upstream import Engines

FILES = Path(__file__).parent / "dashboard_page"
PATH = "/dashboard"
# The page itself, which needs no key: its script asks for one.
OPEN = {PATH: "page.html", f"{PATH}/page.css": "page.css", f"{PATH}/page.js": "page.js"}
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; form-action 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}
ROWS_SECONDS = 2.0  # between two looks at the processes, however many pages ask
LOG_BYTES = 16 * 1024


class Dashboard:
    """The page's endpoints. `sampling` must run as long as the gateway does."""

    def __init__(self, proxy: Proxy, engines: Engines) -> None:
        self._proxy, self._engines = proxy, engines
        self._lock = anyio.Lock()
        self._rows: tuple[float, list[status.Row], list[memory.DeviceMemory]] | None = None

    @property
    def routes(self) -> list[Route]:
        return [
            *(Route(path, _file) for path in OPEN),
            Route(f"{PATH}/data", self.data),
            Route(f"{PATH}/log", self.log),
        ]

    async def sampling(self) -> None:
        """Count requests and tokens of each interval, for ever."""
        while True:
            targets = self._proxy.view.now().targets
            unloaded = [
                target.name for target in targets if not (target.is_ready or target.has_process)
            ]
            metrics = await self._engines.metrics()
            self._proxy.history.sample(self._proxy.counters.requests, metrics, unloaded)
            await anyio.sleep(INTERVAL)

    async def data(self, request: Request) -> Response:
        """All figures of the page."""
        rows, devices = await self.processes()
        history, counters = self._proxy.history, self._proxy.counters
        nodes = {target.name: target.nodes for target in self._proxy.view.now().targets}
        return JSONResponse(
            {
                "at": time.time(),
                "held": counters.held,
                "devices": to_builtins(devices),
                "instances": [
                    {
                        **to_builtins(row),
                        "in_flight": counters.in_flight[row.name],
                        "nodes": nodes.get(row.name, ()),
                    }
                    for row in rows
                ],
                "history": {
                    "interval": INTERVAL,
                    "length": SAMPLES,
                    "requests": [each[1] for each in history.samples],
                    "tokens": [each[2] for each in history.samples],
                },
                "requests": to_builtins([*history.requests]),
                "inspect": self._proxy.settings.inspect,
                "unloads": self._proxy.view.is_supervised,
            }
        )

    async def log(self, request: Request) -> Response:
        """The end of one server's log. Raises Refused."""
        name = request.query_params.get("name", "")
        targets = self._proxy.view.now().targets
        file = next((x.instance.log_file for x in targets if x.name == name), None)
        if file is None:
            raise Refused(404, f"there is no instance {name}")
        if not file:
            raise Refused(404, f"the log of {name} is kept where it runs")
        text = await run_sync(_end, Path(file))
        return PlainTextResponse(text, headers={"x-content-type-options": "nosniff"})

    def _look(self) -> tuple[list[status.Row], list[memory.DeviceMemory]]:
        view = self._proxy.view
        if view.is_supervised:
            return status.ps(view.at), memory.devices()
        return [_remote_row(target) for target in view.now().targets], []

    async def processes(self) -> tuple[list[status.Row], list[memory.DeviceMemory]]:
        """All servers as `ps` shows them, and the devices' memory; for ROWS_SECONDS the same."""
        async with self._lock:
            if self._rows is None or time.monotonic() - self._rows[0] > ROWS_SECONDS:
                rows, devices = await run_sync(self._look)
                self._rows = (time.monotonic(), rows, devices)
            return self._rows[1:]


def _remote_row(target: Target) -> status.Row:
    """A server of which no process is here."""
    server = target.instance
    return status.Row(
        name=server.name,
        engine=server.engine,
        model=server.model_name,
        state=target.state,
        start=server.start,
        reason=target.reason,
        ready_since=target.ready_at,
        port=server.port,
        url=server.url,
        log_file=server.log_file,
    )


async def _file(request: Request) -> Response:
    return FileResponse(FILES / OPEN[request.scope["path"]], headers=HEADERS)


def _end(file: Path) -> str:
    """The last lines of a log."""
    try:
        with file.open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(0, size - LOG_BYTES))
            text = log.read(LOG_BYTES).decode("utf-8", "replace")
    except OSError as error:
        return f"{file}: {error.strerror}\n"
    return printable(text if size <= LOG_BYTES else text.partition("\n")[2])
