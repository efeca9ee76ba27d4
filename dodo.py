"""Any model reference to a running llama.cpp server, doing only the work that is missing.

    doit serve model=demo            a real model, served
    doit plan model=org/model        what that would take
    doit list                        the steps; --status: which have something to do

doit finds its tasks here. The steps stand in pipeline/tasks/table.py, one entry each: start
reading there. They keep receipts, not a database: doit is told that it has nothing to remember.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.tasks.doit import Reporter, Task, session, tasks
from pipeline.tasks.table import STEPS

DOIT_CONFIG = {
    "backend": "nothing",
    "default_tasks": ["_help"],
    "reporter": Reporter,
    "verbosity": 2,
}

steps = session()


def task_steps() -> Iterator[Task]:
    """A task for each step, and one for each model of a configuration."""
    yield from tasks(STEPS, steps)
