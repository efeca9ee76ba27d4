"""The steps that llama.cpp's programs come from."""

from __future__ import annotations

from . import checking, doing, undoing
from .order import after_resolve
from .steps import Steps
from .task import Task, task


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


def compiler(steps: Steps) -> Task:
    return task(lambda: checking.check_compiler(steps))


def writable(steps: Steps) -> Task:
    return task(lambda: checking.require_writable(steps))
