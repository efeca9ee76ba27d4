"""llama.cpp's programs for one request: which ones, where they come from, whether they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from pipeline.bins import binaries, platform
from pipeline.bins.binaries import Binaries
from pipeline.bins.build_options import AUTO, ProgramSource
from pipeline.bins.compile import backends, cuda_toolkit, web_ui
from pipeline.bins.compile.build import Build
from pipeline.bins.compile.source import Source
from pipeline.bins.compile.web_ui import Ui
from pipeline.bins.hardware import cuda_versions, select
from pipeline.bins.hardware.cuda_versions import CudaRelease
from pipeline.bins.hardware.select import Selection
from pipeline.core.paths import Home
from pipeline.core.pins import pins

from .request import Request


class Programs:
    """Nothing is looked up before it is asked for."""

    def __init__(self, request: Request, home: Home, source: Callable[[], Source]) -> None:
        self.request = request
        self.wish = request.bins
        self.home = home
        self._source = source

    @property
    def are_external(self) -> bool:
        """Whether they are the user's own: then none are made. Asked while doit reads the tasks,
        so a folder that has no programs is an error only of steps that need some."""
        return bool(binaries.chosen_folder())

    @property
    def are_compiled(self) -> bool:
        return not self.are_external and self.wish.way == "build"

    @cached_property
    def selection(self) -> Selection:
        """The backend, and why."""
        return select.select(self.wish, self.home)

    @cached_property
    def way(self) -> ProgramSource:
        """Where they come from."""
        if self.wish.way == "package":
            from pipeline.bins.package import install

            return install.Packaged(install.default_target(self.home))
        if self.wish.way == "prebuilt":
            from pipeline.bins.release import prebuilt

            return prebuilt.Prebuilt(
                platform=platform.platform_tag(),
                backend=self.selection.backend,
                release=self.wish.release or pins().prebuilt.release,
                home=self.home,
                driver_cuda=lambda: cuda_versions.newest(self.selection.driver),
            )
        return Build(
            source=self._source(),
            backend=backends.backend(self.selection, self.home, self.wish),
            home=self.home,
            portable=bool(self.wish.portable),
            elsewhere=self.wish.is_for_elsewhere and bool(self.selection.device_lacks),
            jobs=self.wish.jobs,
            page=self.page,
        )

    @property
    def binaries(self) -> Binaries:
        """The user's own programs where the environment names some, else those that are made."""
        own = binaries.external(self.home)
        return own or Binaries(folder=self.way.programs, commit=self.way.commit, home=self.home)

    @property
    def tool(self) -> Mapping[str, Any] | None:
        """How receipts name llama-quantize; None while there is none."""
        program = self.binaries
        return program.recipe("llama-quantize") if program.has("llama-quantize") else None

    # What goes into a build

    @property
    def release(self) -> CudaRelease | None:
        """The CUDA toolkit that is fetched; None where none is."""
        is_fetched = self.are_compiled and self.selection.toolkit == select.WHEELS
        return cuda_versions.CUDA_13 if is_fetched else None

    @cached_property
    def page(self) -> Ui | None:
        """The page that is embedded; None where none is."""
        return web_ui.choose(self.wish.ui, self._source(), self.home)[0]

    @property
    def without_page(self) -> str:
        """Why no page is embedded; empty where one is."""
        return web_ui.choose(self.wish.ui, self._source(), self.home)[1]

    @property
    def backend(self) -> str:
        """What the programs are made for; empty where nobody knows."""
        return self.selection.backend if self.are_chosen else ""

    @property
    def are_chosen(self) -> bool:
        """Whether a backend is chosen: it is not for programs that are there as they are."""
        return not self.are_external and self.wish.way != "package"

    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the choice."""
        return self.selection.warnings if self.are_chosen else ()

    # Is there nothing to do?

    def are_done(self) -> bool:
        """Made; force=1 makes them again where no model is named, refresh=1 asks for releases."""
        anew = self.request.again or (self.request.refresh and self.wish.way == "prebuilt")
        return self.are_external or (not anew and self.way.is_current())

    def toolkit_is_done(self) -> bool:
        """There; or not needed."""
        if self.release is None or self.are_done():
            return True
        return not self.request.again and cuda_toolkit.is_current(self.home, self.release)

    def page_is_done(self) -> bool:
        """There; or not needed."""
        if not self.are_compiled or self.page is None or self.are_done():
            return True
        return not self.request.again and web_ui.is_current(self.page)

    # The work

    def require_device(self) -> None:
        """Raise PipelineError where the backend asked for has no device here, unless what is made
        is for other machines; auto ends where one is."""
        if self.are_chosen and self.wish.backend != AUTO and not self.wish.is_for_elsewhere:
            self.selection.require_device()

    def require_tools(self) -> None:
        """Raise PipelineError where something will have to be compiled and cannot be. Programs
        that are there may only have to be hashed."""
        if self.are_compiled and not self.are_done() and not self.way.target.exists():
            self.selection.require_tools()

    def make_toolkit(self) -> None:
        if self.release:
            offline, force = self.request.offline, self.request.again
            cuda_toolkit.make(self.release, self.home, offline=offline, force=force)

    def make_page(self) -> None:
        if self.are_compiled and self.page:
            web_ui.make(self.page, offline=self.request.offline, force=self.request.again)

    def make(self) -> None:
        self.way.make(
            force=self.request.again, offline=self.request.offline, refresh=self.request.refresh
        )

    def forget(self) -> None:
        """Look at the machine anew, too."""
        self.way.forget()
        select.forget(self.home)

    # For other machines

    def portable(self) -> Programs:
        """The same for other processors, unless portable=0 was said."""
        wish = self.wish
        if wish.way == "build" and wish.portable is None:
            wish = replace(wish, portable=True)
        return Programs(replace(self.request, bins=wish), self.home, self._source)
