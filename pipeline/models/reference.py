"""What `model=` means, by its form and by what exists on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute

ReferenceKind = Literal["demo", "gguf", "folder", "hub"]

HUB = re.compile(
    r"(?P<repo>(?!\.)[\w.-]+/(?!\.)[\w.-]+?)"
    r"(?::(?P<quant>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<late>[\w.-]+))?"
)
PROJECTOR = re.compile(r"mmproj|projector", re.IGNORECASE)  # by name; metadata has the last word
NO_PROJECTOR = "none"  # of mmproj=
FORMS = "demo, org/model, org/model:QUANT, org/model@revision, a path of a .gguf, or of a folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFilter:
    """Which files of a repository are requested; empty means any."""

    quant: str = ""
    filename: str = ""
    pattern: str = ""
    mmproj: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A model as the user wrote it: `path` for files, `repo` and `revision` for the hub."""

    kind: ReferenceKind
    text: str
    path: Path | None = None
    repo: str = ""
    revision: str = ""
    quant: str = ""
    note: str = ""  # what was decided, to be shown once


def parse(text: str) -> Reference:
    """Parse a reference. A path that exists wins. Raises UsageError."""
    if text == "demo":
        return Reference(kind="demo", text=text)
    match = HUB.fullmatch(text.removeprefix("hf:"))
    path = absolute(text)
    if not text.startswith("hf:") and exists(path):
        note = f"{text}: taken for the path {path}, which exists" if match else ""
        return existing(text, path, note)
    looks_like_path = (
        text.startswith((".", "/", "~", "\\"))
        or "\\" in text
        or (not match)
        or (text.lower().endswith((".gguf", ".safetensors")) and not text.startswith("hf:"))
    )
    if match and not looks_like_path:
        if match["quant"] and match["late"]:
            raise UsageError(f"model={text}: names two quants", f"a reference is {FORMS}")
        return Reference(
            kind="hub",
            text=text,
            repo=match["repo"],
            revision=match["revision"] or "",
            quant=match["quant"] or match["late"] or "",
        )
    if any(letter in text for letter in "/\\~.") and not text.startswith("hf:"):
        raise UsageError(f"model={text}: {path} does not exist", f"a reference is {FORMS}")
    raise UsageError(f"model={text}: not a valid reference", f"a reference is {FORMS}")


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. A name may be too long to exist."""
    try:
        return path.exists()
    except OSError:
        return False


def existing(text: str, path: Path, note: str = "") -> Reference:
    """A reference to a file or folder that exists. Raises UsageError."""
    if path.is_dir():
        return Reference(kind="folder", text=text, path=path, note=note)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return Reference(kind="gguf", text=text, path=path, note=note)
    raise UsageError(
        f"model={text}: {path.name} is neither a .gguf file nor a folder",
        "for safetensors pass the folder that holds config.json and the weights",
    )
