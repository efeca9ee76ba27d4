"""What the hub says of a repository and its files, through huggingface_hub; each failure as an
error of its own. Models are chosen from it in `repository`, files are fetched in `fetch`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.download import Location, read_range
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.say import say, size

from .reference import Reference
from .resolve import File
from .skeleton import Readable

ASK_TIMEOUT = 30  # seconds, for one question about a whole repository
FIRST_READ = 256 * 1024  # bytes; the headers of most safetensors files are shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One commit of a repository. `parameters` counts them by element type, where it is known."""

    repo: str  # as the hub spells it today
    commit: str
    files: Mapping[str, File]
    parameters: Mapping[str, int] = field(default_factory=dict)
    gated: bool = False


PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
AGAIN = "run the same command again: the hub is asked anew"


class Changed(PipelineError):
    """What the hub says now contradicts what it said before: it has to be asked again."""


def is_offline() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.strip().upper() in ("1", "ON", "YES", "TRUE")


def check_environment() -> None:
    """Raise UsageError for what huggingface_hub would stumble over when it is imported."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name, "10")
        if not re.fullmatch(r"[0-9]{1,6}", value.strip()) or not int(value):
            raise UsageError(f"{name}={value}: must be a number of seconds", "or leave it unset")
    if not os.environ.get("HF_TOKEN", "").strip().isascii():
        raise UsageError("HF_TOKEN: holds letters that no token has", "copy it anew")
    if not os.environ.get("HF_ENDPOINT", " ").strip():
        os.environ.pop("HF_ENDPOINT", None)  # set to nothing means not set; the library differs
    try:
        parts = urlsplit(endpoint())
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError("HF_ENDPOINT: is no address of a hub", "https://HOST, or leave it unset")


def ask(reference: Reference) -> Listing:
    """What the repository holds at the revision asked for. Raises PipelineError."""
    from huggingface_hub import HfApi

    _quiet()
    say(f"asking the hub about {reference.repo}")
    with told(reference.repo, reference.revision):
        info = HfApi().model_info(
            reference.repo,
            revision=reference.revision or None,
            files_metadata=True,
            timeout=ASK_TIMEOUT,
        )
    if info.id and info.id != reference.repo:
        say(f"{reference.repo} is {info.id} today")
    files = {
        str(sibling.rfilename): File(
            str(sibling.rfilename),
            sibling.size if type(sibling.size) is int else -1,  # refused where the file is chosen
            str(sibling.lfs.sha256) if sibling.lfs else "",
            str(sibling.blob_id or ""),
        )
        for sibling in info.siblings or []
    }
    return Listing(
        repo=info.id or reference.repo,
        commit=str(info.sha),
        files=files,
        parameters=info.safetensors.parameters if info.safetensors else {},
        gated=bool(info.gated),
    )


def cached(reference: Reference) -> Listing | None:
    """The same from the user's Hugging Face cache, without network: the files that it holds.

    None where it holds none, or where its files do not tell what they are (no links).
    """
    top = cache_folder(reference.repo)
    named = reference.revision or "main"
    try:
        pointer = top / "refs" / named
        if ".." in named.split("/"):
            return None
        commit = pointer.read_text(encoding="ascii").strip() if pointer.is_file() else named
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            return None
        snapshot = top / "snapshots" / commit
        files = {}
        for path in sorted(snapshot.rglob("*")):
            if path.is_symlink() and path.is_file():
                blob, name = path.resolve().name, path.relative_to(snapshot).as_posix()
                sha256 = blob if len(blob) == 64 else ""
                files[name] = File(name, path.stat().st_size, sha256, "" if sha256 else blob)
    except (OSError, ValueError):
        return None
    return Listing(repo=reference.repo, commit=commit, files=files) if files else None


def cached_file(repo: str, file: File) -> Path:
    """Where the Hugging Face cache has a file, or would have it."""
    return cache_folder(repo) / "blobs" / (file.sha256 or file.blob)


def cache_folder(repo: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _quiet() -> None:
    """The library's warnings name addresses, in which HF_ENDPOINT may have a password."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def client() -> Any:
    """huggingface_hub's own HTTP client, with the user's proxy and certificates."""
    from huggingface_hub import get_session

    return get_session()


