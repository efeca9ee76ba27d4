"""`graph`: the steps, which run after which, and which have something to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute
from pipeline.core.store.publish import disk_errors, publish_beside
from pipeline.report import task_graph
from pipeline.report.task_graph import StepNode

from .session import Session


def graph(session: Session, nodes: Sequence[StepNode]) -> None:
    """Print the steps that the request takes: as a tree, as JSON, or as a picture into the file
    `out=`. Without a model, all steps that run after others. Raises PipelineError."""
    request = session.request
    draw = drawing(request.out) if request.out else None
    shown = needed(session, nodes)
    if draw:
        title = f"Steps of {request.named}" if request.named else "Steps"
        write(absolute(request.out), draw(shown, title))
    elif request.json:
        print(task_graph.document(shown))
    else:
        print(task_graph.tree(shown, is_ascii=not can_draw(sys.stdout.encoding)))


def needed(session: Session, nodes: Sequence[StepNode]) -> list[StepNode]:
    """The steps below the one that serves what is named; else all that belong together."""
    if session.servers:
        nodes = task_graph.below(nodes, "up")
    elif session.request.reference:
        nodes = task_graph.below(nodes, "serve")
    else:
        before = {name for node in nodes for name in node.after}
        nodes = [node for node in nodes if node.after or node.name in before]
    return task_graph.reduced(nodes)


def drawing(out: str) -> Callable[[Sequence[StepNode], str], str]:
    """What draws a file of this name. Raises UsageError."""
    kinds: Mapping[str, Callable[[Sequence[StepNode], str], str]] = {
        ".svg": lambda nodes, title: task_graph.picture(nodes, title).file(),
        ".html": task_graph.html,
        ".dot": lambda nodes, title: task_graph.dot(nodes),
    }
    suffix = Path(out).suffix.lower()
    if suffix not in kinds:
        raise UsageError(f"out={out}: the file's name must end in {', '.join(kinds)}")
    return kinds[suffix]


def write(path: Path, text: str) -> None:
    """Write a picture, and print where it is. Raises PipelineError."""
    if path.is_dir():
        raise UsageError(f"out={path}: is a folder", "name a file in it")
    with disk_errors(path.parent, "out="):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_beside(path, text.encode())
    log.info(f"written: {path}")


def can_draw(encoding: str) -> bool:
    """Whether a terminal of this encoding has lines to draw a tree with."""
    try:
        "├└│─".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
