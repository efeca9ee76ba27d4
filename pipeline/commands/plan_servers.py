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
from .servers import Servers
from .up import asked_for, planned


def look(servers: Servers) -> tuple[Server, ...]:
    """The instances as far as they are known now. Raises PipelineError."""
    servers.check(log.info)
    if wrong := servers.misplaced():
        raise UsageError("\n".join(wrong))
    for model in servers.models.values():
        check.check_request(model)
        lock.require(model, before=True)
        if not model.resolve_is_done():
            resolve.resolve(model, store=False)
    return planned(servers)


def plan(servers: Servers) -> None:
    """Print the instances: text, or a JSON list with format=json. Raises PipelineError."""
    found = look(servers)
    if servers.request.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        parts = [steps_text(servers), text(found), *unknown(servers)]
        print("\n\n".join(part for part in parts if part))


def changes(servers: Servers) -> None:
    """Print what `up` would start, keep, restart and stop. Raises PipelineError."""
    from pipeline.serve.supervisor import control

    rows = control.changes(servers.at, asked_for(servers, look(servers)))
    if servers.request.json:
        print(json.dumps([{"name": name, "change": change} for name, change in rows]))
    else:
        print(table(rows) or "nothing to do")


def steps_text(servers: Servers) -> str:
    """What has to be prepared first, and what that costs."""
    told: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    if servers.needs_programs and not servers.models:
        state = planning.UP_TO_DATE if servers.programs.are_done() else planning.TO_DO
        rows.append((state, "build_bins", str(servers.programs.binaries.folder)))
    for name, model in servers.models.items():
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


def unknown(servers: Servers) -> list[str]:
    """What cannot be said before the models are there."""
    waiting = [name for name, model in servers.models.items() if not model.fetch_is_done()]
    if not waiting:
        return []
    return [
        f"options that follow from the model itself are known once it is here: {', '.join(waiting)}"
    ]
