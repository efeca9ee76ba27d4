"""`models`: what is on disk, with size, origin, last use, and who uses it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import artifacts
from pipeline.core.text import size, table
from pipeline.models import on_disk
from pipeline.models.on_disk import OnDisk, StoredModel
from pipeline.serve import served

from . import uses
from .session import Session
from .uses import Uses

HEAD = ("model", "quant", "size", "from", "made", "served", "used by")


def models(session: Session) -> None:
    """Print a table, or JSON."""
    stored = on_disk.look(session.home)
    rows = [row(session.home, model, known(session, stored)) for model in stored.models]
    if session.request.json:
        unfinished = [
            {"path": str(path), "bytes": artifacts.allocated([path])} for path in stored.unfinished
        ]
        unknown = [str(path) for path in stored.unknown]
        document = {"home": str(session.home.root), "models": rows}
        print(json.dumps({**document, "unfinished": unfinished, "unknown": unknown}, indent=1))
        return
    if rows:
        print(table([HEAD, *map(text, rows)]))
    else:
        log.info(f"no model is in {session.home.models}")
    for path in stored.unfinished:
        log.info(f"unfinished: {path}, {size(artifacts.allocated([path]))}")
    for path in stored.unknown:
        log.info(f"put there by hand, or changed: {path}")


def known(session: Session, stored: OnDisk) -> Uses:
    """Who uses what; where a configuration cannot be read, a warning and only what runs."""
    try:
        return uses.find(session, stored)
    except UsageError as error:
        log.info(f"warning: {error.message}")
        return Uses(uses=tuple(uses.running(session.home)), under_way=())


def row(home: Home, model: StoredModel, known: Uses) -> dict[str, Any]:
    """A model as JSON has it. Sizes in bytes, times as in receipts; null where there is none."""
    users = known.of(model)
    times = [served.at(home.run, file) for file in model.files] if model.kind == "model" else []
    return {
        "name": model.name,
        "slug": model.slug,
        "kind": model.kind,
        "quant": model.quant or None,
        "bytes": model.bytes,
        "frees": artifacts.allocated(model.files),
        "reference": model.reference,
        "revision": model.revision or None,
        "made_at": model.made_at,
        "served_at": max(times, default="") or None,
        "used_by": list(dict.fromkeys(use.by for use in users if not use.is_running)),
        "running": list(dict.fromkeys(use.by for use in users if use.is_running)),
        "files": [str(file) for file in model.files],
    }


def text(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a line."""
    origin = row["reference"] + (f"@{row['revision'][:12]}" if row["revision"] else "")
    quant = row["quant"] or ""
    kind = "" if row["kind"] == "model" else row["kind"]
    running = [f"{name} (running)" for name in row["running"]]
    return (
        row["name"],
        " ".join(filter(None, (quant, kind))),
        size(row["bytes"]),
        origin,
        _day(row["made_at"]),
        _day(row["served_at"]) if row["served_at"] else "never" if not kind else "",
        ", ".join([*running, *row["used_by"]]),
    )


def _day(time: str) -> str:
    """A receipt's time in this place."""
    return f"{datetime.fromisoformat(time).astimezone():%d %b %Y %H:%M}"
