"""`verify`: every artifact hashed again and held against its receipt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.bins import tree
from pipeline.core import receipts
from pipeline.core.errors import PipelineError
from pipeline.core.hashing import sha256
from pipeline.core.receipts import FILE, Entry
from pipeline.core.say import plural
from pipeline.models import gguf

from .steps import Steps


def verify(steps: Steps) -> None:
    """Check everything in the home, or only what belongs to `model=`. Raises PipelineError."""
    count, wrong = 0, []
    for folder in folders(steps):
        for name, entry in receipts.load(folder).items():
            if entry.mtime_ns is None:  # removed on purpose after it had served
                continue
            count += 1
            try:
                problem = check(folder / name, entry)
            except (OSError, PipelineError) as error:
                problem = str(error)
            print(f"{'wrong' if problem else 'ok':<5} {folder / name}", flush=True)
            if problem:
                wrong.append(f"{folder / name}: {problem}")
    if wrong:
        raise PipelineError(
            f"{plural(len(wrong), 'artifact')} of {count} differ:\n" + "\n".join(wrong),
            "doit forget the step that made it, and run it again",
        )
    print(f"{plural(count, 'artifact')} as their receipts say")


def check(path: Path, entry: Entry) -> str:
    """What is wrong with an artifact; empty: nothing."""
    if not path.exists():
        return "is missing"
    if path.is_dir():
        found = tree.folder_hash(path)
        return "" if found == entry.recipe["tree"] else f"has the tree hash {found}"
    if path.stat().st_size != entry.size:
        return f"has {path.stat().st_size} bytes, its receipt says {entry.size}"
    found = sha256(path)
    if found != entry.sha256:
        return f"has the sha256 {found}, its receipt says {entry.sha256}"
    if path.suffix == ".gguf":
        gguf.read(path)
    return ""


def folders(steps: Steps) -> Iterator[Path]:
    """The folders with receipts that are meant."""
    home, resolved = steps.home, steps.known()
    if resolved is not None:
        tops = [home.models / "gguf" / resolved.slug, home.models / "source" / resolved.slug]
    else:
        tops = [home.bins, home.models]
    for top in tops:
        yield from sorted(path.parent for path in top.rglob(FILE))
