"""A step as the dict that doit wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.core import log

from .doit import checked, guarded

Task = dict[str, Any]
Tasks = Task | Iterator[Task]


def task(
    action: Callable[[], None],
    *,
    done: Callable[[], bool] | None = None,
    after: list[str] | None = None,
    clean: Callable[[], None] | None = None,
    forget: Callable[[], None] | None = None,
    lacks: str = "",
) -> Task:
    """A doit task that prints live, and whose `done` alone decides whether it runs. `lacks` says
    what the command line has to name for it."""
    return {
        "actions": [guarded(action)],
        "uptodate": [checked(done) if done else False],
        "task_dep": after or [],
        "clean": [guarded_clean(clean)] if clean else [],
        "meta": {"forget": forget, "lacks": lacks},
        "io": {"capture": False},
        "verbosity": 2,
    }


def guarded_clean(clean: Callable[[], None]) -> Callable[[], None]:
    """As `guarded`; doit goes on after a failed clean action, and ends well: this does not."""
    run = guarded(clean)

    def tell() -> None:
        failed = run()
        if failed:
            log.info(f"error: {failed.get_msg().strip()}")
            raise SystemExit(1)

    return tell
