"""Each step as the dict that doit wants."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from doit import doit_cmd
from doit.exceptions import InvalidDodoFile, TaskFailed

from pipeline import bootstrap
from pipeline.commands import check as checking
from pipeline.commands import clean
from pipeline.commands import lock as locking
from pipeline.commands import make as doing
from pipeline.commands import plan as planning
from pipeline.commands import resolve as resolving
from pipeline.commands import serve as serving
from pipeline.commands import verify as verifying
from pipeline.commands.model import Steps
from pipeline.commands.request import request
from pipeline.core import capacity, log, process
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.sandbox.available import SWITCH, is_off
from pipeline.models import quants
from pipeline.serve import launch, sandbox

from . import fleet_tasks
from .dashes import before_dashes, behind_dashes
from .doit import guarded, interrupt_on_termination, replace_closed_streams
from .order import after_resolve, comes_first, lacks_model
from .task import Task, Tasks, task

# doit runs a task as soon as what it is `after` has run, so the order stands in `after` alone:
# what can go wrong soonest comes first, and nothing large is fetched before the request is sound.
PREPARED_FOR = ["_check", "_compiler", "resolve", "source", "build_bins"]
PREPARATION = [*PREPARED_FOR, "_settle", "fetch", "converter", "convert", "quantize"]


def each(steps: Steps, make: Callable[[Steps], Task]) -> Tasks:
    """A step of the model that is named, or one for each model of a configuration."""
    if steps.configured is None:
        return make(steps)
    return ({**make(model), "name": name} for name, model in steps.models.items())


def start() -> Steps:
    """Read the command line's variables. Mistakes end the run before doit starts a task."""
    interrupt_on_termination()
    replace_closed_streams()
    inherited = launch.inherited(os.environ)
    for name in inherited:
        del os.environ[name]
    if inherited:
        log.info(
            f"not used, though set: {', '.join(inherited)}; give options as "
            "server.NAME=…, a key as api_key_file=…"
        )
    given = before_dashes(doit_cmd._CMDLINE_VARS or {})
    try:
        steps = Steps(request(given))
    except PipelineError as error:
        raise InvalidDodoFile(str(error)) from None
    if steps.request.sandbox == sandbox.OFF:
        os.environ[SWITCH] = "off"
    if is_off():
        log.info("warning: the sandbox is off: what reads a model may do all that you may")
    if steps.request.many.source:
        from pipeline.commands.servers import Configured

        steps.configured = Configured(steps, given)
        steps.models = steps.configured.models
    return steps


def asks_before_building(steps: Steps) -> bool:
    """A repository that is not there should not cost a build, though quant=auto is decided after
    it."""
    request = steps.request
    is_hub = request.reference is not None and request.reference.kind == "hub"
    is_auto = request.wanted.quant == quants.AUTO and not request.frozen
    return is_hub and is_auto and not steps.resolve_is_done()


def resolve(steps: Steps) -> Task:
    return task(
        lambda: resolving.resolve(steps),
        done=steps.resolve_is_done,
        after=["_check", *comes_first(steps)],
        clean=lambda: clean.clean_resolve(steps),
        forget=lambda: clean.forget_resolve(steps),  # its answer is its receipt
        lacks=lacks_model(steps),
    )


def fetch(steps: Steps) -> Task:
    return task(
        lambda: doing.fetch(steps),
        done=steps.fetch_is_done,
        # options of the server are checked first, where there are any
        after=["resolve", "_settle", "_flags"] if steps.request.settings.server else ["resolve"],
        clean=lambda: clean.clean(steps, "fetch"),
        forget=lambda: clean.forget(steps, "fetch"),
        lacks=lacks_model(steps),
    )


def converter(steps: Steps) -> Task:
    return task(
        lambda: doing.make_converter(steps),
        done=steps.converter_is_done,
        after=["_settle", "fetch"] if after_resolve(steps, "converter") else [],
        clean=lambda: clean.clean_converter(steps),
        forget=lambda: clean.forget_converter(steps),
    )


