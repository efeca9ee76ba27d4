"""All that bends doit: tasks out of steps, what it prints, its commands, the command line.

It speaks on stderr, in one line a task, and without tracebacks for what users can mend.
"""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import FrameType, ModuleType
from typing import Any, NoReturn

from doit import doit_cmd, loader
from doit.cmd_base import Command, check_tasks_exist
from doit.cmd_clean import Clean as DoitClean
from doit.cmd_forget import Forget as DoitForget
from doit.cmd_help import Help as DoitHelp
from doit.cmd_info import Info as DoitInfo
from doit.dependency import JsonDB
from doit.exceptions import TaskFailed
from doit.reporter import ConsoleReporter

from pipeline.commands import remove
from pipeline.commands.request import request
from pipeline.commands.session import Session
from pipeline.core import log, paths
from pipeline.core.environment import FOREIGN_MODULES, launch_settings, place
from pipeline.core.errors import PipelineError, UsageError, doitw, is_plain_doit
from pipeline.core.sandbox import SWITCH, is_off, require_switch
from pipeline.core.store import publish
from pipeline.serve.config.named import misspelled
from pipeline.serve.server import OFF

from . import completion, reference
from .command_line import require_read, understood
from .step import AnyStep, ModelStep, Step, Subject, step_models

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WRONG_USAGE = 3

Task = dict[str, Any]  # as doit takes it
LIVE: Task = {"uptodate": [False], "io": {"capture": False}, "verbosity": 2}  # prints as it goes


def session() -> Session:
    """Read the command line's variables. Mistakes end the run before doit starts a task."""
    sort_without_source()
    interrupt_on_termination()
    log.guard_streams()
    drop_foreign_modules()
    if is_plain_doit():
        read_as_doitw_does()
    place(os.environ)
    for line in misspelled(os.environ):
        log.info(line)
    inherited = launch_settings(os.environ)
    for name in inherited:
        del os.environ[name]
    if inherited:
        log.info(
            f"not used, though set: {', '.join(inherited)}; give options as "
            "server.NAME=…, a key as api_key_file=…"
        )
    words, steps = typed()
    try:
        requested = request(words, by_name="remove" in steps)
        require_read(steps, words)
        if requested.force and "tune" in steps:  # it measures again, and makes nothing again
            requested = request({**words, "force": "0"}).replace(anew=True)
        requested = requested.replace(measures=not {"quality", "compare"}.isdisjoint(steps))
        require_switch()
        made = Session(requested, words)
    except PipelineError as error:
        refuse(error)
    except OSError as error:  # a path that cannot even be looked for
        refuse(f"{error.filename or 'the system'}: {error.strerror or error}")
    if requested.sandbox == OFF:
        os.environ[SWITCH] = "off"
    if is_off():
        log.info("warning: the sandbox is off: what reads a model may do all that you may")
    return made


def drop_foreign_modules() -> None:
    """Plain doit: what another program needs in PYTHONPATH must not hide what we import from now
    on, nor reach what we start."""
    foreign = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:] = [folder for folder in sys.path[1:] if folder not in foreign]
    for name in FOREIGN_MODULES:
        os.environ.pop(name, None)


def read_as_doitw_does() -> None:
    """Plain doit understands `--name value` and names what is near, as far as it gets here: it
    is run once more with the words as it takes them."""
    words = sys.argv[1:]
    try:
        same = understood(words, is_plain=True)
    except UsageError as error:
        refuse(error)
    if same != words:
        sys.argv[1:] = same
        sys.modules.pop("dodo", None)  # it is being imported; the next run does it anew
        raise SystemExit(doit_cmd.DoitMain().run(same))


def tasks(table: Iterable[Step | ModelStep], session: Session) -> Iterator[Task]:
    """The tasks for the steps of a table: one each, or a group with one for each model."""
    has_model = bool(session.request.reference or session.servers)
    for step in table:
        named = {"basename": step.name, "doc": step.help}
        lacks_model = step.needs_model and not has_model
        if isinstance(step, Step):
            yield {**_task_of_session(step, session, lacks_model=lacks_model), **named}
            continue
        models = step_models(session)
        if "" not in models:
            yield {**named, "name": None}  # the group of those that follow
        for name, model in models.items():
            task = _task(step, model, lacks_model=lacks_model)
            yield {**task, "basename": step.name, "name": name} if name else {**task, **named}


