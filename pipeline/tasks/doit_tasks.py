"""Each step as the dict that doit wants."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from doit import doit_cmd
from doit.exceptions import InvalidDodoFile, TaskFailed

from pipeline import bootstrap
from pipeline.core import process
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.say import say
from pipeline.models import quants
from pipeline.serve import launch

from . import checking, doing, locking, planning, resolving, serving, undoing, verifying
from .reporting import checked, guarded, interrupt_on_termination, replace_closed_streams
from .steps import Steps
from .variables import request

Task = dict[str, Any]

# doit runs a task as soon as what it is `after` has run, so the order stands in `after` alone:
# what can go wrong soonest comes first, and nothing large is fetched before the request is sound.
PREPARED_FOR = ["_check", "_compiler", "resolve", "source", "build_bins"]
PREPARATION = [*PREPARED_FOR, "_settle", "fetch", "converter", "convert", "quantize"]


def start() -> Steps:
    """Read the command line's variables. Mistakes end the run before doit starts a task."""
    interrupt_on_termination()
    replace_closed_streams()
    inherited = launch.inherited(os.environ)
    for name in inherited:
        del os.environ[name]
    if inherited:
        say(
            f"not used, though set: {', '.join(inherited)}; give options as "
            "server.NAME=…, a key as api_key_file=…"
        )
    given: dict[str, str] = doit_cmd._CMDLINE_VARS or {}
    try:
        return Steps(request(given))
    except PipelineError as error:
        raise InvalidDodoFile(str(error)) from None


def task(
    action: Callable[[], None],
    *,
    done: Callable[[], bool] | None = None,
    after: list[str] | None = None,
    clean: Callable[[], None] | None = None,
    forget: Callable[[], None] | None = None,
    lacks_model: bool = False,
) -> Task:
    """A doit task that prints live, and whose `done` alone decides whether it runs."""
    return {
        "actions": [guarded(action)],
        "uptodate": [checked(done) if done else False],
        "task_dep": after or [],
        "clean": [guarded_clean(clean)] if clean else [],
        "meta": {"forget": forget, "lacks_model": lacks_model},
        "io": {"capture": False},
        "verbosity": 2,
    }


def guarded_clean(clean: Callable[[], None]) -> Callable[[], None]:
    """As `guarded`; doit goes on after a failed clean action, and ends well: this does not."""
    run = guarded(clean)

    def tell() -> None:
        failed = run()
        if failed:
            say(f"error: {failed.get_msg().strip()}")
            raise SystemExit(1)

    return tell


def lacks_model(steps: Steps) -> bool:
    return steps.request.reference is None


def comes_first(steps: Steps) -> list[str]:
    """What has to be there for `resolve`: of a folder the source knows the architectures, and
    quant=auto asks the programs and the converter. All else is resolved before any of it."""
    reference = steps.request.reference
    if reference and steps.request.wanted.quant == quants.AUTO:
        is_converted = reference.kind in ("demo", "folder")
        return ["source", "build_bins", *(["converter"] if is_converted else [])]
    return ["source"] if reference and reference.kind == "folder" else []


def asks_before_building(steps: Steps) -> bool:
    """A repository that is not there should not cost a build, though quant=auto is decided after
    it."""
    request = steps.request
    is_hub = request.reference is not None and request.reference.kind == "hub"
    is_auto = request.wanted.quant == quants.AUTO and not request.frozen
    return is_hub and is_auto and not steps.resolve_is_done()


def after_resolve(steps: Steps, step: str) -> list[str]:
    """`resolve`, unless it needs `step` itself."""
    return [] if lacks_model(steps) or step in comes_first(steps) else ["resolve"]


def source(steps: Steps) -> Task:
    return task(
        lambda: doing.get_source(steps),
        done=steps.source_is_done,
        after=["_check", *after_resolve(steps, "source")],
        clean=lambda: undoing.clean_source(steps),
        forget=lambda: undoing.forget_source(steps),
    )


def build_ui(steps: Steps) -> Task:
    return task(
        steps.programs.make_page,
        done=steps.programs.page_is_done,
        after=["_check", "_compiler", "source"],
        clean=lambda: undoing.clean_page(steps),
        forget=lambda: undoing.forget_page(steps),
    )


def cuda_toolkit(steps: Steps) -> Task:
    return task(
        steps.programs.make_toolkit,
        done=steps.programs.toolkit_is_done,
        after=["_check", "_compiler"],
        clean=lambda: undoing.clean_toolkit(steps),
        forget=lambda: undoing.forget_toolkit(steps),
    )


def build_bins(steps: Steps) -> Task:
    return task(
        lambda: doing.build_bins(steps),
        done=steps.bins_are_done,
        after=[
            *("_check", "_compiler", *goes_into_a_build(steps)),
            *after_resolve(steps, "build_bins"),
        ],
        clean=lambda: undoing.clean_bins(steps),
        forget=lambda: undoing.forget_bins(steps),
    )


