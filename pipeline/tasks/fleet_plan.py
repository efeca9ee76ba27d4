"""`plan config=…`: what `up` would start. Nothing is made."""

from __future__ import annotations

import json

from pipeline.core.process import shown
from pipeline.core.say import say, table
from pipeline.serve.instance import Instance

from . import checking, locking, planning, resolving
from .configured import Configured
from .running import planned


def plan(configured: Configured) -> None:
    """Print the instances: text, or a JSON list with format=json. Raises PipelineError."""
    configured.check(say, strict=False)
    for model in configured.models.values():
        checking.check_request(model)
        locking.require(model, before=True)
        if not model.resolve_is_done():
            resolving.resolve(model, store=False)
    found = planned(configured)
    if configured.steps.request.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        print("\n\n".join(part for part in (steps_text(configured), text(found)) if part))


def steps_text(configured: Configured) -> str:
    """What has to be prepared first."""
    rows = []
    for name, model in configured.models.items():
        with model.asking_anew():
            told = planning.collect(model)
        rows += [(step["state"], name, step["name"], step["what"]) for step in told["steps"]]
    return table(rows)


def text(found: tuple[Instance, ...]) -> str:
    """The instances for people."""
    if not found:
        return "nothing would be started"
    rows = [("name", "engine", "address", "gpus", "log")]
    rows += [(one.name, one.engine, one.url, one.gpu_ids or "all", one.log_file) for one in found]
    commands = []
    for one in found:
        env = [f"{name}={value}" for name, value in one.env.items()]
        commands.append(f"{one.name}: {' '.join([*env, shown(one.command)])}")
    return "\n\n".join([table(rows), *commands])
