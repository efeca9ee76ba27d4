"""`up`, and `serve` of a profile: the servers of a configuration, started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import REPOSITORY
from pipeline.core.say import say, table
from pipeline.serve import supervise
from pipeline.serve.fleet.state import FAILED, PAUSING, READY, STOPPED, Folder, Seen, Wanted
from pipeline.serve.instance import Instance
from pipeline.serve.launch import Launch

from . import gateways, listing, many
from .configured import Configured, require
from .steps import Steps

# What a service needs of the environment that it was written in.
KEPT = ("LLAMA_PIPELINE_HOME", "LLAMA_PIPELINE_CACHE", "LLAMA_SERVER_BINS_DIR", many.REGISTRY)


def wanted(configured: Configured) -> Wanted:
    """What `up` asks for. Writes the keys that are needed. Raises PipelineError."""
    from pipeline.serve.config import instances

    configuration = configured.configuration
    if wrong := configured.for_one_server():
        raise UsageError("\n".join(wrong))
    configured.place_files()
    for made in instances.write_keys(configuration, configured.flags(), configured.keys):
        say(made)
    if configuration.gateway.enable:
        gateways.ready(configured)
    return Wanted(
        config=configuration.source,
        instances=planned(configured),
        max_loading=configured.wish.max_loading or configuration.master.max_loading,
    )


def planned(configured: Configured) -> tuple[Instance, ...]:
    """What would be started, the gateway among it. Raises PipelineError."""
    configuration = configured.configuration
    has_gateway = configuration.gateway.enable and configuration.master.enable
    return (*configured.instances(), *([gateways.instance(configured)] if has_gateway else []))


def up(steps: Steps) -> None:
    """Start what is asked for and is not there yet. Raises PipelineError where one is not ready."""
    from pipeline.serve.fleet import control

    configured = require(steps)
    asked = wanted(configured)
    if configured.wish.dry_run:
        rows = control.changes(configured.at, asked)
        told = [{"name": name, "change": change} for name, change in rows]
        print(json.dumps(told) if steps.request.json else table(rows) or "nothing to do")
        return
    (steps.home.run / "xdg").mkdir(parents=True, exist_ok=True)
    if configured.wish.background is False:
        control.run_foreground(configured.at, asked, report=report)
        say("stopped")
        return
    failed = control.up(configured.at, asked, report=report)
    listing.show(steps, [configured.at], reasons=False)
    if failed:
        raise PipelineError(
            "\n".join(f"{one.name} is {seen.state}: {seen.reason}" for one, seen in failed),
            "`doit up` tries again what has failed; `doit logs name=…` shows more",
        )
    stay(configured.at, [one for one in asked.instances if not one.background])


def serve(steps: Steps) -> None:
    """The one server of a profile, in the foreground until asked to stop. Raises PipelineError."""
    configured = require(steps)
    found = wanted(configured).instances
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "nothing"
        raise UsageError(
            f"serve: {configured.configuration.label} asks for {names}", "start them: doit up"
        )
    (steps.home.run / "xdg").mkdir(parents=True, exist_ok=True)
    began = as_launch(found[0], configured.at)

    def ready(seconds: float, _: str) -> None:
        told = {"url": began.url, "model": found[0].name, "engine": found[0].engine}
        told |= {"log": str(began.log), "ready in": f"{seconds:.2f} s"}
        print(json.dumps(told) if steps.request.json else table(list(told.items())), flush=True)

    supervise.foreground(
        began,
        ready=ready,
        ready_timeout=found[0].ready_timeout,
        stop_timeout=found[0].stop_timeout,
    )


def as_launch(instance: Instance, at: Folder) -> Launch:
    """The instance for the foreground."""
    from pipeline.serve.fleet.child import environment

    return Launch(
        executable=Path(instance.executable),
        arguments=instance.cmd,
        env=environment(instance, at),
        host=instance.host,
        port=instance.port,
        log=Path(instance.log_file),
        folder=Path(instance.folder),
        prefix=instance.prefix,
        tls=instance.tls,
    )


def systemd(steps: Steps) -> None:
    """Print a unit of systemd that keeps the configuration up. Raises PipelineError."""
    from pipeline.serve.fleet.unit import systemd_unit

    configured = require(steps)
    wish = configured.wish
    named = [f"config={wish.config}"] if wish.config else [f"profile={wish.profile}"]
    named += [f"engine={wish.engine}"] if wish.engine else []
    own = {name: os.environ[name] for name in KEPT if name in os.environ}
    print(
        systemd_unit(
            configured.configuration.label,
            [str(REPOSITORY / "doitw"), "up", *named, "background=0"],
            folder=REPOSITORY,
            env=own,
            stop_timeout=max([d.control.stop_timeout for d in configured.configuration.enabled]),
        ),
        end="",
    )


def report(instance: Instance, seen: Seen) -> None:
    """One line for each change that a user waits for."""
    if seen.state == READY:
        say(f"{instance.name}: ready at {instance.url}")
    elif seen.state == PAUSING:
        say(f"{instance.name}: is started again: {first_line(seen.reason)}")
    elif seen.state == FAILED:
        say(f"{instance.name}: failed: {first_line(seen.reason)}")


def first_line(reason: str) -> str:
    """The reason without the last lines of the log."""
    return reason.partition("\n")[0].removesuffix(":")


def stay(at: Folder, instances: Sequence[Instance]) -> None:
    """Stay with those that are not for the background, until they end; a stop ends them."""
    from pipeline.serve.fleet import control

    if not instances:
        return
    names = [one.name for one in instances]
    say(f"staying with {', '.join(names)}; Ctrl-C stops {'them' if len(names) > 1 else 'it'}")
    try:
        while any(seen.state not in (STOPPED, FAILED) for seen in _seen(at, names)):
            time.sleep(0.2)
    except KeyboardInterrupt:
        control.down(at, names)
        say("stopped")


def _seen(at: Folder, names: Sequence[str]) -> list[Seen]:
    from pipeline.serve.fleet import control

    there = control.living(at)
    return [one for one in there.instances if one.name in names] if there else []
