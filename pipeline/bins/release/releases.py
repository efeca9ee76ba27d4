"""Upstream's releases: which one is meant, what of it is needed, and the download of that."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct, json, to_builtins

from pipeline.bins.build_options import LATEST, TAG
from pipeline.core import log, packages, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store import json_file
from pipeline.core.store.publish import part, require_space

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


class Release(Struct, frozen=True, kw_only=True):
    """A release, by the tag that it really has, and what was chosen of it."""

    tag: str
    choice: Choice


class PublishedAsset(Struct, frozen=True, kw_only=True):
    """A file of a release, as the API describes it. It could be anything."""

    name: str
    size: Annotated[int, Meta(ge=0, le=MOST_ASSET_BYTES)]
    browser_download_url: str
    digest: str | None = None
    state: str = "uploaded"

    def __post_init__(self) -> None:
        schemes = ("https",) if github.api().startswith("https:") else ("https", "http")
        if urlsplit(self.browser_download_url).scheme not in schemes:
            raise ValueError("not a download address")


class PublishedRelease(Struct, frozen=True, kw_only=True):
    """A release, as the API describes it."""

    tag_name: Annotated[str, Meta(pattern=rf"(?a)\A(?:{TAG})\Z")]
    assets: tuple[PublishedAsset, ...]
    draft: bool = False

    def uploaded(self) -> list[Asset]:
        """The complete files whose names are valid on any system."""
        return [
            Asset(name=a.name, size=a.size, digest=a.digest or "", url=a.browser_download_url)
            for a in self.assets
            if a.state == "uploaded" and re.fullmatch(NAME, a.name, re.ASCII)
        ]


def find(release: str, platform: str, backend: str, driver_cuda: Driver) -> Release:
    """Ask for a release, and choose of it. Raises PipelineError."""
    log.info(f"asking for llama.cpp's release {release}")
    with github.client() as client:
        if release == LATEST:
            listed = github.ask(client, f"releases?per_page={LISTED}", list[PublishedRelease])
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
    pointer = next((asset for asset in release.uploaded() if asset.name == POINTER), None)
    if pointer is None:
        return release
    build = _pointed(client, pointer)
    log.info(f"llama.cpp {tag} is the build {build}")
    return _tagged(client, build)


def _tagged(client: httpx2.Client, tag: str) -> PublishedRelease:
    try:
        release = github.ask(client, f"releases/tags/{tag}", PublishedRelease)
    except github.MissingError as error:
        raise UsageError(
            f"release={tag}: llama.cpp has no such release ({error.message})",
            f"{LATEST}, or a tag of https://github.com/{github.UPSTREAM}/releases",
        ) from None
    if release.tag_name != tag:
        raise github.strange(f"it is about {release.tag_name}, not {tag}")
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
    """The first that has the requested programs: files are uploaded one by one after the release.

    Upstream marks each of its builds as a prerelease, so that is ignored.
    """
    problem: PipelineError | None = None
    for release in listed:
        assets = release.uploaded()
        if release.draft or not any(map(kind, assets)):
            continue
        try:
            choice = matching(assets, platform, backend, driver)
            return Release(tag=release.tag_name, choice=choice)
        except NoMatchError as error:
            problem = problem or PipelineError(f"{release.tag_name} {error.message}", error.hint)
    newest = listed[0].tag_name if listed else "upstream"
    raise problem or PipelineError(
        f"{newest} has no archive of programs (yet)",
        "take another release (release=…), or build it: bins=build",
    )


def store(record: Path, release: Release) -> None:
    """Keep what was looked up for the next run."""
    json_file.write(record, to_builtins(release), indent=1)


def stored(record: Path) -> Release | None:
    """What `store` kept; an unreadable record is reported and counts as none."""
    try:
        return json.decode(record.read_bytes(), type=Release)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.info(f"{record}: not readable ({error}); treated as absent")
        return None


# The files


def cached(asset: Asset, home: paths.Home) -> Path:
    """Where the file is, or would be, kept for all checkouts."""
    return paths.cache(home) / "archives" / asset.sha256[:16] / asset.name


def fetch(asset: Asset, home: paths.Home, *, offline: bool = False) -> Path:
    """The file, downloaded unless the cache has it. Raises PipelineError."""
    from pipeline.core.download import Content, Downloads, Location, bytes_kept, discard

    target = cached(asset, home)

    def download(made: Path) -> None:
        require_space(made.parent, asset.size - bytes_kept(made))
        content = Content(size=asset.size, sha256=asset.sha256)
        location = Location(url=asset.url)
        title, timeout = f"fetching {asset.name}", github.TIMEOUT
        with (
            github.client() as client,
            Downloads(client, title=title, total=asset.size, timeout=timeout) as downloads,
        ):
            downloads.get(asset.name, content, lambda: location, made)

    packages.keep(target, asset.sha256, download, offline=offline)
    discard(part(target))
    return target
