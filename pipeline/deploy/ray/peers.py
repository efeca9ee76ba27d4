"""The files of models, from a node that has them: many new nodes do not all ask the hub.

For each model one node asks the hub, and the others wait for it. Each node that has the files
serves them to further ones, so their number doubles with every round. What comes from a node is
checked by its hash like what comes from the hub; where anything goes wrong, the hub is asked.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from pipeline.core import bounded, log
from pipeline.core.download import Location
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import fetch, lockfile
from pipeline.models.fetch import FileSource
from pipeline.models.resolve import ModelFile, Resolved

WATCH_SECONDS = 2.0  # between two signs of life of a node that fetches from the hub
SILENT_SECONDS = 20.0  # after which another node takes its place
CONNECT_SECONDS = 5.0  # for a node that has the files to answer
ASK_SECONDS = 1.0  # between two looks of a node that waits
HOLDER, FETCHER = "holder", "fetcher"


class Store(Protocol):
    """Keys and values that all nodes see, as Ray's head keeps them."""

    def put(self, key: str, value: str, *, overwrite: bool = True) -> bool:
        """Set it; with `overwrite=False` only where it is missing. Whether it was set."""

    def get(self, key: str) -> str | None: ...

    def delete(self, key: str) -> None: ...

    def keys(self, prefix: str) -> list[str]: ...


class ModelPeers:
    """This node among those that have models. Its files are served until `close`."""

    def __init__(self, store: Store, host: str) -> None:
        self._store, self._host = store, host
        self._node = secrets.token_hex(8)
        self._files: FileServer | None = None
        self._offered: dict[str, str] = {}

    @contextmanager
    def bring(self, models: Sequence[Resolved]) -> Iterator[None]:
        """Get what this node lacks of `models` from others. What is still missing in the block is
        for the hub: the others wait for it. What is here is offered to them."""
        over, claims = threading.Event(), list[tuple[str, Resolved]]()
        watch = threading.Thread(target=self._watch, args=(claims, over), daemon=True)
        watch.start()
        try:
            for model in models:
                if claim := self._get(model):
                    claims.append((claim, model))
            yield
        finally:
            over.set()
            watch.join()
            for model in models:
                if is_here(model):
                    self._offer(model)
            for claim, _ in claims:
                self._store.delete(claim)

    def _get(self, model: Resolved) -> str | None:
        """Get it from another node, or None where it is here; else this node is the one to fetch it
        from the hub, and the key that says so is returned.

        A claim is made once: where a node falls silent the next one has the next number, so that of
        several that wait one takes its place.
        """
        number, last, since = 0, "", time.monotonic()
        while not is_here(model):
            claim = f"{FETCHER}/{model.slug}/{number}"
            if urls := self._urls(model):
                url = random.choice(urls)  # noqa: S311
                try:
                    _fetch_from(url, model)
                except PipelineError as error:
                    log.info(f"{model.name}: not from another node: {error.message}")
                    self._store.delete(f"{HOLDER}/{model.slug}/{url}")
            elif self._store.put(claim, self._node, overwrite=False):
                if not self._urls(model):
                    return claim
                self._store.delete(claim)  # it was offered, and the earlier claim was deleted
            else:
                sign = self._store.get(claim) or ""
                if sign != last:
                    last, since = sign, time.monotonic()
                elif time.monotonic() - since > SILENT_SECONDS:
                    number, last = number + 1, ""
                time.sleep(ASK_SECONDS)
        return None

    def _urls(self, model: Resolved) -> list[str]:
        prefix = f"{HOLDER}/{model.slug}/"
        return [key.removeprefix(prefix) for key in self._store.keys(prefix)]

    def _watch(self, claims: Sequence[tuple[str, Resolved]], over: threading.Event) -> None:
        """Give signs of life while the hub is asked, and offer what has come from it at once: to
        load it may take long."""
        while not over.wait(WATCH_SECONDS):
            for claim, model in claims:
                if is_here(model):
                    self._offer(model)
                else:
                    self._store.put(claim, f"{self._node} {time.monotonic()}")

    def _offer(self, model: Resolved) -> None:
        """Serve the files of a model that is here."""
        if model.slug not in self._offered:
            self._files = self._files or FileServer(self._host)
            self._files.add(model)
            key = f"{HOLDER}/{model.slug}/{self._files.url}"
            self._store.put(key, "")
            self._offered[model.slug] = key

    def close(self) -> None:
        """Serve nothing any more."""
        for key in self._offered.values():
            self._store.delete(key)
        if self._files:
            self._files.close()


def models_of(lock_file: Path, home: Home) -> list[Resolved]:
    """The models of the hub that a pipeline.lock pins. Raises PipelineError."""
    pinned = [lockfile.resolved(entry, home) for entry in lockfile.read(lock_file)]
    models = [each for model in pinned if model for each in model.fetched]
    return [model for model in models if model.source["type"] == "hf"]


def is_here(model: Resolved) -> bool:
    """Whether all its files are here, by their receipts."""
    return all(fetch.is_here(model, file) for file in model.files)


def path_of(model: Resolved, file: ModelFile) -> str:
    """The path of a file below the URL of a FileServer."""
    return f"{model.slug}/{file.name}"


def _fetch_from(url: str, model: Resolved) -> None:
    """Get a model's files from another node. Raises PipelineError."""

    def locate(model: Resolved, file: ModelFile) -> Location:
        return Location(url=f"{url}/{quote(path_of(model, file))}")

    at = urlsplit(url)
    try:  # a node that is gone is not asked as long as the hub is
        socket.create_connection((at.hostname or "", at.port or 0), CONNECT_SECONDS).close()
    except OSError as error:
        raise PipelineError(f"{at.hostname}: {error}") from None
    # No proxy of the user's leads to a node.
    with bounded.client(httpx2.Client(trust_env=False)) as client:
        fetch.fetch(model, source=FileSource(client=lambda: client, locate=locate))


class FileServer:
    """Serves the files of models to nodes that know its URL, which holds a key."""

    def __init__(self, host: str) -> None:
        self._files: dict[str, Path] = {}
        self._key = secrets.token_urlsafe(24)
        listener = socket.create_server((host, 0))
        self.url = f"http://{host}:{listener.getsockname()[1]}/{self._key}"
        app = Starlette(routes=[Route("/{key}/{path:path}", self._file)])
        config = uvicorn.Config(app, access_log=False, log_config=None, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        run = partial(self._server.run, [listener])
        threading.Thread(target=run, daemon=True).start()

    def add(self, model: Resolved) -> None:
        """Serve the files of a model that is here."""
        for file in model.files:
            self._files[path_of(model, file)] = model.folder / file.name

    async def _file(self, request: Request) -> Response:
        key, path = request.path_params["key"], request.path_params["path"]
        file = self._files.get(path)
        if file is None or not secrets.compare_digest(key.encode(), self._key.encode()):
            raise HTTPException(404)
        return FileResponse(file)

    def close(self) -> None:
        """End it; what is under way is cut."""
        self._server.force_exit = self._server.should_exit = True
