"""Other revisions of llama.cpp: which commit a name means, and its files.

The submodule's git has both, where it is checked out and that commit was fetched; else GitHub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from msgspec import Meta, Struct

from pipeline.bins.build_options import LATEST
from pipeline.bins.release import github
from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store.publish import remove

from . import git_tree
from .active import Revision

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = 1024**3  # of an archive; today's have 40 MB
COMMIT = re.compile(r"(?!b\d{1,8}$)[0-9a-f]{7,40}")  # b123456 is a tag
WHAT = "llama.cpp's commits"
TAGS = f"https://github.com/{github.UPSTREAM}/tags"
LISTED = 100  # releases among which the nearest names are looked for
SHOWN = 3
SHA1 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{40}\Z")]


class Tree(Struct, frozen=True):
    sha: SHA1


class Person(Struct, frozen=True):
    date: str


class CommitDetails(Struct, frozen=True):
    tree: Tree
    committer: Person | None = None


class PublishedCommit(Struct, frozen=True):
    """A commit, as GitHub's API describes it."""

    sha: SHA1
    commit: CommitDetails


class Tagged(Struct, frozen=True):
    """A release, as far as its name goes."""

    tag_name: str
    draft: bool = False


def find(name: str) -> Revision:
    """The revision that GitHub has for a tag, branch or commit (of seven digits at least), or for
    `latest`. Raises UsageError where there is none, PipelineError where GitHub does not answer."""
    with github.client() as client:
        if name == LATEST:
            name = next(iter(_tags(client, 10)), "")
            if not name:
                raise PipelineError(f"{github.UPSTREAM} has no release", "name a tag or a commit")
        try:
            path = f"commits/{quote(name, safe='')}"
            commit = github.ask(client, path, PublishedCommit, WHAT)
        except github.MissingError as error:
            with suppress(PipelineError):  # the names are a help, no more
                near = nearest(name, _tags(client, LISTED))
                error.hint = f"{near}to=latest is the newest; all: {TAGS}"
            raise UsageError(
                f"to={name}: llama.cpp has no such tag, branch or commit ({error.message})",
                error.hint or f"all tags: {TAGS}",
            ) from None
    if COMMIT.fullmatch(name) and not commit.sha.startswith(name):
        raise github.strange(f"{commit.sha} for {name}", WHAT)
    date = commit.commit.committer.date[:10] if commit.commit.committer else ""
    return Revision(
        commit=commit.sha,
        tree=commit.commit.tree.sha,
        name="" if commit.sha.startswith(name) else name,
        date=date if re.fullmatch(r"[\d-]{10}", date, re.ASCII) else "",
    )


def _tags(client: httpx2.Client, count: int) -> list[str]:
    """The tags of the newest releases, upstream's prereleases among them: each build is one."""
    listed = github.ask(client, f"releases?per_page={count}", list[Tagged], WHAT)
    return [release.tag_name for release in listed if not release.draft]


def nearest(name: str, tags: list[str]) -> str:
    """The tags that are most like `name`, or nearest by number, as the beginning of a hint."""
    import difflib

    number = re.fullmatch(r"b(\d{1,9})", name)
    numbered = {int(tag[1:]): tag for tag in tags if re.fullmatch(r"b\d{1,9}", tag, re.ASCII)}
    if number and numbered:
        order = sorted(numbered, key=lambda other: abs(other - int(number[1])))
        near = [numbered[each] for each in order[:SHOWN]]
    else:
        near = difflib.get_close_matches(name, tags, n=SHOWN, cutoff=0.5)
    return f"nearest: {', '.join(near)}; " if near else ""


def in_submodule(name: str, submodule: Path) -> Revision | None:
    """The commit or tag, where the submodule is checked out and its git has it. A branch there may
    be old, and is not taken."""
    if name == LATEST or not (submodule / ".git").exists():
        return None
    for ref in ([name] if COMMIT.fullmatch(name) else []) + [f"refs/tags/{name}"]:
        commit = _git(submodule, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if commit:
            shown = _git(submodule, "log", "-1", "--format=%T %cs", commit) or ""
            tree, _, date = shown.partition(" ")
            return Revision(
                commit=commit, tree=tree, name="" if commit.startswith(name) else name, date=date
            )
    return None


def _git(folder: Path, *words: str) -> str | None:
    """What git prints there; None where it fails."""
    status, output, _ = git_tree.git(folder, *words)
    return output.strip() if status == 0 else None


@contextmanager
def archive(
    revision: Revision, submodule: Path, made: Path, *, offline: bool = False
) -> Iterator[Path]:
    """A tar file of the revision's files, at the path `made` until the end of the block. Call it
    under the lock of the source. Raises PipelineError."""
    try:
        if (submodule / ".git").exists() and None is not _git(
            submodule, "archive", "--prefix=llama.cpp/", f"--output={made}", revision.commit
        ):
            yield made
            return
        if offline:
            raise PipelineError(
                f"the source of llama.cpp {revision} is not here, and offline=1 forbids "
                "downloading it",
                "run once without offline=1",
            )
        log.info(f"downloading the source of llama.cpp {revision}")
        with github.client() as client, made.open("wb") as file:
            try:
                github.download(client, f"tarball/{revision.commit}", file, MOST_BYTES)
            except github.MissingError as error:
                raise PipelineError(
                    f"there is no archive of llama.cpp {revision} ({error.message})",
                    "take another commit: this one may have been removed",
                ) from None
        yield made
    finally:
        remove(made)