def _task_of_session(step: Step, session: Session, *, lacks_model: bool) -> Task:
    task = _task(step, session, lacks_model=lacks_model)
    if step.is_group(session):
        return {"task_dep": task["task_dep"], "meta": task["meta"], "actions": None}
    if run_with := step.run_with:

        def run(words: list[str]) -> TaskFailed | None:
            return guarded(lambda: run_with(session, behind_dashes(words)))()

        return {**task, "actions": [run], "pos_arg": "words"}
    return task


def _task(step: AnyStep[Subject], subject: Subject, *, lacks_model: bool) -> Task:
    """A task that prints live, and whose `done` alone decides whether it runs."""
    clean, forget = step.clean, step.forget
    return {
        **LIVE,
        "task_dep": step.runs_after(subject),
        "setup": list(step.setup(subject)),
        "meta": {
            "forget": (lambda: forget(subject)) if forget else None,
            "lacks_model": lacks_model,
        },
        "actions": [guarded(lambda: step.run(subject))],
        "uptodate": [uninterrupted(lambda: step.is_done(subject)) if step.done else False],
        "clean": [guarded_clean(lambda: clean(subject))] if clean else [],
    }


class Nothing(JsonDB):  # type: ignore[misc]
    """The database that doit wants. Nothing outlives the run: receipts know what is done."""

    desc = "keeps nothing"

    def __init__(self, name: str, codec: Any, *, module_name: str | None = None) -> None:
        self.name = name
        self._db: dict[str, dict[str, Any]] = {}  # doit's own class looks for a file

    def dump(self) -> None:
        """Write nothing."""


def sort_without_source() -> None:
    """doit sorts the functions of dodo.py by the line that each begins in, and has Python read and
    tokenize the source for it: a tenth of the time that a run takes which has nothing to do."""
    quick = ModuleType(inspect.__name__)
    vars(quick).update(vars(inspect))
    vars(quick)["getsourcelines"] = lambda function: ([], function.__code__.co_firstlineno)
    loader.inspect = quick


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """doit's own marks, on stderr: `--` up to date, `.` done now."""

    desc = "one line a task, on stderr"

    def __init__(self, outstream: Any, options: dict[str, Any]) -> None:
        super().__init__(sys.stderr, options)

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """Before any work: what is selected must know its model."""
        for name in selected_tasks:
            if (tasks[name].meta or {}).get("lacks_model"):
                refuse(f"{name}: no model given; pass model=… (try model=demo)")

    def complete_run(self) -> None:
        """Failures were printed when they happened."""
        for message in self.runtime_errors:
            self.write(f"{message}\n")

    def _write_failure(self, result: dict[str, Any], write_exception: bool = True) -> None:
        name = result["task"].name
        if name.startswith("_"):  # a step that `doit list` does not show: of use is whose it is
            name = name.partition(":")[2]
        message = result["exception"].get_msg().strip()
        self.write(f"error: {name}: {message}\n" if name else f"error: {message}\n")


def refuse(error: object) -> NoReturn:
    """End the run for wrong usage; doit would print the same as its own error."""
    log.info(f"error: {error}")
    raise SystemExit(WRONG_USAGE)


def guarded(action: Callable[[], None]) -> Callable[[], TaskFailed | None]:
    """The action as doit wants it: errors as messages, an interruption as a clean end."""

    def run() -> TaskFailed | None:
        try:
            action()
            sys.stdout.flush()
        except UsageError as error:
            refuse(error)
        except PipelineError as error:
            return TaskFailed(str(error))
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except OSError as error:
            return TaskFailed(publish.described(error, paths.home().root))
        except KeyboardInterrupt:
            log.info("interrupted; finished steps are kept; run again to continue")
            raise SystemExit(INTERRUPTED) from None
        return None

    return run


def uninterrupted(question: Callable[[], bool]) -> Callable[[], bool]:
    """A question as doit's `uptodate` wants it: an interruption is a clean end."""

    def ask() -> bool:
        try:
            return question()
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    return ask


