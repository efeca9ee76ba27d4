"""The steps that llama.cpp's programs come from."""

from __future__ import annotations

from pipeline.commands import check, make
from pipeline.commands import clean as undoing
from pipeline.commands.model import Steps

from .order import after_resolve
from .task import Task, task


def source(steps: Steps) -> Task:
    return task(
        lambda: make.get_source(steps),
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
        lambda: make.build_bins(steps),
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
        from pipeline.commands import package as packaging  # archives are of no use to other tasks

        packaging.pack(steps)

    def clean() -> None:
        from pipeline.commands import package as packaging

        packaging.clean(steps)

    def forget() -> None:
        from pipeline.commands import package as packaging

        packaging.forget(steps)

    after = ["_check", *(["source"] if steps.programs.are_compiled else [])]
    return task(run, after=after, clean=clean, forget=forget)


def install_package(steps: Steps) -> Task:
    def run() -> None:
        from pipeline.commands import package as packaging

        packaging.install_package(steps)

    return task(run, after=["_writable"])


def recipe(steps: Steps) -> Task:
    return task(lambda: make.tell_recipe(steps))


def compiler(steps: Steps) -> Task:
    return task(lambda: check.check_compiler(steps))


def writable(steps: Steps) -> Task:
    return task(lambda: check.require_writable(steps))