def goes_into_a_build(steps: Steps) -> list[str]:
    return ["source", "build_ui", "cuda_toolkit"] if steps.programs.are_compiled else []


def package(steps: Steps) -> Task:
    def run() -> None:
        from . import packaging  # archives are of no use to other tasks

        packaging.pack(steps)

    def clean() -> None:
        from . import packaging

        packaging.clean(steps)

    def forget() -> None:
        from . import packaging

        packaging.forget(steps)

    after = ["_check", *(["source"] if steps.programs.are_compiled else [])]
    return task(run, after=after, clean=clean, forget=forget)


def install_package(steps: Steps) -> Task:
    def run() -> None:
        from . import packaging

        packaging.install_package(steps)

    return task(run, after=["_writable"])


def recipe(steps: Steps) -> Task:
    return task(lambda: doing.tell_recipe(steps))


def resolve(steps: Steps) -> Task:
    return task(
        lambda: resolving.resolve(steps),
        done=steps.resolve_is_done,
        after=["_check", *comes_first(steps)],
        clean=lambda: undoing.clean_resolve(steps),
        forget=lambda: undoing.forget_resolve(steps),  # its answer is its receipt
        lacks_model=lacks_model(steps),
    )


def fetch(steps: Steps) -> Task:
    return task(
        lambda: doing.fetch(steps),
        done=steps.fetch_is_done,
        # options of the server are checked first, where there are any
        after=["resolve", "_settle", "_flags"] if steps.request.settings.server else ["resolve"],
        clean=lambda: undoing.clean(steps, "fetch"),
        forget=lambda: undoing.forget(steps, "fetch"),
        lacks_model=lacks_model(steps),
    )


def converter(steps: Steps) -> Task:
    return task(
        lambda: doing.make_converter(steps),
        done=steps.converter_is_done,
        after=["_settle", "fetch"] if after_resolve(steps, "converter") else [],
        clean=lambda: undoing.clean_converter(steps),
        forget=lambda: undoing.forget_converter(steps),
    )


def convert(steps: Steps) -> Task:
    return task(
        lambda: doing.convert(steps),
        done=steps.convert_is_done,
        after=PREPARATION[:-2],
        clean=lambda: undoing.clean(steps, "convert"),
        forget=lambda: undoing.forget(steps, "convert"),
        lacks_model=lacks_model(steps),
    )


def quantize(steps: Steps) -> Task:
    return task(
        lambda: doing.quantize(steps),
        done=steps.quantize_is_done,
        after=PREPARATION[:-1],
        clean=lambda: undoing.clean(steps, "quantize"),
        forget=lambda: undoing.forget(steps, "quantize"),
        lacks_model=lacks_model(steps),
    )


def prepare(steps: Steps) -> Task:
    return {
        "actions": None,
        "task_dep": ["_frozen"],
        "meta": {"lacks_model": lacks_model(steps)},
    }


def serve(steps: Steps) -> Task:
    return task(
        lambda: serving.serve(steps),
        after=["_port", *(["_flags"] if steps.request.settings.server else []), "_frozen"],
        lacks_model=lacks_model(steps),
    )


def lock(steps: Steps) -> Task:
    return task(
        lambda: locking.lock(steps), after=["_lockable", "_frozen"], lacks_model=lacks_model(steps)
    )


def lockable(steps: Steps) -> Task:
    return task(lambda: locking.require_writable(steps))


def plan(steps: Steps) -> Task:
    return task(lambda: planning.plan(steps), lacks_model=lacks_model(steps))


def verify(steps: Steps) -> Task:
    return task(lambda: verifying.verify(steps))


def doctor(steps: Steps) -> Task:
    def run() -> None:
        from . import doctor as doctoring  # no other task looks so closely

        doctoring.doctor(steps)

    return task(run)


def test() -> Task:
    """pytest in this environment, with what the tests need installed first."""

    def run(words: list[str]) -> TaskFailed | None:
        return guarded(lambda: pytest(words))()

    def pytest(words: list[str]) -> None:
        try:
            bootstrap.install("test")
        except bootstrap.BootstrapError as error:
            raise PipelineError(error.message, error.hint) from None
        status = process.attached([sys.executable, "-m", "pytest", *words], cwd=REPOSITORY)
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
        checking.check(steps)
        locking.require(steps, before=True)
        if asks_before_building(steps):
            resolving.listing(steps)

    return task(run)


def writable(steps: Steps) -> Task:
    return task(lambda: checking.require_writable(steps))


def frozen(steps: Steps) -> Task:
    return task(
        lambda: locking.require(steps), done=lambda: not steps.request.frozen, after=PREPARATION
    )


def compiler(steps: Steps) -> Task:
    return task(lambda: checking.check_compiler(steps))


def settle(steps: Steps) -> Task:
    return task(lambda: doing.settle(steps), done=steps.is_settled, after=PREPARED_FOR)


def port(steps: Steps) -> Task:
    return task(lambda: serving.check_start(steps))


def flags(steps: Steps) -> Task:
    return task(lambda: serving.check_flags(steps), after=["build_bins"])
