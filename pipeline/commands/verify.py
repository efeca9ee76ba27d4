"""`verify`: every artifact hashed again and held against its receipt, its statement of provenance,
and its signature."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.bins.compile import git_tree
from pipeline.core import log, signing
from pipeline.core import statement as statements
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.process import WINDOWS
from pipeline.core.statement import Statement
from pipeline.core.store import active, receipts
from pipeline.core.store.hashing import sha256
from pipeline.core.store.locks import only_one
from pipeline.core.store.receipts import FILE, Entry
from pipeline.core.text import plural, printable
from pipeline.models import converter, gguf, quants

from . import provenance, trace
from .model import Model
from .request import Request
from .session import Session


class Checks:
    """What was checked: each is printed as it comes, unless all become JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.results: list[dict[str, str]] = []
        self._as_json = as_json
        self._wrong: list[str] = []  # keys of `hints`

    def add(self, path: Path, problem: str, kind: str, by: str = "") -> None:
        """`kind` is a key of `hints`, `by` how it was checked if not by its receipt."""
        self.results.append({"path": str(path), "problem": problem})
        if problem:
            self._wrong.append(kind)
        if not self._as_json:
            print(f"{'wrong' if problem else 'ok':<5} {path}{by}", flush=True)

    def require_right(self) -> None:
        """Print what becomes JSON. Raises PipelineError with all that is wrong."""
        if self._as_json:
            print(json.dumps(self.results, indent=1))
        if self._wrong:
            wrong = [each for each in self.results if each["problem"]]
            lines = [f"{each['path']}: {each['problem']}" for each in wrong]
            raise PipelineError(
                f"{len(lines)} of {plural(len(self.results), 'check')} failed:\n"
                + "\n".join(lines),
                "; ".join(hints()[kind] for kind in dict.fromkeys(self._wrong)),
            )


def verify(session: Session) -> None:
    """Check the home, or what belongs to `model=`, or the package `pkg=`. Raises PipelineError."""
    model, request = session.model, session.request
    require_subject(session)
    checks = Checks(as_json=model.request.json)
    with suppress(OSError):  # read-only: then nobody removes anything either
        active.begin(model.home.run)
    digests: dict[Path, str] = {}  # of what is as its receipt says
    for path, entry in package(request.pkg, request) if request.pkg else artifacts(model):
        problem = problem_of(path, entry)
        known = receipts.of(path) if entry else None
        digests[path] = known.sha256 if known and not problem else ""
        is_ours = entry and not request.pkg and is_in_home(session, path)
        checks.add(path, problem, "made" if is_ours else "given")
    given = list(stated(session, digests))
    for place, files in given:
        kind = "stated" if is_in_home(session, *files) else "given"
        checks.add(place, check_statement(session, place, files, digests), kind)
    for file in of_unknown_builder(session, [files for _, files in given]):
        checks.add(file, f"no statement says that {request.builder} built it", "given")
    if request.public_key:
        for path, problem in check_signatures(session, request.public_key).items():
            checks.add(path, problem, "signed", " (signature)")
    environment = converter.installed(model.home)
    if not (request.reference or request.pkg) and environment.has_receipt():
        checks.add(environment.folder, environment.damage(hashes=True), "made")
    checks.require_right()
    if request.reference and not any(digests.values()) and len(checks.results) == len(digests):
        log.info("no receipt says what it should be; its header was checked")
    else:
        log.info(f"{plural(len(checks.results), 'artifact')} as their receipts say")


def is_in_home(session: Session, *paths: Path) -> bool:
    """Whether all of them are where the pipeline makes and keeps files."""
    return all(path.is_relative_to(session.model.home.root) for path in paths)


def hints() -> dict[str, str]:
    """What to do about what is wrong, by where it comes from."""
    return {
        "made": f"{doitw('forget STEP')} for the step that made it, then run the step again",
        "given": "do not use it: get the file again from where it came from",
        "stated": f"for a statement of what was made here: {doitw('provenance model=…')}",
        "signed": "do not use it: get the file, its signature and the key again from who signed it",
    }


def artifacts(model: Model) -> Iterator[tuple[Path, Entry | None]]:
    """The artifacts that are meant; a `.gguf` of the user's own has no receipt."""
    home = model.home
    tops = [home.bins, *home.model_folders("gguf"), *home.model_folders("source")]
    if reference := model.request.reference:
        if reference.kind == "folder" and model.request.public_key and model.known() is None:
            return  # a folder of somebody's, of which the signature alone is checked
        if reference.path and reference.kind == "gguf" and model.known() is None:
            yield reference.path, None  # what is wrong with its header is told of it
            return
        resolved = model.require_resolved()
        tops = [home.models / "gguf" / resolved.slug, home.models / "source" / resolved.slug]
        if resolved.local and resolved.kind == "gguf":
            for path in (resolved.folder / file.name for file in resolved.files):
                is_ours = trace.has_receipt(path, home)
                yield path, receipts.of(path) if is_ours else None
    for top in tops:
        for receipt in sorted(top.rglob(FILE)):
            if any(folder.name.endswith((".part", ".old")) for folder in receipt.parents):
                continue
            for name, entry in receipts.load(receipt.parent).items():
                if entry.mtime_ns is not None:  # else removed on purpose after it had served
                    yield receipt.parent / name, entry


