"""`doit forget TASK`, which drops receipts: doit's own keeps a database that is not used here; and
`doit clean TASK`, which says what was cleaned: doit's own names functions."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from doit.cmd_base import check_tasks_exist
from doit.cmd_clean import Clean as DoitClean
from doit.cmd_forget import Forget as DoitForget

from pipeline.core.errors import doitw


class Forget(DoitForget):  # type: ignore[misc]
    """Forget what tasks made: they run again, the files stay until then."""

    doc_purpose = "drop the receipts of tasks, so that they run again"
    cmd_options = ()

    def _execute(self) -> int:
        from .doit import guarded

        tasks = {task.name: task for task in self.task_list}
        names = [] if self.sel_default_tasks else self.sel_tasks
        check_tasks_exist(tasks, names)
        if not names:
            self.outstream.write(f"no task given; name one: {doitw('forget TASK …')}\n")
            return 3
        for name in names:
            forget = (tasks[name].meta or {}).get("forget")
            if forget is None:
                self.outstream.write(f"{name} has no receipt\n")
                continue
            failed = guarded(forget)()
            if failed:
                self.outstream.write(f"error: {name}: {failed.get_msg().strip()}\n")
                return 1
            self.outstream.write(f"forgot {name}\n")
        return 0


class Clean(DoitClean):  # type: ignore[misc]
    """Remove what tasks made, with its receipts."""

    doc_purpose = "remove what tasks made, with its receipts"

    def clean_tasks(self, tasks: Iterable[Any], dryrun: bool, cleanforget: bool) -> None:
        """Clean each of them once; `cleanforget` changes nothing, the receipts always go."""
        makers = [task for task in {t.name: t for t in tasks}.values() if task.clean_actions]
        for task in makers:
            task.clean(io.StringIO(), dryrun)
            self.outstream.write(f"{'would clean' if dryrun else 'cleaned'} {task.name}\n")
        if not makers:
            self.outstream.write(
                f"nothing to clean; name a task, as in {doitw('clean quantize …')}\n"
            )
        self.dep_manager.close()
