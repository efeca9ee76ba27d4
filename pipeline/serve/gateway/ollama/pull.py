"""Models that clients have prepared, by `doit prepare` as a child process.

A pull goes on when its client leaves, and whoever asks for the same model meanwhile shares it.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress

import anyio
import msgspec
from anyio import to_thread
from msgspec import Struct

from pipeline.core import log, paths, process, progress
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.parallel import Background
from pipeline.core.paths import REPOSITORY
from pipeline.core.pins import pins
from pipeline.models import on_disk
from pipeline.models.reference import FileFilter, Reference, parse
from pipeline.serve.config.configuration import allowed_name
from pipeline.serve.gateway.servers import Target
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.supervisor import liveness
from pipeline.serve.supervisor.state import Folder, read_wanted

from .replies import Object

AT_ONCE = 2  # models that are prepared side by side
LONGEST = 300  # characters of a reference
MANIFEST, SUCCESS = {"status": "pulling manifest"}, {"status": "success"}
# The status for each of doit's steps, which begin with a line such as `.  fetch`.
STEP = re.compile(r"\.  (\w+)")
STATUS = {
    "resolve": "pulling manifest",
    "build_bins": "building llama.cpp",
    "converter": "getting the converter",
    "convert": "converting",
    "quantize": "quantizing",
}
ERROR = "error: "


def reference(text: str) -> Reference:
    """A model that may be pulled: of the hub, or a demo, never a path. Raises Refused."""
    name = text.removesuffix(":latest")
    if name in pins().demos:
        return parse(name)
    with suppress(UsageError):
        if len(name) <= LONGEST and name.isprintable():
            return parse(f"hf:{name.removeprefix('hf:')}")  # what begins so is never a path
    raise Refused(
        400,
        f"{text[:LONGEST]!r} cannot be pulled: pass org/model, org/model:QUANT, an address of "
        f"the hub, or {' or '.join(pins().demos)}",
    )


def serving(wanted: Reference, targets: Iterable[Target]) -> list[Target]:
    """The servers of this model of the hub, whatever they are called. Raises OSError."""
    home = paths.home()
    chosen = FileFilter(quant=wanted.quant, filename=wanted.filename, pattern=wanted.pattern)
    stored = on_disk.by_name(on_disk.look(home)).values()
    models = [model for model in stored if on_disk.means(wanted, model, home)]
    files = {str(model.files[0]) for model in on_disk.narrow(models, chosen)}
    return [target for target in targets if target.instance.argument("--model") in files]


class Pull:
    """One model that is being prepared."""

    def __init__(self) -> None:
        self.error = ""
        self.is_over = False
        self._status: Object = MANIFEST
        self._changed = anyio.Event()

    async def progress(self, seconds: float) -> AsyncIterator[Object]:
        """The progress in Ollama's form: an object at each change, and the last one again after
        `seconds` without a change. It ends with `success` or an error."""
        yield MANIFEST
        while not self.is_over:
            changed = self._changed
            with anyio.move_on_after(seconds):
                await changed.wait()
            if not self.is_over:
                yield self._status
        yield {"error": self.error} if self.error else SUCCESS

    def report(self, status: Object) -> None:
        """Report a change to all clients."""
        self._status = status
        self._wake()

    def end(self, error: str = "") -> None:
        self.error, self.is_over = error, True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class _Transfer(Struct):
    """A line of core/progress.py."""

    total: int
    done: int
    digest: str = ""


class Pulls:
    """All models that are being prepared."""

    def __init__(self, at: Folder, settings: GatewaySettings) -> None:
        self._at, self._settings = at, settings
        self._running: dict[str, tuple[Pull, asyncio.Task[None]]] = {}
        self._limit = anyio.Semaphore(AT_ONCE)

    def begin(self, model: str) -> Pull:
        """Have a model prepared, or share the pull that does it already."""
        if model not in self._running:
            pull = Pull()
            self._running[model] = pull, asyncio.create_task(self._run(model, pull))
        return self._running[model][0]

    async def _run(self, model: str, pull: Pull) -> None:
        name = re.sub(r"[^\w.-]+", "-", model)[:100]
        error = "internal error; see the gateway's log"
        try:
            async with self._limit:
                await self._doit(pull, name, "prepare", f"model={model}")
                await self._start_new(pull, name)
            error = ""
        except (PipelineError, OSError) as why:
            error = str(why)
            log.info(f"pull of {model}: {error}")
        finally:
            pull.end(error)
            del self._running[model]

    async def _start_new(self, pull: Pull, name: str) -> None:
        """Have the supervisor take up new models, where the file of instances wants every model on
        disk; nothing else of the file is touched."""
        if not (self._settings.config and liveness.is_running(self._at)):
            return
        stored = on_disk.by_name(await to_thread.run_sync(on_disk.look, paths.home()))
        wanted = read_wanted(self._at)
        known = [server.name for server in wanted.instances] if wanted else []
        new = [name for name in map(allowed_name, stored) if name not in known]
        if new:
            words = f"config={self._settings.config}", f"name={','.join(new)}"
            await self._doit(pull, name, "up", *words)

    async def _doit(self, pull: Pull, name: str, *words: str) -> None:
        """Run a step to its end. Raises PipelineError with the error that it printed."""
        loop = asyncio.get_running_loop()
        errors: list[str] = []

        def heard(line: str) -> None:
            if status := _status(line):
                loop.call_soon_threadsafe(pull.report, status)
            elif line.startswith(ERROR):
                errors[:] = [line.removeprefix(ERROR)]
            elif errors and line.startswith("  "):
                errors.append(line)

        ended = asyncio.Event()
        status = 0

        def run() -> None:
            nonlocal status
            try:
                status = process.run(
                    [sys.executable, "-m", "doit", *words, *self._settings.programs],
                    log=self._at.path / f"pull-{name}.log",
                    env={**os.environ, progress.AS_JSON: "1"},
                    cwd=REPOSITORY,
                    on_line=heard,
                )
            finally:
                loop.call_soon_threadsafe(ended.set)

        work = Background(run)  # not a thread that the end of the gateway would wait for
        await ended.wait()
        work.wait()
        if status:
            text = "\n".join(errors) or f"doit {words[0]} ended with status {status}"
            raise PipelineError(text)


def _status(line: str) -> Object | None:
    """The progress that a line of a step's output reports; None for any other line."""
    if match := STEP.match(line):
        step = STATUS.get(match[1])
        return {"status": step} if step else None
    if not line.startswith("{"):
        return None
    try:
        transfer = msgspec.json.decode(line, type=_Transfer)
    except msgspec.DecodeError:
        return None
    counts: Object = {"total": transfer.total, "completed": transfer.done}
    if not transfer.digest:
        return {"status": "pulling", **counts}
    digest = f"sha256:{transfer.digest}"
    return {"status": f"pulling {transfer.digest[:12]}", "digest": digest, **counts}