def package(pkg: Path, request: Request) -> Iterator[tuple[Path, Entry | None]]:
    """The package `pkg=`, with its receipt if it was packed here. Raises UsageError where nothing
    says what it should be."""
    entry = receipts.of(pkg)
    beside = pkg.with_name(pkg.name + statements.SUFFIX)
    if not (entry or beside.is_file() or request.provenance or request.public_key):
        raise UsageError(
            f"pkg={pkg}: nothing here says what it should be: there is neither a receipt nor "
            f"{beside.name} beside it",
            "pass provenance=FILE, or public_key=KEY.pem for its signature",
        )
    yield pkg, entry


def problem_of(path: Path, entry: Entry | None) -> str:
    """What is wrong with an artifact, looked at twice where something is; empty: nothing."""
    try:
        problem = check(path, entry)
        return checked_again(path, problem) if problem and entry else problem
    except PipelineError as error:
        return error.message.removeprefix(f"{path}: ")
    except OSError as error:
        return str(error)


def checked_again(path: Path, problem: str) -> str:
    """What is wrong with an artifact once no other run works on it, which may just have made it
    anew or removed it; `problem` where that cannot be told."""
    with suppress(OSError), only_one(path):
        entry = receipts.of(path)
        return check(path, entry) if entry and entry.mtime_ns is not None else ""
    return problem


def check(path: Path, entry: Entry | None) -> str:
    """What is wrong with an artifact; empty: nothing."""
    if entry is None:
        if path.suffix.lower() == ".gguf":
            gguf.read(path)
        return ""
    if not path.exists():
        return "is missing"
    if path.is_dir():
        if WINDOWS:  # which does not keep the modes that are part of git's hash
            return "" if git_tree.stamp(path) == entry.sha256 else "has changed files"
        expected = {**entry.recipe, **(entry.source or {})}["tree"]
        digest = git_tree.folder_hash(path)
        return (
            "" if digest == expected else f"has the tree hash {digest}, its receipt says {expected}"
        )
    if path.stat().st_size != entry.size:
        return f"has {path.stat().st_size} bytes, its receipt says {entry.size}"
    digest = sha256(path)
    if digest != entry.sha256:
        return f"has the sha256 {digest}, its receipt says {entry.sha256}"
    if path.suffix == ".gguf":
        gguf.read(path)
    return ""


# Statements of provenance, and signatures


def require_subject(session: Session) -> None:
    """Raise UsageError where a statement, a key or a signature is given without its file."""
    request = session.request
    if provenance.only_one_named(request) or request.reference:
        return
    for name in ("provenance", "public_key", "signature"):
        if value := getattr(request, name):
            raise UsageError(f"{name}={value}: of which file?", "pass model=… or pkg=FILE")


def stated(session: Session, digests: Mapping[Path, str]) -> Iterator[tuple[Path, list[Path]]]:
    """The statements to check, each with its files: `provenance=`, else those beside the files."""
    if given := session.request.provenance:
        reference = session.request.reference
        is_file = reference is not None and reference.kind == "gguf"
        files = provenance.to_sign(session)[:1] if is_file else provenance.subjects(session)
        if len(files) > 1:  # a projector has a statement of its own
            subjects = {each.digest["sha256"] for each in statements.read(given).subject}
            files = [file for file in files if _sha256(file, digests) in subjects] or files[:1]
        yield given, gguf.shards(files[0])
        return
    for path in digests:
        place = path.with_name(path.name + statements.SUFFIX)
        if path.is_file() and place.is_file():
            yield place, gguf.shards(path)


def of_unknown_builder(session: Session, stated: Sequence[Sequence[Path]]) -> Iterator[Path]:
    """Of what is named, the files without a statement, where `builder=` requires one. `stated` are
    the files of each statement."""
    request = session.request
    if not request.builder or request.provenance:
        return
    if not (request.pkg or request.reference):
        if not stated:
            raise UsageError(f"builder={request.builder}: there is no statement to compare it with")
        return
    known = {file.resolve() for files in stated for file in files}
    yield from (file for file in provenance.subjects(session) if file.resolve() not in known)


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
