"""`resolve` for what the hub has, and the choices that depend on this host's memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from pipeline.core import capacity, log
from pipeline.core.errors import PipelineError
from pipeline.core.text import plural, size
from pipeline.models import (
    adapter,
    checkpoint,
    choice,
    contents,
    gguf,
    hub,
    kinds,
    lockfile,
    memory,
    projector,
    quants,
    repository,
    safetensors,
)
from pipeline.models import resolve as stored
from pipeline.models.reference import repository as parse_repository

from . import estimate
from .estimate import MemoryEstimate
from .model import Model

if TYPE_CHECKING:
    from pipeline.models.reference import Reference
    from pipeline.models.resolve import ModelFile, Resolved

MOST_BITS = 850  # hundredths of a mix that is decided here: as Q8_0; more makes hardly a difference
BASE = "put it into the adapter's folder, or pass model= in safetensors, or the adapter as GGUF"


class RepoFiles:
    """A repository's files, and what its models would take. Every file is read once."""

    def __init__(self, model: Model) -> None:
        """Ask the hub, or offline the user's Hugging Face cache. Raises PipelineError."""
        self.model = model
        self.listing = listing(model)
        self.room = capacity.memory()
        self._readables: dict[ModelFile, contents.Readable] = {}
        self._measured: dict[str, tuple[choice.Option, MemoryEstimate]] = {}

    def read_header(self, files: Sequence[ModelFile]) -> gguf.Header:
        """The header of a GGUF's first file."""
        with self._owner_explained():
            return gguf.parse(self._readable(files[0]))

    def read_head(self, file: ModelFile) -> safetensors.Head:
        """The header of a safetensors file."""
        with self._owner_explained():
            return safetensors.head(self._readable(file))

    @contextmanager
    def _owner_explained(self) -> Iterator[None]:
        """A file that is another kind is so in the repository: here it cannot be mended."""
        try:
            yield
        except contents.ForeignFile as error:
            hint = "its owner uploaded it like this: use another file, revision or repository"
            raise PipelineError(f"{self.listing.repo}: {error.message}", hint) from None

    def outlook(self, option: choice.Option) -> MemoryEstimate:
        """What an option takes. One header is read for all quants of a model: they differ by
        their weights."""
        stem = choice.stem(option)
        if stem not in self._measured:
            files = [self._readable(file) for file in option.files]
            key = option.files[0].identity
            self._measured[stem] = option, estimate.of_gguf(self.model, files, key)
        first, ahead = self._measured[stem]
        if option.files == first.files:
            return ahead

        def at(ctx_size: int) -> memory.Memory | None:
            needed = ahead.at(ctx_size)
            return needed and memory.resized(needed, first.bytes, option.bytes)

        return MemoryEstimate(bytes=option.bytes, trained=ahead.trained, at=at, header=ahead.header)

    def fits(self, option: choice.Option) -> bool:
        """Whether an option fits this host's memory, with the projector that it may get."""
        files, own = self.model.request.file_filter, self.model.request.mmproj
        beside = (
            own.stat().st_size
            if own
            else projector.likely_bytes(self.listing.files, option.name, files.mmproj)
        )
        return estimate.least(self.model, self.outlook(option), self.room - beside).fits

    def resolved(self) -> Resolved:
        """The files that the request means. Raises PipelineError."""
        resolved = self._adapter() if self.model.base else self._model()
        if self.listing.gated and not self.model.request.offline:
            # Whether this user may have the files: fails now, not after the build.
            hub.locate(self.listing.repo, self.listing.commit, resolved.files[0])
        what = f"{plural(len(resolved.files), 'file')}, {size(resolved.bytes)}"
        what = f"{resolved.why} ({what})" if resolved.why else what
        log.info(f"{resolved.name}: {what}")
        return resolved

    def _model(self) -> Resolved:
        """A model. Raises PipelineError."""
        reference = self.model.require_reference()
        try:
            resolved = repository.resolve(
                self.listing,
                self.model.request.file_filter,
                reference.text,
                self.model.home,
                fits=self.fits,
                read=lambda file: self._readable(file).whole(),
                read_header=self.read_header,
                read_head=self.read_head,
            )
        except PipelineError as error:
            if self.model.request.offline:
                error.hint = "only the Hugging Face cache was searched: run once with the network"
            raise
        require_architecture(self.model, resolved)
        if resolved.kind == "gguf":
            name = f"{self.listing.repo}: {resolved.files[0].name}"
            kinds.require_model([self.read_header(resolved.files)], name)
        own = self.model.request.mmproj
        if own and resolved.kind == "gguf":
            projector.require(gguf.read(own), self.read_header(resolved.files), own.name)
        return resolved

    def _adapter(self) -> Resolved:
        """A LoRA adapter: a GGUF, else what PEFT saved. Raises PipelineError."""
        files, repo = self.listing.files, self.listing.repo
        source = {"type": "hf", "ref": repo, "revision": self.listing.commit, "use": "adapter"}
        wanted, home = self.model.request.file_filter, self.model.home
        options = choice.options(files)
        is_peft = adapter.WEIGHTS in files
        if is_peft and not (wanted.filename or wanted.quant):  # a merged model may lie beside it
            options = [o for o in options if kinds.is_adapter(self.read_header(o.files))]
        if options:
            text = self.model.require_reference().text
            try:
                option, why = choice.choose(options, wanted, text, lambda _: True)
            except PipelineError as error:
                error.hint = f"name one: lora={repo}:QUANT, or the address of its file"
                raise
            kinds.require_adapter(self.read_header(option.files), f"{repo}: {option.name}")
            why = f"{option.name}: {why}"
            return repository.of_files(source, "gguf", option.files, home, precision="", why=why)
        with self._owner_explained():
            names, precision, base_name = adapter.check(
                files, lambda name: self._readable(files[name]), repo
            )
        return repository.of_files(
            source,
            "safetensors",
            [files[name] for name in names],
            home,
            precision=precision,
            base_name=base_name,
        )

    def config_files(self) -> Resolved:
        """What a converter reads of a model beside its weights. Raises PipelineError."""
        files, repo = self.listing.files, self.listing.repo
        if adapter.BASE_CONFIG not in files:
            raise PipelineError(f"{repo}: has no {adapter.BASE_CONFIG}")
        where = f"{repo}: {adapter.BASE_CONFIG}"
        name = checkpoint.architecture(self._document(adapter.BASE_CONFIG), where)
        checkpoint.require_known(name, self.model.architectures(), repo)
        source = {"type": "hf", "ref": repo, "revision": self.listing.commit}
        names = repository.side_files(files)
        every = repository.of_files(
            source, "safetensors", [files[name] for name in names], self.model.home, precision=""
        )
        return adapter.config_of(every) or every

    def _document(self, name: str) -> dict[str, Any]:
        """A JSON file. Raises PipelineError where it is too large, or none."""
        data = self._readable(self.listing.files[name]).whole()
        return checkpoint.document(data, f"{self.listing.repo}: {name}")

    def _readable(self, file: ModelFile) -> contents.Readable:
        if file not in self._readables:
            repo = self.listing.repo
            self._readables[file] = (
                contents.local(hub.cached_file(repo, file), file.name)
                if self.model.request.offline
                else hub.readable(repo, self.listing.commit, file)
            )
        return self._readables[file]