def convert(steps: Steps) -> Task:
    return task(
        lambda: doing.convert(steps),
        done=steps.convert_is_done,
        after=PREPARATION[:-2],
        clean=lambda: clean.clean(steps, "convert"),
        forget=lambda: clean.forget(steps, "convert"),
        lacks=lacks_model(steps),
    )


def quantize(steps: Steps) -> Task:
    return task(
        lambda: doing.quantize(steps),
        done=steps.quantize_is_done,
        after=PREPARATION[:-1],
        clean=lambda: clean.clean(steps, "quantize"),
        forget=lambda: clean.forget(steps, "quantize"),
        lacks=lacks_model(steps),
    )


def prepare(steps: Steps) -> Task:
    if steps.configured:
        return fleet_tasks.prepare(steps)
    return {
        "actions": None,
        "task_dep": ["_frozen"],
        "meta": {"lacks": lacks_model(steps)},
    }


def serve(steps: Steps) -> Task:
    if steps.configured:
        return fleet_tasks.serve(steps)
    return task(
        lambda: serving.serve(steps),
        after=["_port", *(["_flags"] if steps.request.settings.server else []), "_frozen"],
        lacks=lacks_model(steps),
    )


def lock(steps: Steps) -> Task:
    return task(
        lambda: locking.lock(steps), after=["_lockable", "_frozen"], lacks=lacks_model(steps)
    )


def lockable(steps: Steps) -> Task:
    return task(lambda: locking.require_writable(steps))


def plan(steps: Steps) -> Task:
    def run() -> None:
        if steps.configured is None:
            planning.plan(steps)
            return
        from pipeline.commands import plan_servers

        plan_servers.plan(steps.configured)

    return task(run, lacks=lacks_model(steps))


def verify(steps: Steps) -> Task:
    return task(lambda: verifying.verify(steps))


def doctor(steps: Steps) -> Task:
    def run() -> None:
        from pipeline.commands import doctor as doctoring  # no other task looks so closely

        doctoring.doctor(steps)

    return task(run)


def side_by_side(words: list[str]) -> list[str]:
    """pytest's options for several workers, where all tests are meant or a selection by mark. Most
    of them wait for other programs most of the time: more workers than processors."""
    if words and words[0] != "-m":
        return []
    return [
        "-n",
        str(2 * capacity.processors() + 1),
        "--dist",
        "loadgroup",
        "--no-loadscope-reorder",
    ]


def test() -> Task:
    """pytest in this environment, with what the tests need installed first."""

    def run(words: list[str]) -> TaskFailed | None:
        return guarded(lambda: pytest(behind_dashes(words)))()

    def pytest(words: list[str]) -> None:
        try:
            bootstrap.install("test")
        except bootstrap.BootstrapError as error:
            raise PipelineError(error.message, error.hint) from None
        argv = [sys.executable, "-m", "pytest", *side_by_side(words), *words]
        # Some systems' images set it; then each worker, and each doit, would compile all of it.
        env = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}
        status = process.attached(argv, cwd=REPOSITORY, env=env)
        if status:
            raise PipelineError(f"pytest ended with {status}")

    return {
        "actions": [run],
        "pos_arg": "words",
        "uptodate": [False],
        "io": {"capture": False},
        "verbosity": 2,
    }


def print_help(text: str | None) -> Task:
    return task(lambda: print((text or "").strip()))


def check(steps: Steps) -> Task:
    def run() -> None:
        for model in (*steps.models.values(),) or (steps,):
            checking.check(model)
            locking.require(model, before=True)
            if asks_before_building(model):
                resolving.listing(model)

    return task(run, after=["_config"] if steps.configured else [])


def frozen(steps: Steps) -> Task:
    return task(
        lambda: locking.require(steps), done=lambda: not steps.request.frozen, after=PREPARATION
    )


def settle(steps: Steps) -> Task:
    return task(lambda: doing.settle(steps), done=steps.is_settled, after=PREPARED_FOR)


def port(steps: Steps) -> Task:
    return task(lambda: serving.check_start(steps))


def flags(steps: Steps) -> Task:
    return task(lambda: serving.check_flags(steps), after=["build_bins"])
