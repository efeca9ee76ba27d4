"""What `model=` means, by its form alone and by what exists on disk."""

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
FORMS = "demo, org/model, org/model:QUANT, org/model@revision, a path of a .gguf, or of a folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A model, as somebody wrote it. `path` for files, `repo` and `revision` for the hub."""

    kind: ReferenceKind
    text: str
    path: Path | None = None
    repo: str = ""
    revision: str = ""
    quant: str = ""
    note: str = ""  # what had to be decided, to be said once


def parse(text: str) -> Reference:
    """Tell the forms of a reference apart. A path that exists wins. Raises UsageError."""
    if text == "demo":
        return Reference(kind="demo", text=text)
    match = HUB.fullmatch(text.removeprefix("hf:"))
    path = absolute(text)
    if not text.startswith("hf:") and exists(path):
        note = f"{text}: taken as the path {path}, which exists" if match else ""
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
    if any(sign in text for sign in "/\\~.") and not text.startswith("hf:"):
        raise UsageError(f"model={text}: {path} does not exist", f"a reference is {FORMS}")
    raise UsageError(f"model={text}: is no reference", f"a reference is {FORMS}")


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name too long for one is none."""
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
        "for safetensors give the folder that holds config.json and the weights",
    )
