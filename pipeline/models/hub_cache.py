"""The user's Hugging Face cache: what it holds of a repository, and where."""

from __future__ import annotations

import re
from pathlib import Path

from .hub import Listing
from .reference import Reference
from .resolve import ModelFile


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
