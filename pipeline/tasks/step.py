"""What a step is, and what runs before it, where the command line decides that.

Nothing is imported here but at need, as in the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from msgspec import Struct

from pipeline import commands as do
from pipeline.commands import variables
from pipeline.core.errors import PipelineError
from pipeline.models import quants

if TYPE_CHECKING:
    from pipeline.commands.model import Model
    from pipeline.commands.session import Session

# doit runs a task as soon as what it is `after` has run, so the order stands in `after` alone:
# what can go wrong soonest comes first, and nothing large is fetched before the request is sound.
PREPARED_FOR = ("_check", "_compiler", "resolve", "source", "build_bins")
PREPARATION = (*PREPARED_FOR, "_settle", "fetch", "converter", "convert", "quantize")


Subject = TypeVar("Subject")


class AnyStep(Struct, Generic[Subject], frozen=True):
    """A step. One without `done` always runs. A name that begins with _ is not listed: such a
    step finds errors before any work, or belongs to another one."""

    name: str
    help: str
    run: Callable[[Subject], None] = lambda subject: None
    done: Callable[[Subject], bool] | None = None
    due: str = ""  # what `graph` says of it while it is not done
    after: Sequence[str] | Callable[[Subject], Sequence[str]] = ()
    setup: Callable[[Subject], Sequence[str]] = lambda subject: ()  # run before it, if it has to
    clean: Callable[[Subject], None] | None = None
    forget: Callable[[Subject], None] | None = None
    needs_model: bool = False  # or a file of servers: what the command line has to name
    reads: tuple[str, ...] = ()  # variables, or groups of them
    also: str = ""  # a step whose variables it takes too: the same words prepare what that one does

    def runs_after(self, subject: Subject) -> list[str]:
        """The names of the steps that run before it."""
        return list(self.after(subject) if callable(self.after) else self.after)

    def is_done(self, subject: Subject) -> bool:
        """Whether it has nothing to do. Where that cannot be told, it runs, and says what is
        wrong."""
        try:
            return self.done is not None and self.done(subject)
        except (PipelineError, OSError):
            return False


class Step(AnyStep["Session"], Struct, frozen=True):
    """A step of a whole command line."""

    run_with: Callable[[Session, Sequence[str]], None] | None = None  # words of another program
    is_group: Callable[[Session], bool] = lambda session: False  # no more than what it is after


class ModelStep(AnyStep["Model"], Struct, frozen=True):
    """A step of one model: one sub-task for each model of a file of servers."""

    needs_model: bool = True
    also: str = "serve"


def making(
    name: Literal["fetch", "convert", "quantize"],
    help: str,
    *,
    run: Callable[[Model], None],
    after: Sequence[str] | Callable[[Model], Sequence[str]],
    reads: tuple[str, ...],
) -> ModelStep:
    """A step that makes files of a model, each with its receipt."""
    return ModelStep(
        name,
        help,
        run=run,
        done=lambda model: model.is_done(name),
        due="known once the model is resolved",
        after=after,
        clean=lambda model: do.clean.clean(model, name),
        forget=lambda model: do.clean.forget(model, name),
        reads=reads,
    )


def step_models(session: Session) -> dict[str, Model]:
    """The models that a `ModelStep` has a task for, by the names of the tasks; the name is empty
    where there is one task."""
    alone = session.servers is None and len(session.models) < 2
    return {"": session.model} if alone else dict(session.models)


# What has to run before what, where that depends on the model or the servers that are named


def before_resolve(model: Model) -> list[str]:
    """Of a folder the source knows the architectures, and quant=auto and fit ask the programs and
    the converter. All else is resolved before any of it."""
    reference = model.request.reference
    if reference is None or model.base:
        return []
    if model.request.wanted.quant in quants.DECIDED:
        return ["source", "build_bins", *(["converter"] if reference.is_safetensors else [])]
    return ["source"] if reference.kind == "folder" else []


def after_resolve(session: Session, step: str) -> list[str]:
    """`resolve` and what is checked then, unless it needs `step` itself."""
    needed = any(step in before_resolve(model) for model in session.models.values())
    return [] if needed or not session.models else ["resolve", *before_talk()]


def before_talk() -> list[str]:
    """The step that refuses a model which cannot chat, before anything large: only for `chat`."""
    return ["_talks"] if "chat" in sys.argv[1:] else []


def before_build(session: Session) -> list[str]:
    """What is known before the build, which fetches the models beside it, if it can be."""
    resolved = after_resolve(session, "build_bins")
    return [*resolved, "_fits"] if resolved else []


def beside_build() -> list[str]:
    """The build, which downloads the model meanwhile, unless `fetch` itself was typed."""
    return [] if is_named("fetch") else ["build_bins"]


def is_named(step: str) -> bool:
    """Whether the command line names a step, or the sub-task of a model."""
    return any(word.partition(":")[0] == step for word in sys.argv[1:])


def before_start(session: Session) -> list[str]:
    """What has to be there before a server of a file is started."""
    frozen = ["_frozen"] if session.models else []
    return ["_config", "_places", *builds(session), "_options", *frozen]


def before_measuring(session: Session) -> list[str]:
    """What has to be there before a model is measured."""
    return [*PREPARED_FOR, *(["_flags"] if session.request.has_options else [])]


def builds(session: Session) -> list[str]:
    """The step that makes llama-server, where none is found elsewhere."""
    return ["build_bins"] if session.servers and session.servers.needs_programs else []


def is_router(session: Session) -> bool:
    """Whether llama-server's own router is the gateway, which starts the servers itself."""
    return session.request.servers.engine == variables.ROUTER
