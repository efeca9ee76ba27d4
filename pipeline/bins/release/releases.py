"""Upstream's releases: which one is meant, what of it is needed, and the download of that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct, to_builtins

from pipeline.bins.build_options import LATEST, TAG
from pipeline.core import log, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store import hashing
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import (
    full_disk_is_an_error,
    part,
    publish_file,
    publish_text,
    require_space,
)

from . import github
from .assets import Asset, Choice, NoMatchError, kind, matching

if TYPE_CHECKING:
    import httpx2

# Upstream's versions (v0.5.0) hold no programs: this file names the build (b11146) that does.
POINTER = "nightly-tag.txt"
LISTED = 30  # releases looked through for the latest; upstream makes several a day
MOST_ASSET_BYTES = 16 * 1024**3
NAME = r"\w[\w.+-]{0,198}"

Driver = Callable[[], "tuple[int, int] | None"]
T = TypeVar("T")


class Release(Struct, frozen=True, kw_only=True):
    """A release, by the tag that it really has, and what was chosen of it."""

    tag: str
    choice: Choice


class PublishedRelease(Struct, frozen=True, kw_only=True):
    """A release as the API tells it; `assets` are the whole ones."""

    tag: str
    draft: bool
    assets: tuple[Asset, ...]


def find(release: str, platform: str, backend: str, driver_cuda: Driver) -> Release:
    """Ask for a release, and choose of it. Raises PipelineError."""
    log.info(f"asking for llama.cpp's release {release}")
    with github.client() as client:
        if release == LATEST:
            listed = _read(github.ask(client, f"releases?per_page={LISTED}"), _list)
        else:
            listed = [_by_tag(client, release)]
    driver = driver_cuda() if backend == "cuda" else None
    chosen = _first(listed, platform, backend, driver)
    for asset in chosen.choice.assets:
        _ = asset.sha256  # refused now, not after a download
    return chosen


def _by_tag(client: httpx2.Client, tag: str) -> PublishedRelease:
    """The release of that tag, or the build that it points to."""
    release = _tagged(client, tag)
    pointer = next((asset for asset in release.assets if asset.name == POINTER), None)
    if pointer is None:
        return release
    build = _pointed(client, pointer)
    log.info(f"llama.cpp {tag} is the build {build}")
    return _tagged(client, build)


def _tagged(client: httpx2.Client, tag: str) -> PublishedRelease:
    try:
        release = _read(github.ask(client, f"releases/tags/{tag}"), _listed)
    except github.MissingError as error:
        raise UsageError(
            f"release={tag}: llama.cpp has no such release ({error.message})",
            f"{LATEST}, or a tag of https://github.com/{github.UPSTREAM}/releases",
        ) from None
    if release.tag != tag:
        raise github.strange(f"it is about {release.tag}, and {tag} was asked")
    return release


def _pointed(client: httpx2.Client, pointer: Asset) -> str:
    from pipeline.core.download import Location, read_range

    location = Location(url=pointer.url)
    size = min(pointer.size, 1000)
    data = read_range(client, POINTER, lambda: location, 0, size, timeout=github.TIMEOUT)
    tag = data.decode("ascii", "replace").strip()
    if hashlib.sha256(data).hexdigest() != pointer.sha256 or not re.fullmatch(TAG, tag, re.ASCII):
        raise PipelineError(
            f"{POINTER}: does not hold the tag of a build",
            "name the build itself, such as release=b10605",
        )
    return tag


def _first(
    listed: Sequence[PublishedRelease], platform: str, backend: str, driver: tuple[int, int] | None
) -> Release:
    """The first that has what is asked for: files arrive one by one after a release is made.

    Upstream calls each of its builds a prerelease, so that says nothing here.
    """
    problem: PipelineError | None = None
    for release in listed:
        if release.draft or not any(map(kind, release.assets)):
            continue
        try:
            choice = matching(release.assets, platform, backend, driver)
            return Release(tag=release.tag, choice=choice)
        except NoMatchError as error:
            problem = problem or PipelineError(f"{release.tag} {error.message}", error.hint)
    newest = listed[0].tag if listed else "upstream"
    raise problem or PipelineError(
        f"{newest} has no archive of programs (yet)",
        "take another release (release=…), or build it: bins=build",
    )


# What the API answers, which could be anything


def _read(data: bytes, form: Callable[[Any], T]) -> T:
    try:
        return form(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise github.strange(type(error).__name__) from None


def _list(data: Any) -> list[PublishedRelease]:
    if not isinstance(data, list):
        raise TypeError
    return [_listed(entry) for entry in data]


def _listed(data: Any) -> PublishedRelease:
    if not re.fullmatch(TAG, data["tag_name"], re.ASCII):
        raise ValueError
    assets = tuple(_asset(entry) for entry in data["assets"] if _is_whole(entry))
    return PublishedRelease(tag=data["tag_name"], draft=data.get("draft") is True, assets=assets)


def _is_whole(entry: Any) -> bool:
    """Whether a file is there, under a name that a file can have anywhere."""
    sound = re.fullmatch(NAME, entry["name"], re.ASCII) is not None
    return sound and entry.get("state", "uploaded") == "uploaded"


def _asset(entry: Any) -> Asset:
    size, url, digest = entry["size"], entry["browser_download_url"], entry.get("digest")
    if type(size) is not int or not 0 <= size <= MOST_ASSET_BYTES:
        raise ValueError
    schemes = ("https",) if github.api().startswith("https:") else ("https", "http")
    if urlsplit(url).scheme not in schemes or not isinstance(digest, str | None):
        raise ValueError
    return Asset(name=entry["name"], size=size, digest=digest or "", url=url)


# What was found out


def store(record: Path, release: Release) -> None:
    """Keep it for the next run."""
    publish_text(record, json.dumps(to_builtins(release), indent=1) + "\n")


def stored(record: Path) -> Release | None:
    """What was kept; an unreadable record is reported and counts as none."""
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        programs, runtime = data["choice"]["programs"], data["choice"]["runtime"]
        choice = Choice(programs=Asset(**programs), runtime=Asset(**runtime) if runtime else None)
        return Release(tag=data["tag"], choice=choice)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.info(f"{record}: not readable ({type(error).__name__}); treated as absent")
        return None


# The files


def cached(asset: Asset, home: paths.Home) -> Path:
    """Where the file is, or would be, kept for all checkouts."""
    return paths.cache(home) / "archives" / asset.sha256[:16] / asset.name


def fetch(asset: Asset, home: paths.Home, *, offline: bool = False) -> Path:
    """The file, downloaded unless the cache has it, and with the digest told.

    The cached file is hashed each time: this runs only when its content is about to be used.
    Raises PipelineError.
    """
    from pipeline.core.download import Content, Downloads, Location, bytes_kept, discard

    target = cached(asset, home)
    paths.require_writable(target.parent)
    with full_disk_is_an_error(target.parent), only_one(target):
        if target.exists() and hashing.sha256(target) == asset.sha256:
            return target
        if offline:
            raise PipelineError(
                f"{asset.name}: is not in {target.parent}, and offline=1 forbids downloading it",
                "run once without offline=1, or put it there by hand",
            )
        made = part(target)
        require_space(target.parent, asset.size - bytes_kept(made))
        content = Content(size=asset.size, sha256=asset.sha256)
        location = Location(url=asset.url)
        title, timeout = f"fetching {asset.name}", github.TIMEOUT
        with (
            github.client() as client,
            Downloads(client, title=title, total=asset.size, timeout=timeout) as downloads,
        ):
            downloads.get(asset.name, content, lambda: location, made)
        publish_file(made, target)
        discard(made)
    return target
