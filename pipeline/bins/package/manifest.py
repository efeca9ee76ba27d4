"""`manifest.json` of a package, which is a stranger's: each file must be as it says, and named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.bins.build_options import TAG
from pipeline.core import log
from pipeline.core.errors import PipelineError

MANIFEST = "manifest.json"
SCHEMA = 1
MOST_BYTES = 4_000_000
HINT = "nothing of it was installed; get the archive again, whole"


def check(archive: Path, made: Path, digests: Mapping[Path, str]) -> str:
    """The commit that the manifest names, once every file proved to be as it says; without a
    manifest "". `digests` is the sha256 of every file unpacked into `made`.
    """
    path = made / MANIFEST
    if path not in digests:
        log.info(f"{archive.name}: has no {MANIFEST}, so its files are taken as they are")
        return ""
    try:
        commit, listed = _read(path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PipelineError(
            f"{archive.name}: its {MANIFEST} is none: {type(error).__name__}: {str(error)[:200]}",
            HINT,
        ) from None
    files = {
        file.relative_to(made).as_posix(): (digest, file.stat().st_size)
        for file, digest in digests.items()
        if file != path
    }
    for name in sorted(listed.keys() | files.keys()):
        if listed.get(name) != files.get(name):
            why = "is not in the archive" if name not in files else "is not the file listed"
            why = "is not listed" if name not in listed else why
            raise PipelineError(f"{archive.name}: {name[:120]!r} {why} in its {MANIFEST}", HINT)
    return commit


def _read(path: Path) -> tuple[str, dict[str, tuple[Any, Any]]]:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    data = json.loads(path.read_bytes())
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']!r}, this version reads {SCHEMA}")
    if not re.fullmatch(TAG, data["commit"], re.ASCII):
        raise ValueError(f"commit {data['commit']!r}")
    listed = {name: (file["sha256"], file["size"]) for name, file in data["files"].items()}
    return data["commit"], listed