def guarded_clean(clean: Callable[[], None]) -> Callable[[], None]:
    """As `guarded`; doit goes on after a failed clean action, and ends well: this does not."""
    run = guarded(clean)

    def clean_or_exit() -> None:
        failed = run()
        if failed:
            log.info(f"error: {failed.get_msg().strip()}")
            raise SystemExit(1)

    return clean_or_exit


def interrupt_on_termination() -> None:
    """SIGTERM and a closed terminal end a run as Ctrl-C does: children first, then we."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)  # ignored already: that is how nohup works


def typed() -> tuple[dict[str, str], list[str]]:
    """The variables of the command line, and its other words but options. doit would take words
    behind `--`, which are for another program, for variables, too."""
    end = sys.argv.index("--") if "--" in sys.argv else None
    words = [word for word in sys.argv[1:end] if not word.startswith("-")]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    return variables, [word for word in words if "=" not in word]


def behind_dashes(words: Sequence[str]) -> list[str]:
    """The words for another program, as they were typed behind `--`: doit takes some away."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else list(words)


# Commands, named in pyproject.toml


class Forget(DoitForget):  # type: ignore[misc]
    """Drop receipts: doit's own forgets a database, which is not used here."""

    doc_purpose = "drop the receipts of tasks, so that they run again"
    cmd_options = ()

    def _execute(self) -> int:
        tasks = {task.name: task for task in self.task_list}
        names = [] if self.sel_default_tasks else self.sel_tasks
        check_tasks_exist(tasks, names)
        if not names:
            self.outstream.write(f"no task given; name one: {doitw('forget TASK …')}\n")
            return WRONG_USAGE
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
    """Remove what tasks made, and say what was cleaned: doit's own names functions."""

    doc_purpose = "remove what tasks made, with its receipts"

    def clean_tasks(self, tasks: Iterable[Any], dryrun: bool, cleanforget: bool) -> None:
        """Clean each of them once; `cleanforget` changes nothing, the receipts always go."""
        makers = [task for task in {t.name: t for t in tasks}.values() if task.clean_actions]

        def clean() -> None:
            with nullcontext() if dryrun or not makers else remove.no_other_run(paths.home()):
                for task in makers:
                    task.clean(io.StringIO(), dryrun)
                    self.outstream.write(f"{'would clean' if dryrun else 'cleaned'} {task.name}\n")

        guarded_clean(clean)()
        if not makers:
            example = doitw("clean quantize …")
            self.outstream.write(f"nothing to clean; name a task, as in {example}\n")
        self.dep_manager.close()


class Info(DoitInfo):  # type: ignore[misc]
    """What a step is after, and whether it has something to do: doit's own names functions."""

    doc_purpose = "show what a task runs after, and whether it is up to date"

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> int:
        tasks = {task.name: task for task in self.task_list}
        for name in pos_args:
            tasks[name].meta = None
        return int(super()._execute(pos_args, hide_status))

    @staticmethod
    def get_reasons(reasons: Mapping[str, Any]) -> str:
        return " * it has something to do"


class Help(DoitHelp):  # type: ignore[misc]
    """Help on a step with its variables, and on a variable: doit's own knows neither."""

    doc_usage = "[TASK] [VARIABLE] [COMMAND]"

    def execute(self, params: Any, args: list[str]) -> int:
        text = reference.help_of(args[0]) if len(args) == 1 and args[0] not in self.cmds else ""
        if text:
            print(text, end="")
            return 0
        return int(super().execute(params, args))


class Completion(Command):  # type: ignore[misc]
    """What a shell has to read to complete tasks and variables."""

    doc_purpose = "print what completes tasks and variables in bash, zsh, fish or powershell"
    doc_usage = "[SHELL]"
    cmd_options = (
        {
            **{"name": "shell", "short": "s", "long": "shell", "type": str, "default": "bash"},
            "help": "bash, zsh, fish or powershell [default: %(default)s]",
        },
    )

    def execute(self, params: Any, args: list[str]) -> int:
        shell = next(iter(args), params["shell"])
        if shell not in completion.SHELLS or len(args) > 1:
            known = ", ".join(completion.SHELLS)
            log.info(f"completion: {' '.join(args) or shell}: must be one of {known}")
            return WRONG_USAGE
        print(completion.script(shell), end="")
        return 0
