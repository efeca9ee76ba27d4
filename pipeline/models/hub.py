"""Models from Hugging Face, through huggingface_hub: what a repository holds, and its files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core import artifacts
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.hashing import sha256
from pipeline.core.paths import Home
from pipeline.core.publish import remove
from pipeline.core.say import say
from pipeline.core.say import size as shown_size

from .reference import Reference
from .resolve import SIDE_FILES, File, Resolved, slug


def resolve(reference: Reference, filename: str, quant: str, home: Home) -> Resolved:
    """Ask the hub which files of which commit are meant. Raises PipelineError."""
    say(f"asking the hub about {reference.repo}")
    info = _model_info(reference)
    files = {
        sibling.rfilename: File(
            sibling.rfilename,
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else "",
            sibling.blob_id or "",
        )
        for sibling in info.siblings or []
    }
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    chosen: Iterable[str]
    if ggufs or filename:
        chosen = [choose(ggufs, files, filename, reference.quant or quant, reference.text)]
        kind = "gguf"
    else:
        weights = [name for name in files if fnmatch(name, "*.safetensors") and "/" not in name]
        if not weights:
            raise PipelineError(
                f"{reference.repo}: has neither GGUF nor safetensors files",
                "pickled weights are not used: they run code when they are read",
            )
        beside = [
            name
            for name in files
            if not PurePosixPath(name).name.startswith(".")
            and any(fnmatch(name, pattern) for pattern in SIDE_FILES)
        ]
        chosen = sorted({*weights, *beside})
        kind = "safetensors"
    for name in chosen:
        require_safe(name, reference.repo)
    named = f"{slug(reference.repo)}__{info.sha[:12]}"
    return Resolved(
        kind="gguf" if kind == "gguf" else "safetensors",
        name=reference.repo.split("/")[1],
        slug=named,
        folder=home.models / ("gguf" if kind == "gguf" else "source") / named,
        local=False,
        source={"type": "hf", "ref": reference.repo, "revision": info.sha},
        files=tuple(files[name] for name in chosen),
        precision="BF16",
    )


def choose(
    ggufs: list[str], files: dict[str, File], filename: str, quant: str, asked: str
) -> str:
    """The one GGUF file that is meant. Raises PipelineError that lists what there is."""
    if filename:
        found = [filename] if filename in ggufs else []
    else:
        wanted = quant or "Q4_K_M"
        pattern = re.compile(rf"(^|[^a-z0-9]){re.escape(wanted)}([^a-z0-9_]|$)", re.IGNORECASE)
        found = [
            name
            for name in ggufs
            if pattern.search(PurePosixPath(name).name)
            and not PurePosixPath(name).name.lower().startswith("mmproj")
        ]
    if len(found) == 1:
        return found[0]
    listing = "\n".join(f"  {name}  {shown_size(files[name].size)}" for name in sorted(ggufs))
    what = filename or quant or "Q4_K_M, the default"
    raise PipelineError(
        f"{asked}: {len(found) or 'no'} GGUF files match {what}; there are:\n{listing}",
        "name one: filename=…",
    )


def require_safe(name: str, repo: str) -> None:
    """Refuse a file name that could be written anywhere but below the model's folder."""
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        # a leading dot is how the pipeline's own files beside the model are named
        or any(not part or part.startswith((".", " ")) or part.endswith((".", " ")) for part in parts)
    ):
        raise PipelineError(f"{repo}: has a file named {name!r}, which is not safe to write")


def fetch(resolved: Resolved) -> None:
    """Download what is missing, each file checked before it is published."""
    for file in resolved.files:
        artifacts.make(
            resolved.folder / file.name,
            resolved.fetch_recipe(file),
            lambda made, file=file: _download(resolved, file, made),  # type: ignore[misc]
            need=file.size,
            source=resolved.source,
        )


def _download(resolved: Resolved, file: File, made: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    folder = made.with_name(made.name + ".d")
    say(f"downloading {file.name} ({shown_size(file.size)})")
    try:
        got = hf_hub_download(
            str(resolved.source["ref"]),
            file.name,
            revision=str(resolved.source["revision"]),
            local_dir=folder,
        )
    except GatedRepoError:
        raise _gated(str(resolved.source["ref"])) from None
    except Exception as error:  # the client's own, its HTTP library's, the system's
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PipelineError(
            f"{file.name}: could not be downloaded: {error}", "run the same command again"
        ) from None
    else:
        found = sha256(Path(got))
        if file.sha256 and found != file.sha256:
            raise PipelineError(
                f"{file.name}: sha256 is {found}, the hub says {file.sha256}",
                "run the same command again; nothing was published",
            )
        Path(got).replace(made)
    finally:
        remove(folder)


def _model_info(reference: Reference) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = reference.repo
    try:
        return HfApi().model_info(
            repo, revision=reference.revision or None, files_metadata=True, timeout=30
        )
    except GatedRepoError:
        raise _gated(repo) from None
    except RevisionNotFoundError:
        raise PipelineError(f"{repo}: has no revision {reference.revision!r}") from None
    except RepositoryNotFoundError:
        raise PipelineError(
            f"{repo}: there is no such repository, or it is private",
            "check the name; for a private one set HF_TOKEN",
        ) from None
    except OfflineModeIsEnabled:
        raise PipelineError(
            f"{repo}: is not resolved yet, and HF_HUB_OFFLINE forbids to ask",
            "run once with the network, or give a path",
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{repo}: is no name of a repository: {error}") from None
    except Exception as error:  # the client's own, its HTTP library's, the system's
        raise PipelineError(
            f"{repo}: the hub could not be asked: {type(error).__name__}: {error}",
            f"check the network and {_endpoint()}",
        ) from None


def _gated(repo: str) -> PipelineError:
    return PipelineError(
        f"{repo}: its owner asks you to accept terms first",
        f"accept them on the model's page ({_endpoint()}/{repo}) and set HF_TOKEN",
    )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
