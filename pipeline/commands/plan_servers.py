"""`plan config=…` and `up dry_run=1`: what `up` would start. Nothing is made, nothing started."""

from __future__ import annotations

import json
from typing import Any

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.process import shown
from pipeline.core.text import size, table
from pipeline.serve import sandbox
from pipeline.serve.server import LLAMA_CPP, Server

from . import check, lock, resolve
from . import plan as planning
from .model import Steps
from .servers import Configured, require
from .up import asked_for, planned


def look(configured: Configured) -> tuple[Server, ...]:
    """The instances as far as they are known now. Raises PipelineError."""
    configured.check(log.info)
    if wrong := configured.misplaced():
        raise UsageError("\n".join(wrong))
    for model in configured.models.values():
        check.check_request(model)
        lock.require(model, before=True)
        if not model.resolve_is_done():
            resolve.resolve(model, store=False)
    return planned(configured)


def plan(configured: Configured) -> None:
    """Print the instances: text, or a JSON list with format=json. Raises PipelineError."""
    found = look(configured)
    if configured.steps.request.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        parts = [steps_text(configured), text(found), *unknown(configured)]
        print("\n\n".join(part for part in parts if part))


def changes(steps: Steps) -> None:
    """Print what `up` would start, keep, restart and stop. Raises PipelineError."""
    from pipeline.serve.supervisor import control

    configured = require(steps)
    rows = control.changes(configured.at, asked_for(configured, look(configured)))
    if steps.request.json:
        print(json.dumps([{"name": name, "change": change} for name, change in rows]))
    else:
        print(table(rows) or "nothing to do")


def steps_text(configured: Configured) -> str:
    """What has to be prepared first, and what that costs."""
    told: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    if configured.needs_programs and not configured.models:
        state = planning.UP_TO_DATE if configured.steps.bins_are_done() else planning.TO_DO
        rows.append((state, "build_bins", str(configured.steps.binaries.folder)))
    for name, model in configured.models.items():
        with model.asking_anew():
            told.append(planning.collect(model))
        for step in told[-1]["steps"]:
            its_own = step["name"] in ("fetch", "convert", "quantize")
            row = (
                step["state"],
                f"{step['name']}:{name}" if its_own else step["name"],
                step["what"],
            )
            rows += [] if row in rows else [row]
    if told:
        peak, free = max(one["disk_peak_bytes"] for one in told), told[0]["disk_free_bytes"]
        rows.append(("download", size(sum(one["download_bytes"] for one in told)), "at most"))
        rows.append(("disk", size(peak), f"for the largest step, {size(free)} free"))
        needed = [one["memory"]["total_bytes"] for one in told if one["memory"]]
        rows.append(("memory", size(sum(needed)), "for one server of each model"))
    return table(rows)


def text(found: tuple[Server, ...]) -> str:
    """The instances for people."""
    if not found:
        return "nothing would be started"
    rows = [("name", "engine", "address", "gpus", "log")]
    rows += [(one.name, one.engine, one.url, one.gpu_ids or "all", one.log_file) for one in found]
    commands = []
    for one in found:
        env = [f"{name}={value}" for name, value in one.env.items()]
        told = [f"{one.name}, in {one.folder}:", shown(["env", *env, *one.command])]
        told += [f"sandbox: {sandbox.shown(one)}"] if one.engine == LLAMA_CPP else []
        commands.append("\n".join(told))
    return "\n\n".join([table(rows), *commands])


def unknown(configured: Configured) -> list[str]:
    """What cannot be said before the models are there."""
    waiting = [name for name, model in configured.models.items() if not model.fetch_is_done()]
    if not waiting:
        return []
    return [
        f"options that follow from the model itself are known once it is here: {', '.join(waiting)}"
    ]
