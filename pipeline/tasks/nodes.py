"""The table of steps as a graph: the same order and the same states as `list --status` has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.report.task_graph import ALWAYS, DONE, TODO, StepNode

from .step import AnyStep, ModelStep, Step, Subject, step_models

if TYPE_CHECKING:
    from pipeline.commands.model import Model
    from pipeline.commands.session import Session


def nodes(steps: Iterable[Step | ModelStep], session: Session) -> list[StepNode]:
    """A node for each step that `list` shows. The hidden steps only find errors: what runs after
    such a step is shown after what that step runs after."""
    table = {step.name: step for step in steps}
    after = {name: before(step, session) for name, step in table.items()}

    def shown(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            yield from shown(after[name]) if name.startswith("_") else [name]

    made: dict[str, StepNode] = {}
    for name, step in table.items():
        if not name.startswith("_"):
            state, why = state_of(step, session)
            names = tuple(dict.fromkeys(shown(after[name])))
            made[name] = StepNode(name=name, help=step.help, after=names, state=state, why=why)
    for name, node in made.items():
        step = table[name]
        if isinstance(step, Step) and step.is_group(session):  # it is what it runs after
            is_due = any(made[each].state == TODO for each in node.after)
            made[name] = replace(node, state=TODO if is_due else DONE)
    return list(made.values())


def before(step: Step | ModelStep, session: Session) -> list[str]:
    """The names of the steps that a step runs after, for any model."""
    if isinstance(step, Step):
        return _before(step, session)
    return [name for model in step_models(session).values() for name in _before(step, model)]


def _before(step: AnyStep[Subject], subject: Subject) -> list[str]:
    names = (*step.runs_after(subject), *step.setup(subject))
    return [name.partition(":")[0] for name in names]


def state_of(step: Step | ModelStep, session: Session) -> tuple[str, str]:
    """Whether a step has something to do, and why."""
    if step.done is None:
        return ALWAYS, ""
    if isinstance(step, Step):
        return (DONE, "") if step.is_done(session) else (TODO, step.due)
    reasons = {
        name: reason(step, model)
        for name, model in step_models(session).items()
        if not step.is_done(model)
    }
    why = "; ".join(f"{name}: {text}" if name else text for name, text in reasons.items())
    return (TODO, why) if reasons else (DONE, "")


def reason(step: ModelStep, model: Model) -> str:
    """Why a step has something to do for a model."""
    if model.request.reference is None:
        return "no model is given"
    try:
        needs = model.needs()
    except (PipelineError, OSError):
        needs = None
    return str(getattr(needs, step.name, "") or step.due)
