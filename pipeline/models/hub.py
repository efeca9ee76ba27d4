"""A repository's files as the hub lists them, or the user's Hugging Face cache, and where they are.

`repository` chooses a model among them, `fetch` downloads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from msgspec import Meta, Struct, field, json

from pipeline.core import bounded, log, network
from pipeline.core.bounded import Bound
from pipeline.core.download import Location, read_range
from pipeline.core.errors import PipelineError
from pipeline.core.parallel import within

from .contents import Readable, buffered
from .hub_access import AGAIN, Changed, endpoint, errors_explained
from .reference import Reference
from .resolve import ModelFile

ASK_TIMEOUT = 30  # seconds without a byte, for the list of a whole repository
# The list of 10,000 files, more than any model has, takes 3 MB.
LIST = Bound(bytes=16 * 1024 * 1024, seconds=120)
MOST_FILES = 50_000
LONGEST_LOOK_UP = 600  # seconds; a client over its rate limit waits up to 300 for the next window
FIRST_READ = 256 * 1024  # bytes; the headers of most safetensors files are shorter


class Listing(Struct, frozen=True, kw_only=True):
    """One commit of a repository. `parameters` counts the weights by element type, where known."""

    repo: str  # as the hub spells it today
    commit: str
    files: Mapping[str, ModelFile]
    parameters: Mapping[str, int] = field(default_factory=dict)
    gated: bool = False


class LargeFile(Struct):
    """What the hub says of a large file."""

    sha256: str


class RepositoryFile(Struct, rename={"blob_id": "blobId"}):
    """A file in the hub's answer. `size` is refused later, when such a file is chosen."""

    rfilename: Annotated[str, Meta(max_length=4096)]
    size: Any = None
    blob_id: str | None = None
    lfs: LargeFile | None = None


class CountedWeights(Struct):
    """The weights in safetensors, counted by element type."""

    parameters: dict[str, int]


class Repository(Struct):
    """What is read of the hub's answer about a repository."""

    id: Annotated[str, Meta(pattern=r"(?a)\A(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?\Z")]
    sha: Annotated[str, Meta(pattern=r"\A[0-9a-f]{40}\Z")]
    siblings: list[RepositoryFile] | None = None
    safetensors: CountedWeights | None = None
    gated: Any = False


def ask(reference: Reference) -> Listing:
    """The repository's files at the requested revision. Raises PipelineError."""
    _quiet()
    log.info(f"asking the hub about {reference.repo}")
    with errors_explained(reference.repo, reference.revision):
        info = _repository(reference)
    if info.id != reference.repo:
        log.info(f"{reference.repo} is called {info.id} now")
    listed = info.siblings or []
    if len(listed) > MOST_FILES:
        raise PipelineError(
            f"{info.id}: has {len(listed):,} files, and at most {MOST_FILES:,} are read",
            "download the model's files into a folder, and pass that: model=FOLDER",
        )
    files = {
        file.rfilename: ModelFile(
            file.rfilename,
            file.size if type(file.size) is int else -1,  # refused when the file is chosen
            file.lfs.sha256 if file.lfs else "",
            file.blob_id or "",
        )
        for file in listed
    }
    return Listing(
        repo=info.id,
        commit=info.sha,
        files=files,
        parameters=info.safetensors.parameters if info.safetensors else {},
        gated=bool(info.gated),
    )


def _repository(reference: Reference) -> Repository:
    """The hub's answer. The library's own `model_info` reads answers of any length, and takes 600
    bytes for each file. Raises what the library and its client raise."""
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        validate_repo_id,
    )

    validate_repo_id(reference.repo)
    revision = f"/revision/{quote(reference.revision, safe='')}" if reference.revision else ""
    answer = bounded.get(
        client(),
        f"{constants.ENDPOINT}/api/models/{reference.repo}{revision}",
        LIST,
        params={"blobs": True},
        headers=build_hf_headers(),
        timeout=ASK_TIMEOUT,
    )
    hf_raise_for_status(answer)
    return json.decode(answer.content, type=Repository)


def _quiet() -> None:
    """Silence the library's warnings: their URLs may contain the password of HF_ENDPOINT."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def client() -> Any:
    """huggingface_hub's own HTTP client, with the user's proxy and certificates."""
    network.check()
    from huggingface_hub import get_session

    return bounded.client(get_session())


def timeout() -> float:
    """Seconds without a byte after which a connection counts as dead."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def locate(repo: str, commit: str, file: ModelFile) -> Location:
    """Where the bytes of a file are right now. Raises PipelineError.

    The token is among the headers only where the hub itself serves the bytes: an address that it
    redirects to is signed, and another host's.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    _quiet()
    with errors_explained(repo, commit, file.name):
        url = hf_hub_url(repo, file.name, revision=commit)
        try:
            metadata = within(
                LONGEST_LOOK_UP,
                lambda: get_hf_file_metadata(url, timeout=timeout(), retry_on_errors=True),
            )
        except TimeoutError:
            raise PipelineError(
                f"{repo}: {file.name} was not located within {LONGEST_LOOK_UP} s: the hub keeps "
                "asking to wait, or does not end its answer",
                f"run the same command again, later{network.through(endpoint())}",
            ) from None
    if metadata.size is not None and metadata.size != file.size:
        raise Changed(
            f"{repo}: {file.name} has {file.size} bytes in the hub's list and {metadata.size} when "
            "it is requested",
            AGAIN,
        )
    # A mirror may have etags of its own, of another form or of small files; all bytes are hashed.
    etag = metadata.etag or ""
    if file.sha256 and len(etag) == len(file.sha256) and etag != file.sha256:
        raise Changed(
            f"{repo}: {file.name} is {etag} now and was {file.sha256} when it was resolved",
            AGAIN,
        )
    is_hub = urlsplit(metadata.location)[:2] == urlsplit(url)[:2]
    headers = build_hf_headers()
    if not is_hub:
        headers.pop("authorization", None)
    return Location(url=metadata.location, headers=headers)


def readable(repo: str, commit: str, file: ModelFile) -> Readable:
    """A file on the hub. Its address and the bytes read from its start are kept."""

    @cache
    def location() -> Location:
        return locate(repo, commit, file)

    def get(start: int, stop: int) -> bytes:
        return read_range(client(), file.name, location, start, stop, timeout=timeout())

    return buffered(Readable(name=file.name, size=file.size, read=get), FIRST_READ)


def cached(reference: Reference) -> Listing | None:
    """What the user's Hugging Face cache holds of a repository; no network is used.

    None where it holds none, or without links, which name the files' hashes.
    """
    top = cache_folder(reference.repo)
    revision = reference.revision or "main"
    try:
        pointer = top / "refs" / revision
        if ".." in revision.split("/"):
            return None
        commit = pointer.read_text(encoding="ascii").strip() if pointer.is_file() else revision
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            return None
        snapshot = top / "snapshots" / commit
        files = {}
        for path in sorted(snapshot.rglob("*")):
            if path.is_symlink() and path.is_file():
                blob, name = path.resolve().name, path.relative_to(snapshot).as_posix()
                sha256 = blob if len(blob) == 64 else ""
                files[name] = ModelFile(name, path.stat().st_size, sha256, "" if sha256 else blob)
    except (OSError, ValueError):
        return None
    return Listing(repo=reference.repo, commit=commit, files=files) if files else None


def cached_file(repo: str, file: ModelFile) -> Path:
    """Where the Hugging Face cache has a file, or would have it."""
    return cache_folder(repo) / "blobs" / (file.sha256 or file.blob)


def cache_folder(repo: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
