"""What a step is, and what the command line decides about it: what it lacks, what runs before it.

Nothing is imported here but at need, as in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.commands.model import Steps

# doit runs a task as soon as what it is `after` has run, so the order stands in `after` alone:
# what can go wrong soonest comes first, and nothing large is fetched before the request is sound.
PREPARED_FOR = ("_check", "_compiler", "resolve", "source", "build_bins")
PREPARATION = (*PREPARED_FOR, "_settle", "fetch", "converter", "convert", "quantize")


def nothing(steps: Steps) -> str:
    return ""


def model(steps: Steps) -> str:
    """What is missing where no model is given."""
    if steps.request.reference or steps.configured:
        return ""
    return "no model given; pass model=… (try model=demo)"


def servers(steps: Steps) -> str:
    """What is missing where no file of servers is given."""
    if steps.configured:
        return ""
    return "no servers given; pass config=… (configs/ has examples) or profile=…"


def servers_or_url(steps: Steps) -> str:
    return "" if steps.request.many.url else servers(steps)


@dataclass(frozen=True, slots=True)
class Step:
    """A step. One without `done` always runs. A name that begins with _ is not listed: such a
    step finds mistakes before any work, or belongs to another one."""

    name: str
    help: str
    run: Callable[[Steps], None] = lambda steps: None
    done: Callable[[Steps], bool] | None = None
    after: Sequence[str] | Callable[[Steps], Sequence[str]] = ()
    clean: Callable[[Steps], None] | None = None
    forget: Callable[[Steps], None] | None = None
    needs: Callable[[Steps], str] = nothing  # what the command line has to name, if it does not
    run_with: Callable[[Steps, Sequence[str]], None] | None = None  # words of another program
    each_model: bool = False  # one sub-task for each model of a configuration
    is_group: Callable[[Steps], bool] = lambda steps: False  # no more than what it is after
    reads: tuple[str, ...] = ()  # variables, or groups of them


# What has to run before what, where that depends on the model or the servers that are named


def is_auto(steps: Steps) -> bool:
    from pipeline.models import quants

    return steps.request.wanted.quant == quants.AUTO


def before_resolve(steps: Steps) -> list[str]:
    """Of a folder the source knows the architectures, and quant=auto asks the programs and the
    converter. All else is resolved before any of it."""
    reference = steps.request.reference
    if reference is None:
        return []
    if is_auto(steps):
        is_converted = reference.kind in ("demo", "folder")
        return ["source", "build_bins", *(["converter"] if is_converted else [])]
    return ["source"] if reference.kind == "folder" else []


def after_resolve(steps: Steps, step: str) -> list[str]:
    """`resolve`, unless it needs `step` itself."""
    needed = any(step in before_resolve(model) for model in steps.models.values())
    return [] if needed or not steps.models else ["resolve"]


def has_flags(steps: Steps) -> bool:
    """Whether options of the server are given."""
    return bool(steps.request.settings.server)


def before_start(steps: Steps) -> list[str]:
    """What has to be there before a server of a file is started."""
    if steps.configured is None:
        return []
    frozen = ["_frozen"] if steps.models else []
    return ["_config", "_places", *builds(steps), "_options", *frozen]


def builds(steps: Steps) -> list[str]:
    """The step that makes llama-server, where none is found elsewhere."""
    return ["build_bins"] if steps.configured and steps.configured.needs_programs else []


def is_router(steps: Steps) -> bool:
    """Whether llama-server's own router is the gateway, which starts the servers itself."""
    from pipeline.commands.variables import ROUTER

    return steps.request.many.engine == ROUTER
