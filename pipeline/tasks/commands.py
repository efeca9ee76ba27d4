"""`doit forget TASK`, which drops receipts: doit's own keeps a database that is not used here."""

from __future__ import annotations

from doit.cmd_base import check_tasks_exist
from doit.cmd_forget import Forget as DoitForget


class Forget(DoitForget):  # type: ignore[misc]
    """Forget what tasks made: they run again, the files stay until then."""

    doc_purpose = "drop the receipts of tasks, so that they run again"
    cmd_options = ()

    def _execute(self) -> int:
        from .reporting import guarded

        tasks = {task.name: task for task in self.task_list}
        names = [] if self.sel_default_tasks else self.sel_tasks
        check_tasks_exist(tasks, names)
        if not names:
            self.outstream.write("say which tasks: doit forget TASK …\n")
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