def require_architecture(model: Model, resolved: Resolved) -> None:
    """Raise UsageError where the converter at hand does not know the model's architecture."""
    if resolved.architecture:
        checkpoint.require_known(resolved.architecture, model.architectures(), resolved.name)


def listing(model: Model) -> hub.Listing:
    """The repository's files: one request a run. Raises PipelineError."""
    if model.listing is None:
        reference = model.require_reference()
        model.listing = _cached(reference) if model.request.offline else hub.ask(reference)
    return model.listing


def _cached(reference: Reference) -> hub.Listing:
    """The files that the user's Hugging Face cache holds. Raises PipelineError."""
    listing = hub.cached(reference)
    if listing is None:
        raise PipelineError(
            f"{reference.text}: is neither resolved nor in the Hugging Face cache, and offline=1 "
            "(or HF_HUB_OFFLINE) forbids asking the hub",
            "run once with the network, or give a path",
        )
    count = plural(len(listing.files), "file")
    log.info(f"{reference.text}: from the Hugging Face cache, which holds {count} of it")
    return listing


def resolve(model: Model, *, store: bool = True) -> None:
    """Look the model up and decide its quant, with `store` for later runs too. Raises
    PipelineError."""
    reference = model.require_reference()
    if reference.kind == "hub" and model.request.frozen:
        lockfile.resolved(model.require_locked(), model.home)  # says what is wrong with it
    elif reference.kind == "hub":
        model.resolved = resolved = RepoFiles(model).resolved()
        if store:
            stored.store(model.stored_path(), resolved)
        if model.base:
            model.resolved = _with_base(model, resolved, store=store)
    elif reference.path:
        read_local(model, reference.path, store=store)
    if model.wanted() is None:
        _decide_quant(model, store=store)
    model.chain()  # raises what is wrong with it now


