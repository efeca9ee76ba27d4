"""llama.cpp's programs for one request: which ones, where they come from, whether they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from pipeline.bins import backends, binaries, build, cuda_wheels, selection
from pipeline.bins.binaries import Binaries
from pipeline.bins.build import Build
from pipeline.bins.cuda_wheels import Release
from pipeline.bins.selection import Selection
from pipeline.bins.source import Source
from pipeline.core.paths import Home

from .variables import Request


class Programs:
    """Nothing is looked up before it is asked for."""

    def __init__(self, request: Request, home: Home, source: Callable[[], Source]) -> None:
        self.request = request
        self.home = home
        self._source = source

    @property
    def are_external(self) -> bool:
        """Whether they are the user's own: then none are built."""
        return binaries.external(self.home) is not None

    @cached_property
    def selection(self) -> Selection:
        """The backend, and why."""
        return selection.select(self.request.bins, self.home)

    @cached_property
    def build(self) -> Build:
        """What to compile."""
        wish = self.request.bins
        backend = backends.backend(
            self.selection, self.home, architectures=wish.architectures, portable=wish.portable
        )
        return Build(
            source=self._source(),
            backend=backend,
            home=self.home,
            portable=wish.portable,
            elsewhere=wish.is_for_elsewhere and bool(self.selection.device_lacks),
            jobs=wish.jobs,
        )

    @property
    def binaries(self) -> Binaries:
        """The user's own programs where the environment names some, else those that are made."""
        own = binaries.external(self.home)
        return own or Binaries(
            folder=self.build.target, commit=self._source().commit, home=self.home
        )

    @property
    def tool(self) -> Mapping[str, Any] | None:
        """How receipts name llama-quantize; None while there is none."""
        program = self.binaries
        return program.recipe("llama-quantize") if program.has("llama-quantize") else None

    @property
    def release(self) -> Release | None:
        """The CUDA toolkit that is fetched for the build; None where none is."""
        return cuda_wheels.CUDA_13 if self.selection.toolkit == selection.WHEELS else None

    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the choice."""
        return () if self.are_external else self.selection.warnings

    # Is there nothing to do?

    def are_done(self, again: bool) -> bool:
        return self.are_external or (not again and build.is_current(self.build))

    def toolkit_is_done(self, again: bool) -> bool:
        """There; or not needed."""
        if self.are_external or self.release is None or self.are_done(again):
            return True
        return not again and cuda_wheels.is_current(self.home, self.release)

    # The work

    def require_device(self) -> None:
        """Raise PipelineError where the backend asked for has no device here, unless what is made
        is for other machines."""
        if not self.are_external and not self.request.bins.is_for_elsewhere:
            self.selection.require_device()

    def require_tools(self) -> None:
        """Raise PipelineError where something will have to be compiled and cannot be. Programs
        that are there may only have to be hashed."""
        if not self.are_done(again=False) and not self.build.target.exists():
            self.selection.require_tools()

    def make_toolkit(self, again: bool) -> None:
        if self.release:
            cuda_wheels.make(self.release, self.home, offline=self.request.offline, force=again)

    def make(self, again: bool) -> None:
        build.make(self.build, force=again)

    def clean(self) -> None:
        build.clean(self.build)

    def forget(self) -> None:
        """Look at the machine anew, too."""
        build.forget(self.build)
        selection.forget(self.home)
