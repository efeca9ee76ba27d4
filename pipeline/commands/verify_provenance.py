"""What `verify` checks beside receipts: statements of provenance, and signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core import log, signing
from pipeline.core import statement as statements
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.statement import Statement
from pipeline.core.store.hashing import sha256
from pipeline.core.text import printable
from pipeline.models import quants

from . import provenance, trace
from .session import Session


def require_subject(session: Session) -> None:
    """Raise UsageError where it is not said what a statement or a key is for."""
    request = session.request
    if provenance.only_one_named(request) or request.reference:
        return
    for name in ("provenance", "public_key", "signature"):
        if value := getattr(request, name):
            raise UsageError(f"{name}={value}: of which file?", "pass model=… or pkg=FILE")


def stated(session: Session, digests: Mapping[Path, str]) -> Iterator[tuple[Path, list[Path]]]:
    """The statements to check, each with its files: the one of `provenance=`, else those that lie
    beside what was checked."""
    if given := session.request.provenance:
        reference = session.request.reference
        is_file = reference is not None and reference.kind == "gguf"
        files = provenance.to_sign(session)[:1] if is_file else provenance.subjects(session)
        if len(files) > 1:  # a projector has a statement of its own
            subjects = {each.digest["sha256"] for each in statements.read(given).subject}
            files = [file for file in files if _sha256(file, digests) in subjects] or files[:1]
        yield given, provenance.parts(files[0])
        return
    for path in digests:
        place = path.with_name(path.name + statements.SUFFIX)
        if path.is_file() and place.is_file():
            yield place, provenance.parts(path)


def check_statement(
    session: Session, place: Path, files: Sequence[Path], digests: Mapping[Path, str]
) -> str:
    """What is wrong with a statement about `files`, or with them by it; empty: nothing."""
    try:
        given = statements.read(place)
        trace.require_known(given)
        subjects = {each.digest["sha256"] for each in given.subject}
        for file in files:
            if _sha256(file, digests) not in subjects:
                return f"is about another file than {file.name}, or {file.name} has changed"
        return _shown("; ".join(_misfits(session, given, files)))
    except (ValueError, OSError, PipelineError) as error:
        return _shown(str(error))


def _misfits(session: Session, given: Statement, files: Sequence[Path]) -> Iterator[str]:
    """What a statement says otherwise than the command line, and than the receipts."""
    request, build = session.request, given.build
    if request.builder and given.predicate.run_details.builder.id != request.builder:
        yield f"its builder is {given.predicate.run_details.builder.id}, not {request.builder}"
    quant, said = request.file_filter.quant, build.external_parameters.get("quant", "")
    is_named = quant not in ("", *quants.DECIDED, quants.ALL)
    if is_named and said and quants.canonical(quant.upper()) != quants.canonical(str(said).upper()):
        yield f"externalParameters.quant is {said}, not {quant.upper()}"
    if not all(trace.has_receipt(file, session.home) for file in files):
        return
    here = trace.of_file(files[0], session.home)
    ours = here.build.build_type
    if request.provenance and ours == trace.DOWNLOAD != build.build_type:  # its maker's
        log.info(f"{request.provenance}: says how {files[0].name} was made elsewhere")
        return
    known = {each.name for each in here.build.resolved_dependencies}
    yield from statements.differences(here, given, {trace.ARCHIVE, trace.WHEEL} - known)


def check_signatures(session: Session, public_key: Path) -> dict[Path, str]:
    """What is wrong with the signatures of what is named, and of the statements about it; empty:
    nothing. Raises PipelineError."""
    request = session.request
    targets = provenance.to_sign(session)
    signatures = {target: signing.signature_of(target) for target in targets}
    if request.signature:
        if len(targets) > 1:
            names = ", ".join(target.name for target in targets)
            raise UsageError(
                f"signature={request.signature}: there are {len(targets)} files: {names}"
            )
        signatures = {targets[0]: request.signature}
    places = [target.with_name(target.name + statements.SUFFIX) for target in targets]
    places = [request.provenance] if request.provenance else [p for p in places if p.is_file()]
    signatures |= {place: signing.signature_of(place) for place in places}
    answers = signing.verify(signatures, public_key, session.home, offline=request.offline)
    return {target: _shown(why) for target, why in answers.items()}


def _shown(text: str) -> str:
    """What a stranger's file says, as one line that leaves the terminal alone."""
    return printable(text).replace("\n", " ")


def _sha256(file: Path, digests: Mapping[Path, str]) -> str:
    """The hash of a file, which was just compared with its receipt or is computed now."""
    return digests.get(file) or sha256(file)
