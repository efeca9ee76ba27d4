"""The steps: for each, what it does, when it has nothing to do, and how it is undone.

The decisions are made in `bins`, `models` and `serve`; here they are put together for one
command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.bins import binaries, build, host, source
from pipeline.bins.backends import BACKENDS
from pipeline.core import artifacts, paths, receipts
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.locks import only_one
from pipeline.core.publish import remove
from pipeline.core.say import say
from pipeline.models import (
    chain,
    convert,
    converter,
    demo,
    hub,
    imatrix,
    quantize,
    quants,
    resolve,
)
from pipeline.models.chain import Chain, Needs
from pipeline.models.reference import Reference
from pipeline.models.resolve import Resolved

from .variables import Request


class Steps:
    """All steps for one request. Nothing is looked up before it is asked for."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.home = paths.home()
        self._source: source.Source | None = None
        self._resolved: Resolved | None = None

    # What there is to work with

    @property
    def llama_cpp(self) -> source.Source:
        if self._source is None:
            self._source = source.find(self.home)
        return self._source

    @property
    def build(self) -> build.Build:
        backend = BACKENDS[self.request.backend]
        return build.Build(source=self.llama_cpp, backend=backend, home=self.home)

    @property
    def binaries(self) -> binaries.Binaries:
        """The user's own programs where the environment names some, else those that are built."""
        return binaries.external(self.home) or binaries.Binaries(
            folder=self.build.target, commit=self.llama_cpp.commit, home=self.home
        )

    @property
    def tool(self) -> Mapping[str, Any] | None:
        """How receipts name llama-quantize; None while there is none."""
        program = self.binaries
        return program.recipe("llama-quantize") if program.has("llama-quantize") else None

    # The model, as far as it is known without network and without hashing

    def known(self) -> Resolved | None:
        """The resolved model, if nothing has to be asked or hashed to tell."""
        if self._resolved is None:
            try:
                self._resolved = self._look()
            except PipelineError:
                return None  # the step `resolve` says what is wrong
        return self._resolved

    def chain(self) -> Chain | None:
        """The model's steps, if the model is known."""
        resolved = self.known()
        if resolved is None:
            return None
        script = self.llama_cpp.folder / "convert_hf_to_gguf.py"
        return chain.chain(
            resolved, self.request.wanted, self.home, script, self.llama_cpp.recipe()
        )

    def needs(self) -> Needs | None:
        """What each of the model's steps has to do, if the model is known."""
        steps = self.chain()
        force = self.request.force
        return chain.needs(steps, self.home, self.tool, force=force) if steps else None

    def _look(self) -> Resolved | None:
        reference, home = self.request.reference, self.home
        if reference is None:
            return None
        if reference.kind == "demo":
            return resolve.demo(home)
        if reference.path is not None and reference.kind == "gguf":
            return resolve.gguf_path(reference.path, home)
        if reference.path is not None:
            if not resolve.folder_is_known(reference.path, home):
                return None
            return resolve.folder(reference.path, home, frozenset())
        return resolve.stored(self._stored_path())

    def _stored_path(self) -> Path:
        request = self.request
        quant = request.wanted.quant
        return resolve.stored_path(self._reference(), request.filename, quant, self.home)

    # Is there nothing to do? (called by doit, for running and for listing)

    def source_is_done(self) -> bool:
        """On disk; or not needed, because neither a build nor a conversion will read it."""
        needs = self.needs()
        if needs is not None and not needs.convert and self.bins_are_done():
            return True
        return source.is_current(self.llama_cpp)

    def bins_are_done(self) -> bool:
        if binaries.external(self.home):
            return True
        return not self._again() and build.is_current(self.build)

    def resolve_is_done(self) -> bool:
        return self.known() is not None and not self.request.refresh

    def fetch_is_done(self) -> bool:
        needs = self.needs()
        return needs is not None and not needs.fetch

    def converter_is_done(self) -> bool:
        """Made; or not needed, because the model at hand is not converted."""
        if self.request.reference and self.convert_is_done():
            return True
        return not self._again() and converter.is_current(self.home)

    def convert_is_done(self) -> bool:
        needs = self.needs()
        return needs is not None and not needs.convert

    def quantize_is_done(self) -> bool:
        needs = self.needs()
        return needs is not None and not needs.quantize

    def is_settled(self) -> bool:
        """Whether the model's files are where their receipts left them."""
        steps = self.chain()
        if steps is None or self.request.force:
            return True
        moved = chain.moved(steps, self.home, self.tool)
        return moved is None and not chain.is_unmarked(steps)

    def _again(self) -> bool:
        """`force=1` without a model means llama.cpp's own steps, with one the model's."""
        return self.request.force and self.request.reference is None

    # Do it

    def check(self) -> None:
        """What can be said before any work: the home is writable, what is local is sound."""
        home = self.home
        for folder in (home.root, home.run, home.logs, home.models, home.bins):
            paths.require_writable(folder)
        self.check_request()

    def check_compiler(self) -> None:
        """Without programs that may only have to be hashed, a compiler will be needed."""
        if not self.bins_are_done() and not self.build.target.exists():
            host.require_compiler()

    def check_request(self) -> None:
        """As `check`, for runs that make nothing."""
        reference = self.request.reference
        external = binaries.external(self.home)
        quant = self.request.wanted.quant or chain.DEFAULT_QUANT
        is_converted = reference is not None and reference.kind in ("demo", "folder")
        if external and is_converted and quant not in quants.DIRECT:
            external.program("llama-quantize")
        given = self.request.wanted.imatrix
        if external and given and imatrix.is_text(given):
            external.program("llama-imatrix")
        if reference and reference.note:
            say(reference.note)
        if self.llama_cpp.local:
            say(
                f"{self.llama_cpp.folder} differs from the pin; used as it is, and recorded as "
                f"{self.llama_cpp.tree}"
            )
        if reference and reference.path:
            if reference.kind == "gguf":
                resolve.gguf_path(reference.path, self.home)
            else:
                resolve.check_folder(reference.path, self._architectures())
        self.chain()  # what cannot be meant is said now

    def get_source(self) -> None:
        source.fetch(self.llama_cpp, self.home, offline=self.request.offline)

    def build_bins(self) -> None:
        build.make(self.build, force=self._again())

    def resolve(self, *, store: bool = True) -> None:
        reference = self._reference()
        if reference.kind == "hub":
            if self.request.offline:
                raise PipelineError(
                    f"{reference.text}: is not resolved yet, and offline=1 forbids to ask",
                    "run once without offline=1",
                )
            request = self.request
            found = hub.resolve(reference, request.filename, request.wanted.quant, self.home)
            if store:
                resolve.store(self._stored_path(), found)
            self._resolved = found
        elif reference.path and reference.kind == "folder":
            self._resolved = resolve.folder(reference.path, self.home, self._architectures())
        elif reference.path:
            self._resolved = resolve.gguf_path(reference.path, self.home)
        self.chain()  # what cannot be meant is said now

    def settle(self) -> None:
        """Hash once what was copied or restored, and mark what is wanted now, before other
        steps look."""
        steps = self.require_chain()
        while moved := chain.moved(steps, self.home, self.tool):
            with only_one(moved):
                receipts.settle(moved)
        if steps.conversion and chain.is_unmarked(steps):
            artifacts.keep(steps.conversion.target)

    def fetch(self) -> None:
        steps = self.require_chain()
        if steps.resolved.local:
            return
        if steps.resolved.source["type"] == "package":
            demo.fetch(steps.resolved, self.home, offline=self.request.offline)
        else:
            hub.fetch(steps.resolved, offline=self.request.offline)

    def make_converter(self) -> None:
        converter.make(self.home, force=self._again(), offline=self.request.offline)

    def convert(self) -> None:
        steps = self.require_chain()
        if steps.conversion:
            # Whoever held the lock before may have made the file, used it and removed it.
            with only_one(steps.conversion.target):
                if not self.convert_is_done():
                    convert.make(steps.conversion, self.home, force=self.request.force)

    def quantize(self) -> None:
        steps = self.require_chain()
        if steps.quantization is None:
            return
        program = self.binaries.program("llama-quantize")
        tool = self.binaries.recipe("llama-quantize")
        force = self.request.force
        given = self.request.wanted.imatrix
        text = given is not None and imatrix.is_text(given)
        matrix = self.binaries.program("llama-imatrix") if text else None

        def make() -> None:
            if steps.quantization:
                quantize.make(
                    steps.quantization,
                    self.home,
                    program,
                    tool,
                    imatrix_program=matrix,
                    force=force,
                )

        if steps.conversion is None:
            make()
            return
        # Another run that makes another quant of the model removes the input when it is done with
        # it: hold it while it is read, and make it once more where it was just removed.
        with only_one(steps.conversion.target):
            done = chain.final_status(steps, self.home, tool) is receipts.Status.CURRENT
            if (force or not done) and not steps.conversion.target.exists():
                convert.make(steps.conversion, self.home)
            make()
            if chain.leftover(steps):
                artifacts.discard(steps.conversion.target)

    # Undo it: `clean` removes files with their receipts, `forget` the receipts alone

    def clean_source(self) -> None:
        with only_one(self.llama_cpp.folder):
            source.clean(self.llama_cpp)

    def forget_source(self) -> None:
        source.forget(self.llama_cpp)

    def clean_bins(self) -> None:
        with only_one(self.build.target):
            build.clean(self.build)

    def forget_bins(self) -> None:
        build.forget(self.build)

    def clean_converter(self) -> None:
        with only_one(converter.folder(self.home)):
            converter.clean(self.home)

    def forget_converter(self) -> None:
        converter.forget(self.home)

    def forget_resolve(self) -> None:
        """What the hub answered, or what was found out about the user's own files."""
        reference = self._reference()
        if reference.kind == "hub":
            remove(self._stored_path())
        else:
            resolve.forget(reference.path, self.home)

    def targets(self, step: str) -> list[Path]:
        """The files of the model that a step made or would make. Raises PipelineError."""
        steps = self.require_chain()
        if step == "fetch" and not steps.resolved.local:
            return [steps.resolved.folder / file.name for file in steps.resolved.files]
        made = steps.conversion if step == "convert" else steps.quantization
        return [made.target] if made and step != "fetch" else []

    def clean(self, step: str) -> None:
        between = self.require_chain().conversion if self.require_chain().quantization else None
        for target in self.targets(step):
            with only_one(target):
                if between and target == between.target:
                    artifacts.discard(target)  # what was made from it stays up to date
                else:
                    remove(target)
                    receipts.forget(target)

    def forget(self, step: str) -> None:
        for target in self.targets(step):
            receipts.forget(target)

    def _reference(self) -> Reference:
        if self.request.reference is None:
            raise UsageError("no model is named", "say which: model=…")
        return self.request.reference

    def require_chain(self) -> Chain:
        """The model's steps. Raises PipelineError where they are not known yet."""
        self._reference()
        steps = self.chain()
        if steps is None:
            raise PipelineError("the model is not resolved yet", "doit resolve model=…")
        return steps

    def _architectures(self) -> frozenset[str]:
        return converter.architectures(self.llama_cpp.folder)
