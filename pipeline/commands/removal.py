"""What `remove` and `prune` share: show what would go, ask, and take it away."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import active, artifacts
from pipeline.core.store.publish import full_disk_is_an_error, remove
from pipeline.core.text import size, table

from .request import Request

BY_HAND = "was put there by hand, or changed since it was made"
NOTHING = "; linked elsewhere, so nothing becomes free"


class Removable(Struct, frozen=True, kw_only=True):
    """Files or folders that go together: what they are, and why they may go.

    `is_unfinished`: left by a killed run. `keep_receipt`: see `artifacts.take_away`. `is_plain`:
    no artifact, such as a log.
    """

    kind: str
    paths: tuple[Path, ...]
    why: str
    is_unfinished: bool = False
    keep_receipt: bool = False
    is_plain: bool = False


class Candidates(Struct, frozen=True, kw_only=True):
    """What would go; and what stays, with the reason, where somebody may expect it to go."""

    go: tuple[Removable, ...]
    stay: tuple[tuple[Path, str], ...] = ()


def carry_out(request: Request, home: Home, find: Callable[[], Candidates]) -> None:
    """Show what `find` says, ask, and remove what it still says then. Raises PipelineError;
    UsageError where nobody can be asked."""
    found, yes = find(), request.yes
    is_wanted = bool(found.go) and not request.servers.dry_run
    if not request.json:
        show(home, found)
    elif not (is_wanted and yes):
        print(json.dumps(document(found), indent=1))
    if not is_wanted or not (yes or ask(request)):
        return
    with full_disk_is_an_error(home.root), active.removing(home.run):
        agreed = {path for each in found.go for path in each.paths}
        go = tuple(each for each in find().go if agreed.issuperset(each.paths))
        result = document(Candidates(go=go, stay=found.stay))
        for each in sorted(go, key=lambda each: -artifacts.allocated(each.paths)):
            take_away(each, home)
    if request.json:
        print(json.dumps({**result, "removed": True}, indent=1))
    else:
        log.info(f"removed; {size(result['bytes'])} are free again")


def ask(request: Request) -> bool:
    """Ask in the terminal. Raises UsageError where there is none."""
    if request.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "nothing was removed: nobody can be asked here",
            "yes=1 removes it, dry_run=1 only shows it",
        )
    print("Remove all of this? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    log.info("nothing was removed")
    return False


def take_away(each: Removable, home: Home) -> None:
    # The largest first: on a full disk it makes room for the receipts of the others.
    for path in sorted(each.paths, key=lambda path: -path.lstat().st_size):
        if each.is_unfinished:
            artifacts.finish(path)
        elif each.is_plain:
            remove(path)
        else:
            artifacts.take_away(path, keep_receipt=each.keep_receipt)
        for top in (home.models / "gguf", home.models / "source"):
            artifacts.remove_empty(path.parent, top)


def show(home: Home, found: Candidates) -> None:
    """A line for each, and the sum."""
    rows = [
        (size(freed).rjust(9), shown(home, each.paths), each.why + (NOTHING if not freed else ""))
        for each in found.go
        for freed in [artifacts.allocated(each.paths)]
    ]
    if rows:
        total = artifacts.allocated(path for each in found.go for path in each.paths)
        print(table([*rows, (size(total).rjust(9), "in all", "")]), flush=True)
    else:
        log.info("nothing to remove")
    for path, why in found.stay:
        log.info(f"kept: {shown(home, (path,))}: {why}")


def shown(home: Home, paths: Sequence[Path]) -> str:
    """The path, relative where it is in the home; of many their folder."""
    path = paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
    return str(path.relative_to(home.root) if path.is_relative_to(home.root) else path)


def document(found: Candidates) -> dict[str, Any]:
    """The same as JSON has it. Sizes in bytes that become free."""
    return {
        "removed": False,
        "bytes": artifacts.allocated(path for each in found.go for path in each.paths),
        "items": [
            {
                "kind": each.kind,
                "why": each.why,
                "bytes": artifacts.allocated(each.paths),
                "paths": [str(path) for path in each.paths],
            }
            for each in found.go
        ],
        "kept": [{"path": str(path), "why": why} for path, why in found.stay],
    }


def require_no_run(under_way: Sequence[str]) -> None:
    """Raise PipelineError while another run may need anything."""
    if under_way:
        raise PipelineError(
            f"another run is under way: {'; '.join(under_way)}; nothing was removed",
            "run this again once that has ended",
        )
