"""One model of a request: what is known of it, and which of its steps are up to date.

The decisions are made in `bins`, `models` and `serve`; here they are put together. `make` does the
steps and `clean` undoes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from pipeline import models
from pipeline.bins.compile import source
from pipeline.core import paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store.publish import remove
from pipeline.models import quants
from pipeline.models.reference import NO_PROJECTOR

from . import quality_gate, server_options
from .programs import Programs
from .request import Request

if TYPE_CHECKING:
    from pipeline.bins.binaries import Binaries
    from pipeline.models.chain import Chain, Needs
    from pipeline.models.resolve import Resolved
    from pipeline.serve.config.configuration import InstanceSpec


class Model:
    """Lazy: looked up on first use. Where a request names no model, nothing is known of it."""

    def __init__(self, request: Request, programs: Programs, base: Model | None = None) -> None:
        """`base`: the model that it is an adapter of."""
        self.request = request
        self.base = base
        self.programs = programs
        self.home = programs.home
        self.listing: models.hub.Listing | None = None  # the hub's answer in this run
        self.resolved: Resolved | None = None  # see `known`
        self.place = ""  # where a file of servers names it
        self.auto_quant = ""  # what quant=auto or fit means for it
        self.draft = Model(request.draft, programs) if request.draft else None
        self.adapters = [Model(each, programs, self) for each in request.adapters]
        self._made_chain: tuple[Resolved, quants.QuantRequest, bool, Chain] | None = None
        self._spec: InstanceSpec | None = None

    # What there is to work with

    @property
    def spec(self) -> InstanceSpec:
        """The options of the server that the model is for."""
        return self._spec or server_options.spec(self.request)

    def served_by(self, spec: InstanceSpec) -> Model:
        """The same model, for a server with options of its own."""
        model = copy(self)
        model._spec = spec
        return model

    @contextmanager
    def placed(self) -> Iterator[None]:
        """While it runs, errors begin with where a file of servers names the model."""
        try:
            yield
        except PipelineError as error:
            if self.place:
                error.message = f"{self.place}: {error.message}"
            raise

    @property
    def beside(self) -> dict[str, Model]:
        """What is prepared with it, by the name that its steps have."""
        adapters = {f"lora{number}": each for number, each in enumerate(self.adapters)}
        return ({"draft": self.draft} if self.draft else {}) | adapters

    @property
    def binaries(self) -> Binaries:
        return self.programs.binaries

    # The model, as far as it is known without network and without hashing

    def known(self) -> Resolved | None:
        """The resolved model, if this takes no network and no hashing."""
        if self.resolved is None:
            try:
                resolved = self._look()
                self.resolved = self.with_base(resolved) if self.base and resolved else resolved
            except PipelineError:
                return None  # the step `resolve` says what is wrong
        return self.resolved

    def decides_quant(self) -> bool:
        """Whether quant=auto or fit has to be decided here: with auto a repository's GGUF is
        chosen."""
        resolved = self.known()
        if self.request.wanted.quant not in quants.DECIDED or resolved is None:
            return False
        ours = resolved.kind == "safetensors" or resolved.local
        return ours and resolved.precision in quants.UNQUANTIZED

    def wanted(self) -> quants.QuantRequest | None:
        """What is wanted of the known model; None while quant=auto or fit is not decided."""
        wanted, resolved = self.request.wanted, self.known()
        if self.request.frozen and quants.is_mix(wanted.quant):
            wanted = replace(wanted, types=models.lockfile.types(self.require_locked()))
        if wanted.quant not in quants.DECIDED or resolved is None:
            return wanted
        if not self.decides_quant():
            return replace(wanted, quant="") if wanted.quant == quants.AUTO else wanted
        if self.request.frozen:
            self.auto_quant = str(self.require_locked().get("quantization", {}).get("type", ""))
        if not self.auto_quant and not self.request.refresh:
            self.auto_quant = models.resolve.decided(self.decision_path(resolved))
        return replace(wanted, quant=self.auto_quant) if self.auto_quant else None

    def chain(self) -> Chain | None:
        """What is made of the model, if it is known."""
        resolved, wanted = self.known(), self.wanted()
        if resolved is None or wanted is None:
            return None
        return self._chain(resolved, wanted)

    def chain_with(self, quant: str) -> Chain:
        """The chain of the known model with another quant. Raises PipelineError."""
        return self._chain(self.require_resolved(), replace(self.request.wanted, quant=quant))

    def _chain(self, resolved: Resolved, wanted: quants.QuantRequest) -> Chain:
        sees = self.sees(resolved)
        if self._made_chain and self._made_chain[:3] == (resolved, wanted, sees):
            return self._made_chain[3]
        llama_cpp = self.programs.llama_cpp
        recipe = llama_cpp.recipe()
        if self.base:
            script = llama_cpp.folder / "convert_lora_to_gguf.py"
            made = models.chain.adapter_chain(resolved, self.home, script, recipe)
        else:
            script = llama_cpp.folder / "convert_hf_to_gguf.py"
            made = models.chain.chain(resolved, wanted, self.home, script, recipe, projector=sees)
        self._made_chain = (resolved, wanted, sees, made)
        return made

    def sees(self, resolved: Resolved) -> bool:
        """Whether a projector is converted with the model: it has an encoder that the converter
        knows, as far as that is here, and mmproj= says nothing else."""
        if not resolved.encoder or self.request.file_filter.mmproj == NO_PROJECTOR:
            return False
        known = models.converter.architectures(self.programs.llama_cpp.folder, "MMPROJ")
        return not known or resolved.encoder in known

    def needs(self) -> Needs | None:
        """What each of the model's steps has to do, if the model is known."""
        if (chain := self.chain()) is None:
            return None
        force = self.request.force
        due = models.chain.needs(chain, self.home, self.programs.tool, force=force)
        if not self.request.has_limit:
            return due
        return quality_gate.needs(self.request, self.programs, chain, due)

    def is_made(self, chain: Chain) -> bool:
        """Whether the GGUF at the end of `chain` is there, and is what is wanted."""
        needs = self.needs()
        up_to_date = needs and not (needs.fetch or needs.convert or needs.quantize)
        return bool(up_to_date and chain.final.is_file())

    def _look(self) -> Resolved | None:
        reference, home = self.request.reference, self.home
        if reference is None:
            return None
        if reference.kind == "demo":
            return models.resolve.demo(reference.text, home)
        if reference.path is not None:
            if reference.kind == "folder":
                known = models.adapter.known_folder if self.base else models.resolve.known_folder
                return known(reference.path, home)
            return self.read_path(reference.path)
        if self.request.frozen:
            return models.lockfile.resolved(self.require_locked(), home)
        return models.resolve.stored(self.stored_path())

    def read_path(self, path: Path, architectures: frozenset[str] = frozenset()) -> Resolved:
        """The user's own file or folder; what of it has changed is hashed. `architectures` are
        those that a folder's model may have; empty: any. Raises PipelineError."""
        is_gguf = self.require_reference().kind == "gguf"
        if self.base:
            read = models.adapter.gguf_path if is_gguf else models.adapter.folder
            return read(path, self.home)
        if is_gguf:
            return models.resolve.gguf_path(path, self.home)
        return models.resolve.folder(path, self.home, architectures)

    def with_base(self, adapter: Resolved, *, stored: bool = True) -> Resolved | None:
        """An adapter with the config files that it is converted with: its own, those of its model,
        or, if `stored`, what the hub answered about the model that it was trained for; None where
        they are not known."""
        if adapter.kind == "gguf":
            return adapter
        model = self.base.known() if self.base else None
        base = models.adapter.config_of(adapter)
        if base is None and model and model.kind == "safetensors":
            base = models.adapter.config_of(model)
        if base is None and self.request.frozen:
            base = models.lockfile.base(self.require_locked(), self.home)
        elif base is None and stored and (path := self.base_path(adapter)):
            base = models.resolve.stored(path)
        return replace(adapter, base=base) if base else None

    def base_path(self, adapter: Resolved) -> Path | None:
        """Where the hub's answer about the model that an adapter was trained for is kept; None
        where the adapter names no repository."""
        reference = models.reference.repository(adapter.base_name)
        if reference is None:
            return None
        return models.resolve.stored_path(reference, ["config"], self.home)

    @property
    def lock_file(self) -> Path:
        """pipeline.lock, in the folder where the command is typed."""
        return paths.absolute(models.lockfile.FILE)

    def stored_path(self) -> Path:
        """Where the hub's answer to this request is kept."""
        files = self.request.file_filter
        question: list[object] = [files.quant, files.filename, files.pattern, files.mmproj]
        if self.base:
            question.append("adapter")
        if files.quant == quants.AUTO:
            question.append(self.request.ctx_size)
        path = models.resolve.stored_path(self.require_reference(), question, self.home)
        if self.request.offline and not path.exists():
            # What a cache held is not an answer of the hub's: with the network we ask the hub.
            path = models.resolve.stored_path(
                self.require_reference(), [*question, "offline"], self.home
            )
        return path

    def decision_path(self, resolved: Resolved) -> Path:
        """Where it is kept what quant=auto or fit means for a model that is made here."""
        ctx_size = self.request.ctx_size
        return models.resolve.decision_path(resolved, self.request.wanted, ctx_size, self.home)

    # Is there nothing to do?

    def source_is_done(self) -> bool:
        """On disk; or not needed, because neither a build nor a conversion will read it."""
        is_built = self.programs.are_compiled and not self.programs.are_done()
        if not (is_built or self.reads_text()) and self.is_done("convert"):
            return True
        return source.is_current(self.programs.llama_cpp)

    def reads_text(self) -> bool:
        """Whether a text of llama.cpp's source is still needed, to choose a mix with."""
        chain = self.chain()
        made = chain and chain.quantization
        return bool(made and made.budget and not made.imatrix and not self.is_done("quantize"))

    def resolve_is_done(self) -> bool:
        return not self.request.refresh and self.chain() is not None

    def is_done(self, step: Literal["fetch", "convert", "quantize"]) -> bool:
        needs = self.needs()
        if needs is None or (step == "convert" and needs.projector):
            return False
        return not getattr(needs, step)

    def two_steps(self) -> str | None:
        """Why the model is converted first and then quantized: empty where one pass does both, None
        where not both are to be done."""
        chain, needs = self.chain(), self.needs()
        if not (chain and needs and chain.quantization and needs.convert and needs.quantize):
            return None
        has_library = self.programs.have_quantizer
        return models.one_pass.obstacle(
            chain.quantization, has_library=has_library, has_limit=self.request.has_limit
        )

    def converter_is_done(self) -> bool:
        """Made; or not needed, because the model is not converted."""
        if self.is_done("convert"):
            return True
        return not self.request.again and models.converter.installed(self.home).is_current()

    def is_settled(self) -> bool:
        """Whether the model's files are where their receipts left them."""
        chain = self.chain()
        if chain is None or self.request.force:
            return True
        moved = models.chain.moved(chain, self.home, self.programs.tool)
        return moved is None and not models.chain.needs_keep_mark(chain)

    @contextmanager
    def asking_anew(self) -> Iterator[None]:
        """Drop the hub's stored answer where the hub contradicts it, so that the next run asks
        anew. With frozen=1 there is no other answer. Raises PipelineError."""
        try:
            yield
        except models.hub_access.Changed as error:
            if self.request.frozen:
                raise UsageError(
                    f"frozen=1: {error.message}", "what is locked is no longer available"
                ) from None
            remove(self.stored_path())
            if self.resolved and (base := self.base_path(self.resolved)):
                remove(base)
            raise

    def require_reference(self) -> models.reference.Reference:
        """The model that is named. Raises UsageError where none is."""
        if self.request.reference is None:
            raise UsageError("no model given", "pass model=… (try model=demo)")
        return self.request.reference

    def command(self, task: str) -> str:
        """The command line that runs `task` for it; of an adapter that of its model."""
        return (self.base or self).request.command(task)

    def require_resolved(self) -> Resolved:
        """The model that is named. Raises PipelineError where it is not known yet."""
        self.require_reference()
        resolved = self.known()
        if resolved is None:
            raise PipelineError("the model is not resolved yet", f"run {self.command('resolve')}")
        return resolved

    def require_locked(self) -> models.lockfile.LockedModel:
        """What pipeline.lock says of the request. Raises UsageError."""
        return models.lockfile.find(self.lock_file, self.request.model_words)

    def require_chain(self) -> Chain:
        """The chain of the model. Raises PipelineError where it is not known yet."""
        self.require_resolved()
        chain = self.chain()
        if chain is None:
            quant = self.request.wanted.quant.lower()
            hint = f"run {self.command('resolve')}"
            raise PipelineError(f"quant={quant} is not decided yet", hint)
        return chain

    def architectures(self) -> frozenset[str]:
        """The architectures that the converter at hand knows."""
        return models.converter.architectures(self.programs.llama_cpp.folder)
