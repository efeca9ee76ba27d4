"""Models from Hugging Face, through huggingface_hub: what a repository holds, and its files."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.core import artifacts
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.hashing import sha256
from pipeline.core.paths import Home
from pipeline.core.publish import remove
from pipeline.core.say import say
from pipeline.core.say import size as shown_size

from .gguf import SHARD
from .reference import Reference
from .resolve import SIDE_FILES, File, Resolved, slug
from .safetensors import own_precision


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
    kind: Literal["gguf", "safetensors"] = "gguf" if ggufs or filename else "safetensors"
    if kind == "gguf":
        chosen = parts(choose(ggufs, files, filename, quant, reference.text), files)
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
    for name in chosen:
        require_safe(name, reference.repo)
    named = f"{slug(reference.repo)}__{info.sha[:12]}"
    return Resolved(
        kind=kind,
        name=reference.repo.split("/")[1],
        slug=named,
        folder=home.models / ("gguf" if kind == "gguf" else "source") / named,
        local=False,
        source={"type": "hf", "ref": reference.repo, "revision": info.sha},
        files=tuple(files[name] for name in chosen),
        precision=own_precision(Counter(info.safetensors.parameters))
        if info.safetensors
        else "BF16",
    )


def choose(
    ggufs: list[str], files: dict[str, File], filename: str, quant: str, asked: str
) -> str:
    """The one GGUF file that is meant. Raises PipelineError that lists what there is."""
    models = [name for name in ggufs if is_model(name)]
    if filename:
        found = [filename] if filename in ggufs else []
    elif not quant and len(models) == 1:
        found = models
    else:
        wanted = quant or "Q4_K_M"
        pattern = re.compile(rf"(^|[^a-z0-9]){re.escape(wanted)}([^a-z0-9_]|$)", re.IGNORECASE)
        found = [name for name in models if pattern.search(PurePosixPath(name).name)]
    if len(found) == 1:
        return found[0]
    listing = "\n".join(f"  {name}  {shown_size(files[name].size)}" for name in sorted(ggufs))
    what = filename or quant or "Q4_K_M, the default"
    raise PipelineError(
        f"{asked}: {len(found) or 'no'} GGUF files match {what}; there are:\n{listing}",
        "name one: filename=…",
    )


def is_model(name: str) -> bool:
    """Whether a GGUF is a model by its name: no projector, and no later part of another file."""
    file = PurePosixPath(name).name
    part = SHARD.fullmatch(file)
    return not file.lower().startswith("mmproj") and (not part or int(part["number"]) == 1)


def parts(first: str, files: Mapping[str, File]) -> list[str]:
    """All files of the model whose first file is `first`. Raises PipelineError."""
    match = SHARD.fullmatch(PurePosixPath(first).name)
    if not match or int(match["count"]) == 0:
        return [first]
    count, folder = int(match["count"]), PurePosixPath(first).parent
    names = [f"{match['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    paths = [(folder / name).as_posix() for name in names]
    missing = [path for path in paths if path not in files]
    if missing:
        raise PipelineError(f"{first}: the repository lacks parts of it: {', '.join(missing[:3])}")
    return paths


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


def fetch(resolved: Resolved, *, offline: bool = False) -> None:
    """Download what is missing, each file checked before it is published."""
    for file in resolved.files:
        artifacts.make(
            resolved.folder / file.name,
            resolved.fetch_recipe(file),
            lambda made, file=file: _download(resolved, file, made, offline),  # type: ignore[misc]
            need=file.size,
            source=resolved.source,
        )


def _download(resolved: Resolved, file: File, made: Path, offline: bool) -> None:
    if offline:
        raise PipelineError(
            f"{resolved.name}: {file.name} is not here, and offline=1 forbids to fetch it",
            "run once without offline=1",
        )
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
