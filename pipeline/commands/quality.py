"""`quality`: what quants lost against the unquantized model, with error bars."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.store import receipts
from pipeline.core.store.receipts import Status
from pipeline.core.text import plural, size, table
from pipeline.models import chain as chains
from pipeline.models import gguf, text_length
from pipeline.models import quants as types
from pipeline.models.choice import NoSuchQuant
from pipeline.models.convert import Unquantized
from pipeline.models.reference import NO_PROJECTOR, exists
from pipeline.report import quality as measuring
from pipeline.report import quality_similarity as similarity
from pipeline.report.figures import Estimate, Quality
from pipeline.report.quality import Measured, Sample, Setup

from . import header_checks, headers, make, quality_check, quality_gate, quality_setup, resolve
from .model import Model
from .session import Session

DEFAULT = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
PROBE = "Q8_0"  # a quant of which it is known what it is compared with
HINT = (
    "pass the model that it was made from: model=org/model with safetensors, or an F16, BF16 or "
    "F32 .gguf"
)
HEAD = ("quant", "size", "bits per weight")
COLUMNS = {
    "kld": "KL divergence",
    "ppl_ratio": "perplexity ratio",
    "same_top": "same top token",
    "cosine": "cosine similarity",
    "rank": "rank correlation",
}


class NoReference(PipelineError):
    """There is no unquantized model to compare with."""


class QualityReport(Struct, frozen=True, kw_only=True):
    """What was measured: each quant, the file that all were compared with, and how to repeat it."""

    qualities: list[Quality]
    reference: Path
    setup: Setup


def quality(session: Session) -> None:
    """Print a table, or JSON."""
    model = session.model
    report = reported(model, available(model, requested(model)))
    commands = repeating(model, report)
    if session.request.json:
        document = {
            "model": model.require_resolved().name,
            "reference": report.reference.name,
            "text": report.setup.text_name,
            "quants": report.qualities,
            "commands": commands,
        }
        encoded = msgspec.json.encode(document)  # infinity as null
        print(json.dumps(json.loads(encoded), indent=1))
        return
    columns = [name for name in COLUMNS if any(getattr(each, name) for each in report.qualities)]
    lines = [(*HEAD, *(COLUMNS[name] for name in columns))]
    lines += [
        (
            each.quant,
            size(each.bytes),
            f"{each.bits_per_weight:.2f}",
            *(_shown(getattr(each, name)) for name in columns),
        )
        for each in report.qualities
    ]
    print(table(lines))
    first = report.qualities[0]
    over = plural(first.samples, "token" if report.setup.kind == "language" else "text")
    print(f"\nagainst {report.reference.name}, over {over} of {report.setup.text_name}")
    print("To repeat it by hand:", *commands, sep="\n  ")


def _shown(figure: Estimate | None) -> str:
    return measuring.shown(figure) if figure else ""


def requested(model: Model) -> tuple[str, ...]:
    """The quants to measure. Raises UsageError."""
    request = model.request
    for name, value in (("draft", request.draft), ("lora", request.adapters)):
        if value:
            raise UsageError(f"{name}: is not measured", "leave it out")
    if request.quants and request.wanted.quant:
        raise UsageError("quant= and quants= contradict each other", "leave quant= out")
    one = (request.wanted.quant,) if request.wanted.quant else ()
    listed = tuple(dict.fromkeys(map(types.canonical, request.quants or one or DEFAULT)))
    for quant in listed:
        if quant in (*types.DECIDED, types.ALL):
            raise UsageError(
                f"quants={quant.lower()}: is not a quant", "name quants: quants=q4_k_m,q8_0"
            )
    return listed


def available(model: Model, quants: Sequence[str]) -> tuple[str, ...]:
    """Those of `quants` that there are or can be made. Of a repository of GGUF files all have to be
    there or, where the user named none, one. Raises PipelineError, before anything is downloaded.
    """
    if not is_of_repository(model):
        return tuple(quants)
    request, kept, missing = model.request, list[str](), list[PipelineError]()
    for quant in quants:
        each = with_quant(model, quant)
        try:
            if not each.resolve_is_done():
                resolve.resolve(each)
            kept.append(quant)
        except PipelineError as error:
            error.hint = error.hint.replace("quant=", "quants=")
            is_missing = isinstance(error, NoSuchQuant) or request.offline
            if request.quants or request.wanted.quant or not is_missing:
                raise
            missing.append(error)
    if missing and not kept:
        raise missing[0]
    if missing:
        others = ", ".join(each for each in quants if each not in kept)
        log.info(f"not there, and left out: {others}; quants= names others")
    return tuple(kept)


def is_of_repository(model: Model) -> bool:
    """Whether the model is a GGUF that a repository has in several quants."""
    resolved = model.require_resolved()
    return resolved.kind == "gguf" and resolved.source["type"] == "hf"


def check_quants(model: Model) -> None:
    """Raise UsageError where the quants cannot be measured, as far as that is known before a
    repository is looked at, which may have others than llama-quantize makes."""
    quants, reference = requested(model), model.request.reference
    if reference and reference.kind != "hub":
        _require_makeable(model, quants)


def _require_makeable(model: Model, quants: Sequence[str]) -> None:
    for quant in quants:
        try:
            types.require_makeable(replace(model.request.wanted, quant=quant))
        except UsageError as error:
            named = error.message.removeprefix("quant=")
            raise UsageError(f"quants={named}", error.hint) from None


def reported(model: Model, quants: Sequence[str]) -> QualityReport:
    """The quality of these quants of a model, each made or downloaded where it is not there.
    Raises PipelineError."""
    resolved = model.require_resolved()
    if is_of_repository(model):
        return _of_repository(model, quants)
    if resolved.kind == "gguf" and resolved.precision not in types.UNQUANTIZED:
        raise UsageError(
            f"{resolved.name}: is {resolved.precision or 'of unknown type'}, and quality is "
            "measured against the unquantized model",
            HINT,
        )
    _require_makeable(model, quants)
    models = {quant: with_quant(model, quant) for quant in quants}
    if known := _known(model, models):
        log.info(f"kept from an earlier run: the quality of {', '.join(models)}")
        return known
    return _made(model, models)


def with_quant(model: Model, quant: str) -> Model:
    """The same model with another quant. What is made of it leaves the unquantized GGUF where it
    is, since it is compared with that."""
    request, resolved = model.request, model.require_resolved()
    is_chosen = is_of_repository(model)
    wanted = replace(request.wanted, quant=quant)
    if quant in types.DIRECT:
        wanted = replace(wanted, keep_f16=False, imatrix=None)
    elif not is_chosen:
        wanted = replace(wanted, keep_f16=True)
    files = replace(request.file_filter, quant=quant, mmproj=NO_PROJECTOR)
    other = Model(request.replace(wanted=wanted, file_filter=files), model.programs)
    other.resolved = None if is_chosen else resolved
    return other


def _reference(model: Model) -> Unquantized:
    """The unquantized GGUF that the quants of the model are made from."""
    chain = with_quant(model, PROBE).require_chain()
    return quality_gate.reference(chain, keep=model.request.wanted.keep_f16)


def _known(model: Model, models: Mapping[str, Model]) -> QualityReport | None:
    """The report where all of it was measured before; nothing is made or read but receipts."""
    of, tool = _reference(model), model.programs.tool
    digest = of.digest(model.home)
    files = {}
    for quant, each in models.items():
        chain = each.require_chain()
        if not digest or chains.final_status(chain, each.home, tool) is not Status.CURRENT:
            return None
        files[quant] = chain.final
    measured = {quant: _measured(path) for quant, path in files.items()}
    header = gguf.read_cached(next(iter(files.values())), model.home.run)
    setup = _setup(model, header)
    wants = measuring.report_wants(model.request.chunks)
    samples = {quant: setup.known(digest, each.digest) for quant, each in measured.items()}
    if any(map(wants, samples.values())):
        return None
    return _report(setup, of.path, measured, samples)


def _made(model: Model, models: Mapping[str, Model]) -> QualityReport:
    """The report once all are made and measured. The unquantized GGUF is there meanwhile."""
    home, request = model.home, model.request
    _require_text(model)
    with unquantized(model, models.values()) as base:
        header = gguf.read(base)
        setup, wants = _setup(model, header), measuring.report_wants(request.chunks)
        measuring.require_room(setup, header, wants)
        for each in models.values():
            make.convert_or_quantize(each)
        measured = {quant: _measured(each.require_chain().final) for quant, each in models.items()}
        digest = _reference(model).digest(home, hashing=True)
        reference = Measured(path=base, digest=digest)
        samples = measuring.measure(setup, reference, measured, wants)
        return _report(setup, base, measured, samples)


def _require_text(model: Model) -> None:
    """Raise UsageError where the user's text is too short, by the header alone: before weights are
    downloaded or converted."""
    conversion = _reference(model).conversion
    if _text_may_be_short(model):
        if conversion:
            make.make_converter(model.home, model.request)
        chain = replace(with_quant(model, PROBE).require_chain(), conversion=conversion)
        _require_long_enough(model, headers.unquantized(model, chain))


def _text_may_be_short(model: Model) -> bool:
    text, chunk = model.request.sample_text, model.request.ctx_size or text_length.CHUNK
    return text is not None and (
        text_length.may_be_short(text, chunk)
        or len(similarity.passages(quality_setup.own_text(text))) < similarity.DOCUMENTS
    )


def _require_long_enough(model: Model, source: Path | None) -> None:
    if source:
        quality_setup.require_long_enough(model.request, _setup(model, gguf.read(source)), source)


def fetch(model: Model) -> None:
    """Resolve and download a GGUF of a repository, where that is not done. Raises
    PipelineError."""
    if not model.resolve_is_done():
        resolve.resolve(model)
    if not model.is_done("fetch"):
        make.fetch(model)


@contextmanager
def unquantized(model: Model, made: Iterable[Model]) -> Iterator[Path]:
    """The unquantized GGUF that the quants `made` are made from, while the block runs. Raises
    PipelineError."""
    probe = with_quant(model, PROBE)
    if probe.require_chain().conversion:
        make.make_converter(model.home, model.request)
    for each in made:  # before anything is downloaded
        if not each.is_done("quantize"):
            header_checks.require(each)
    if not probe.is_done("fetch"):
        make.fetch(probe)
    with make.unquantized(model, probe.require_chain()) as base:
        yield base


def _of_repository(model: Model, quants: Sequence[str]) -> QualityReport:
    """The report on GGUF files that a repository has, against an unquantized one of the same."""
    reference, why = None, None
    for precision in ("BF16", "F16", "F32"):
        other = with_quant(model, precision)
        try:
            if not other.resolve_is_done():
                resolve.resolve(other)
            if other.require_resolved().precision == precision:
                reference = other
                break
        except PipelineError as error:
            why = why or error
    if reference is None:
        name = model.require_resolved().name
        raise NoReference(f"{name}: its repository has no unquantized GGUF", HINT) from why
    models = {quant: with_quant(model, quant) for quant in quants}
    if _text_may_be_short(model):
        _require_long_enough(model, headers.of_model(reference, reference.require_chain()))
    for each in (reference, *models.values()):
        fetch(each)
    base = reference.require_chain().final
    measured = {quant: _measured(each.require_chain().final) for quant, each in models.items()}
    setup = _setup(model, gguf.read(base))
    wants = measuring.report_wants(model.request.chunks)
    return _report(
        setup, base, measured, measuring.measure(setup, _measured(base), measured, wants)
    )


def _setup(model: Model, header: gguf.Header) -> Setup:
    return quality_setup.setup(
        model.request,
        model.programs,
        header,
        ctx_size=model.request.ctx_size,
        serving=lambda path: quality_check.serving(model, path),
    )


def _measured(path: Path) -> Measured:
    """A GGUF of ours, with the digest of its receipts."""
    return Measured(path=path, digest="+".join(map(receipts.known_sha256, gguf.shards(path))))


def _report(
    setup: Setup, base: Path, measured: Mapping[str, Measured], samples: Mapping[str, Sample]
) -> QualityReport:
    qualities = []
    for quant, each in measured.items():
        shapes: dict[str, list[int]] = {}
        headers = [gguf.read(path, shapes) for path in gguf.shards(each.path)]
        weights = sum(map(math.prod, shapes.values()))
        bits = 8 * sum(header.size - header.data for header in headers) / weights
        total = gguf.file_bytes(each.path)
        qualities.append(measuring.quality(setup, samples[quant], quant, total, bits))
    return QualityReport(qualities=qualities, reference=base, setup=setup)


def named(model: Model, commit: str = "") -> list[str]:
    """The words that name the model beside quants=, which contradicts a quant of its own; of a
    repository at `commit`, else at the revision that was requested."""
    request, reference, files = model.request, model.request.reference, model.request.file_filter
    words = {"model": request.named, "imatrix": request.typed.get("imatrix", "")}
    if reference and reference.kind == "hub":
        is_path = exists(absolute(reference.repo))
        words["model"] = f"hf:{reference.repo}" if is_path else reference.repo
        words |= {"revision": commit or reference.revision}
        words |= {"filename": files.filename, "pattern": files.pattern}
    return [f"{name}={value}" for name, value in words.items() if value]


def repeating(model: Model, report: QualityReport) -> list[str]:
    """The commands that measure the same again, as they can be typed."""
    own = model.request.sample_text
    quants = ",".join(each.quant.lower() for each in report.qualities)
    words = [*named(model), f"quants={quants}", *([f"text={own}"] if own else [])]
    words.append(f"chunks={model.request.chunks}")
    words += [f"ctx_size={model.request.ctx_size}"] if model.request.ctx_size else []
    return [doitw(f"quality {shlex.join(words)}")]
