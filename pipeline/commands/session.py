"""One command line: its programs, its models and its servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from pipeline.core import paths
from pipeline.core.errors import UsageError

from . import servers  # loaded where there is a file of them
from .model import Model
from .programs import Programs
from .request import Request


class Session:
    """Reads a file of servers where the request names one; all else is looked up on first use."""

    def __init__(self, request: Request, variables: Mapping[str, str]) -> None:
        self.request = request
        self.variables = variables  # as typed
        self.home = paths.home()
        self.programs = Programs(request, self.home)
        self.model = Model(request, self.programs)
        self.servers: servers.Servers | None = None
        # by name: the one model of a request, or those of its servers
        self.models: Mapping[str, Model] = {}
        if request.reference:
            self.models = {"model": self.model, **self.model.beside}
        if request.servers.source:
            self.servers = servers.Servers(self.programs, variables)
            self.models = self.servers.models

    def require_servers(self) -> servers.Servers:
        """The servers. Raises UsageError where no file of them is named."""
        if self.servers is None:
            raise UsageError("no servers given; pass config=… (configs/ has examples) or profile=…")
        return self.servers

    def all_models(self, is_done: Callable[[Model], bool]) -> bool:
        """Whether `is_done` holds for every model; where none is named, for the empty one."""
        return all(map(is_done, self.models.values() or (self.model,)))


def confirmed(question: str) -> bool:
    """Ask at the terminal; anything but yes is no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