def timeout() -> float:
    """Seconds without a byte after which a connection counts as dead."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def locate(repo: str, commit: str, file: File) -> Location:
    """Where the bytes of a file are right now. Raises PipelineError.

    The token is among the headers only where the hub itself has the bytes: the address that it
    redirects to is signed, and another host.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    _quiet()
    with told(repo, commit, file.name):
        url = hf_hub_url(repo, file.name, revision=commit)
        seen = get_hf_file_metadata(url, timeout=timeout(), retry_on_errors=True)
    expected = file.sha256 or file.blob
    if seen.size is not None and seen.size != file.size:
        raise Changed(
            f"{repo}: the hub's list gives {file.name} {file.size} bytes, the file's own answer "
            f"{seen.size}",
            AGAIN,
        )
    if expected and seen.etag and seen.etag != expected:
        raise Changed(
            f"{repo}: {file.name} is {seen.etag} now, and was {expected} when it was resolved",
            AGAIN,
        )
    ours = urlsplit(seen.location)[:2] == urlsplit(url)[:2]
    headers = build_hf_headers()
    if not ours:
        headers.pop("authorization", None)
    return Location(url=seen.location, headers=headers)


def readable(repo: str, commit: str, file: File) -> Readable:
    """A file on the hub to read the start of: what was read is kept, the address too."""
    kept = b""

    @cache
    def location() -> Location:
        return locate(repo, commit, file)

    def read(start: int, stop: int) -> bytes:
        nonlocal kept
        if stop > len(kept) >= start:  # onwards from what is known, and not in little steps
            until = min(file.size, max(stop, FIRST_READ))
            kept += read_range(client(), file.name, location, len(kept), until, timeout=timeout())
        if stop <= len(kept):
            return kept[start:stop]
        return read_range(client(), file.name, location, start, stop, timeout=timeout())

    return Readable(name=file.name, size=file.size, read=read)


@contextmanager
def told(repo: str, revision: str = "", name: str = "") -> Iterator[None]:
    """Turn the client's exceptions into errors that name the next step. Raises PipelineError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise PipelineError(
            f"{repo}: its owner asks you to accept terms first",
            f"accept them on the model's page ({endpoint()}/{repo}) and set HF_TOKEN to a token "
            "that may read it",
        ) from None
    except errors.RevisionNotFoundError:
        if name:  # it was there when the files were chosen
            raise Changed(f"{repo}: its commit {revision} is gone", AGAIN) from None
        raise UsageError(
            f"{repo}: has no revision {revision!r}",
            f"a branch, a tag or a commit: see {endpoint()}/{repo}/tree/main",
        ) from None
    except errors.RepositoryNotFoundError:
        token = "the token in use may not see it" if has_token() else "set HF_TOKEN"
        raise PipelineError(
            f"{repo}: there is no such repository, or it is private",
            f"check the name; for a private one {token}",
        ) from None
    except errors.EntryNotFoundError:
        raise Changed(
            f"{repo}: {name} is gone from the repository",
            AGAIN,
        ) from None
    except errors.OfflineModeIsEnabled:
        raise PipelineError(
            f"{repo}: HF_HUB_OFFLINE forbids to ask the hub", "run once with the network"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo}: is no name of a repository: {error}") from None
    except PipelineError:
        raise
    except Exception as error:  # the client's own, its HTTP library's, the system's
        raise _refused(repo, error) from None


def _refused(repo: str, error: Exception) -> PipelineError:
    """The error for an answer that has no exception of its own, or for no answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status == 401 and has_token():
        return PipelineError(
            f"{repo}: the hub does not know the token in use (status 401)",
            "HF_TOKEN, or what `hf auth login` stored, is mistyped or expired; make a new one at "
            f"{endpoint()}/settings/tokens",
        )
    if status == 403:
        return PipelineError(
            f"{repo}: the hub refuses access (status 403)",
            "a fine-grained token needs the right to read this repository",
        )
    if status == 429:
        return PipelineError(
            f"{repo}: the hub asks to slow down (status 429)",
            "wait some minutes; with HF_TOKEN set more is allowed",
        )
    if isinstance(error, (KeyError, TypeError, ValueError, RecursionError)):
        return PipelineError(
            f"{repo}: what {endpoint()} answers is not what a hub answers ({type(error).__name__})",
            "see HF_ENDPOINT, and whether a proxy or a login page answers in the hub's place",
        )
    what = f"it answered {status}" if status else type(error).__name__
    if (not status and isinstance(error, (OSError, ImportError))) or what == "ConnectError":
        what = f"{what}: {error}"  # the system's words; no address stands in them
    via = [n for n in PROXIES if os.environ.get(n)]
    return PipelineError(
        f"{repo}: the hub could not be asked: {what}",
        f"check the network and {endpoint()}{', ' * bool(via)}{' and '.join(via)}, then run the "
        "same command again",
    )


def has_token() -> bool:
    """Whether requests carry a token."""
    from huggingface_hub import get_token

    return bool(get_token())


def endpoint() -> str:
    """The hub's address as it may be shown: without a password."""
    text = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    return re.sub(r"//[^/@]*@", "//", text)


def shown(files: Mapping[str, File]) -> str:
    """Some of a repository's files, for an error message."""
    names = sorted(files, key=lambda name: files[name].size, reverse=True)
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name} ({size(files[name].size)})" for name in names[:5]) + rest