def read_local(model: Model, path: Path, *, store: bool = True) -> None:
    """Read the user's own file or folder, and hash what has changed. Raises PipelineError."""
    if model.base:
        model.resolved = _with_base(model, model.read_path(path), store=store)
    else:
        is_folder = model.require_reference().kind == "folder"
        model.resolved = model.read_path(path, model.architectures() if is_folder else frozenset())


def _with_base(model: Model, resolved: Resolved, *, store: bool) -> Resolved:
    """An adapter with the config of its base, from the hub if need be. Raises PipelineError."""
    if model.base and model.base.known() is None:
        resolve(model.base, store=store)
    path = model.base_path(resolved)
    known = model.with_base(resolved, stored=not model.request.refresh)
    reference = parse_repository(resolved.base_name)
    if known is None and path and reference and not model.request.frozen:
        request = model.request.replace(reference=reference)
        try:
            config = RepoFiles(Model(request, model.programs)).config_files()
        except PipelineError as error:
            raise PipelineError(f"{_unknown_base(resolved)}: {error.message}", BASE) from None
        if store:
            stored.store(path, config)
        known = replace(resolved, base=config)
    if known is None:
        raise PipelineError(_unknown_base(resolved), BASE)
    return known


def _unknown_base(resolved: Resolved) -> str:
    named = f" ({resolved.base_name})" if resolved.base_name else ""
    return (
        f"{resolved.name}: converting it needs the config.json of the model that it was trained "
        f"for{named}"
    )


def _decide_quant(model: Model, *, store: bool) -> None:
    """quant=auto or fit of a model that is made here: the best that fits the memory."""
    resolved, room = model.require_resolved(), capacity.memory()
    if model.request.wanted.quant == quants.FIT:
        quant, why = _largest_mix(model, room)
    else:
        quant, why = _best_quant(model, room)
    log.info(f"{resolved.name}: quant {quant.lower()}, {why}")
    model.auto_quant = quant
    if store:
        stored.write(model.decision_path(resolved), {"quant": quant, "why": why})


def _largest_mix(model: Model, room: int) -> tuple[str, str]:
    """The size of the largest mix that fits, in bits per weight, and why it is this one."""
    chain = model.chain_with(quants.DEFAULT)
    least, most = estimate.mix_limits(model, chain)
    of, low = estimate.unquantized(model, chain), round(100 * least)

    def is_too_large(hundredths: int) -> bool:
        return not estimate.least(model, of(f"{hundredths / 100:.2f}BPW"), room).fits

    sizes = range(low, max(low, min(round(100 * most), MOST_BITS)) + 1)
    fitting = bisect_left(sizes, True, key=is_too_large)
    none = "no mix fits the memory: the smallest there is"
    why = "the largest mix that fits the memory" if fitting else none
    return quants.parse(f"{sizes[max(0, fitting - 1)] / 100:.2f}bpw"), why


def _best_quant(model: Model, room: int) -> tuple[str, str]:
    """The best plain quant that fits, and why it is this one."""
    candidates = stored.auto_candidates(model.request.wanted)
    of = estimate.unquantized(model, model.chain_with(candidates[-1]))
    for candidate in candidates:
        ahead = of(candidate)
        if ahead.bytes and estimate.least(model, ahead, room).fits:
            return candidate, "the best that fits the memory"
    return candidates[-1], "none fits the memory: the smallest there is"
