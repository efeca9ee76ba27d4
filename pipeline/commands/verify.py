"""`verify`: every artifact hashed again and held against its receipt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.bins.compile import git_tree
from pipeline.core import log
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.process import WINDOWS
from pipeline.core.store import receipts
from pipeline.core.store.hashing import sha256
from pipeline.core.store.receipts import FILE, Entry
from pipeline.core.text import plural
from pipeline.models import converter, gguf

from .model import Model


def verify(model: Model) -> None:
    """Check everything in the home, or only what belongs to `model=`. Raises PipelineError."""
    results: list[dict[str, str]] = []

    def report(path: Path, problem: str) -> None:
        results.append({"path": str(path), "problem": problem})
        if not model.request.json:
            print(f"{'wrong' if problem else 'ok':<5} {path}", flush=True)

    for path, entry in artifacts(model):
        try:
            problem = check(path, entry)
        except (OSError, PipelineError) as error:
            problem = str(error)
        report(path, problem)
    if not model.request.reference and converter.has_receipt(model.home):
        path, problem = converter.folder(model.home), converter.damage(model.home, hashes=True)
        report(path, problem)
    if model.request.json:
        print(json.dumps(results, indent=1))
    wrong = [f"{item['path']}: {item['problem']}" for item in results if item["problem"]]
    if wrong:
        raise PipelineError(
            f"{len(wrong)} of {plural(len(results), 'artifact')} not as their receipts say:\n"
            + "\n".join(wrong),
            f"{doitw('forget STEP')} for the step that made it, then run the step again",
        )
    log.info(f"{plural(len(results), 'artifact')} as their receipts say")


def artifacts(model: Model) -> Iterator[tuple[Path, Entry | None]]:
    """The artifacts that are meant; a `.gguf` of the user's own has no receipt."""
    home = model.home
    tops = [home.bins, home.models]
    if model.request.reference:
        resolved = model.require_resolved()
        tops = [home.models / "gguf" / resolved.slug, home.models / "source" / resolved.slug]
        if resolved.local and resolved.kind == "gguf":
            yield from ((resolved.folder / file.name, None) for file in resolved.files)
    for top in tops:
        for receipt in sorted(top.rglob(FILE)):
            if any(folder.name.endswith((".part", ".old")) for folder in receipt.parents):
                continue
            for name, entry in receipts.load(receipt.parent).items():
                if entry.mtime_ns is not None:  # else removed on purpose after it had served
                    yield receipt.parent / name, entry


def check(path: Path, entry: Entry | None) -> str:
    """What is wrong with an artifact; empty: nothing."""
    if entry is None:
        gguf.read(path)
        return ""
    if not path.exists():
        return "is missing"
    if path.is_dir():
        if WINDOWS:  # which does not keep the modes that are part of git's hash
            return "" if git_tree.stamp(path) == entry.sha256 else "has changed files"
        expected = {**entry.recipe, **(entry.source or {})}["tree"]
        digest = git_tree.folder_hash(path)
        return (
            "" if digest == expected else f"has the tree hash {digest}, its receipt says {expected}"
        )
    if path.stat().st_size != entry.size:
        return f"has {path.stat().st_size} bytes, its receipt says {entry.size}"
    digest = sha256(path)
    if digest != entry.sha256:
        return f"has the sha256 {digest}, its receipt says {entry.sha256}"
    if path.suffix == ".gguf":
        gguf.read(path)
    return ""
