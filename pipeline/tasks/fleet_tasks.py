"""The steps of many servers, as the dicts that doit wants. What they do is loaded when they run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from doit.exceptions import TaskFailed

from pipeline.commands.many import ROUTER
from pipeline.commands.model import Steps
from pipeline.core import log

from .dashes import behind_dashes
from .doit import guarded
from .order import lacks_config
from .task import Task, task


def action(steps: Steps, module: str, name: str) -> Callable[[], None]:
    """A function of `pipeline.commands`, called with `steps`."""
    return lambda: getattr(import_module(f"pipeline.commands.{module}"), name)(steps)


def ready_to_run(steps: Steps) -> list[str]:
    """What has to be there before anything is started."""
    if steps.configured is None:
        return []
    return ["_config", "_places", *built(steps), "_options", *(["_frozen"] if steps.models else [])]


def built(steps: Steps) -> list[str]:
    """The step that makes llama-server, where none is found elsewhere."""
    return ["build_bins"] if steps.configured and steps.configured.needs_programs else []


def up(steps: Steps) -> Task:
    if steps.request.many.dry_run:
        run, after = action(steps, "plan_servers", "changes"), []
    else:
        run, after = action(steps, "up", "up"), ready_to_run(steps)
    return task(run, after=after, lacks=lacks_config(steps))


def places(steps: Steps) -> Task:
    return task(action(steps, "install_model", "require_writable"), after=["_config"])


def prepare(steps: Steps) -> Task:
    return task(action(steps, "install_model", "place"), after=ready_to_run(steps))


def serve(steps: Steps) -> Task:
    return task(action(steps, "up", "serve"), after=ready_to_run(steps))


def ps(steps: Steps) -> Task:
    return task(action(steps, "ps", "ps"))


def logs(steps: Steps) -> Task:
    return task(action(steps, "ps", "logs"))


def down(steps: Steps) -> Task:
    return task(action(steps, "ps", "down"))


def gateway(steps: Steps) -> Task:
    its_own = steps.request.many.engine == ROUTER  # then there is nothing but the router
    after = ready_to_run(steps) if its_own else []
    return task(action(steps, "gateway", "run"), after=after, lacks=lacks_config(steps))


def claude(steps: Steps) -> Task:
    def run(words: list[str]) -> TaskFailed | None:
        from pipeline.commands import claude as claude_task

        return guarded(lambda: claude_task.run(steps, behind_dashes(words)))()

    lacks = "" if steps.request.many.url else lacks_config(steps)
    return {**task(lambda: None, lacks=lacks), "actions": [run], "pos_arg": "words"}


def systemd(steps: Steps) -> Task:
    after = ["_config"] if steps.configured else []
    return task(action(steps, "up", "systemd"), after=after, lacks=lacks_config(steps))


def kubernetes(steps: Steps) -> Task:
    return task(action(steps, "kubernetes", "write"), lacks=lacks_config(steps))


def config(steps: Steps) -> Task:
    return task(lambda: steps.configured.check() if steps.configured else None)


def options(steps: Steps) -> Task:
    def run() -> None:
        if steps.configured:
            steps.configured.check(log.info)

    return task(run, after=["_config", *built(steps)])
