"""in-toto statements with SLSA provenance: which file was made, from what, by whom.

The form is in-toto's Statement v1 with the predicate SLSA provenance v1. Statements are read
strictly: what is not understood is refused, unless it is an extension field, `vendor_field`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from msgspec import Struct, ValidationError, convert, field, to_builtins

from .errors import PipelineError
from .text import decoded, printable, repeated

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
SUFFIX, SIGNATURE = ".intoto.json", ".sig"  # what is added to the name of the file
MOST_BYTES = 16_000_000
EXTENSION = re.compile(r"[A-Za-z0-9]+_\w+")  # as SLSA names them; no other field has an underscore
FREE = ("externalParameters", "internalParameters", "annotations", "digest", "version")
HASH_DIGITS = {"sha256": 64, "gitCommit": 40, "gitTree": 40, "gitBlob": 40}
LLAMA_CPP = "git+https://github.com/ggml-org/llama.cpp"


class Form(
    Struct,
    frozen=True,
    kw_only=True,
    rename="camel",
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """An object of a statement, with the fields that its specification has."""


class Descriptor(Form, frozen=True, kw_only=True):
    """in-toto's ResourceDescriptor: a file, or anything else that has a digest or an address."""

    name: str = ""
    uri: str = ""
    digest: Mapping[str, str] = {}
    content: str = ""
    download_location: str = ""
    media_type: str = ""
    annotations: Mapping[str, Any] = {}


class BuildDefinition(Form, frozen=True, kw_only=True):
    """What was built, and from what: `external_parameters` are the user's choices."""

    build_type: str
    external_parameters: Mapping[str, Any]
    internal_parameters: Mapping[str, Any] = {}
    resolved_dependencies: tuple[Descriptor, ...] = ()


class Builder(Form, frozen=True, kw_only=True):
    """Who vouches for it."""

    id: str
    version: Mapping[str, str] = {}
    builder_dependencies: tuple[Descriptor, ...] = ()


class BuildMetadata(Form, frozen=True, kw_only=True):
    """Which run it was."""

    invocation_id: str = ""
    started_on: str = ""
    finished_on: str = ""


class RunDetails(Form, frozen=True, kw_only=True):
    """The run that built it."""

    builder: Builder
    metadata: BuildMetadata = BuildMetadata()
    byproducts: tuple[Descriptor, ...] = ()


class Provenance(Form, frozen=True, kw_only=True):
    """SLSA's predicate."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(Form, frozen=True, kw_only=True):
    """A statement about the files of `subject`."""

    type: str = field(name="_type")
    subject: tuple[Descriptor, ...]
    predicate_type: str
    predicate: Provenance

    @property
    def build(self) -> BuildDefinition:
        return self.predicate.build_definition


def statement(
    subject: Iterable[Descriptor],
    build: BuildDefinition,
    builder: Builder,
    *,
    finished: str = "",
    byproducts: Iterable[Descriptor] = (),
) -> Statement:
    """A statement of this form. `finished` is the time at which the last file was made."""
    details = RunDetails(
        builder=builder, metadata=BuildMetadata(finished_on=finished), byproducts=tuple(byproducts)
    )
    return Statement(
        type=STATEMENT,
        subject=tuple(subject),
        predicate_type=PROVENANCE,
        predicate=Provenance(build_definition=build, run_details=details),
    )


def text(made: Statement, *, indent: int | None = 1) -> str:
    """The statement as a file holds it: the same statement gives the same bytes."""
    return json.dumps(to_builtins(made), indent=indent, ensure_ascii=False) + "\n"


def companions(file: Path) -> list[Path]:
    """The statement and the signatures that lie beside a file."""
    ends = (SUFFIX, SUFFIX + SIGNATURE, SIGNATURE)
    return [path for end in ends if (path := file.with_name(file.name + end)).is_file()]


def of_llama_cpp(commit: str, tree: str = "") -> Descriptor:
    """llama.cpp's source, by its commit and git's hash of its files. A tree with changes has
    another identity behind its hash, which is kept."""
    digest = {"gitCommit": commit, "gitTree": tree.partition("+")[0]}
    return Descriptor(
        name="llama.cpp",
        uri=f"{LLAMA_CPP}@{commit}",
        digest={kind: value for kind, value in digest.items() if value},
        annotations={"changes": tree.partition("+")[2]} if "+" in tree else {},
    )


def purl(kind: str, name: str, version: str, inside: str = "") -> str:
    """A package URL: `pkg:huggingface/org/model@commit#file`."""
    end = f"#{quote(inside)}" if inside else ""
    return f"pkg:{kind}/{quote(name)}@{quote(version, safe='')}{end}"


# Reading


def read(path: Path) -> Statement:
    """The statement in a file. Raises PipelineError where it is none, or says anything that is not
    understood."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        return parse(decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)[:300]
        why = printable(str(why)).replace("\n", " ")
        raise PipelineError(f"{path}: is not a statement of provenance: {why}") from None


def parse(document: str) -> Statement:
    """A statement from JSON. Raises ValueError, RecursionError."""
    data = json.loads(document, object_pairs_hook=_object, parse_constant=_no_number)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    for name, expected in (("_type", STATEMENT), ("predicateType", PROVENANCE)):
        if data.get(name) != expected:
            raise ValueError(f"its {name} is {data.get(name)!r}, this version reads {expected}")
    try:
        made = convert(_plain(data), Statement)
    except ValidationError as error:
        raise ValueError(str(error)) from None
    dependencies = made.build.resolved_dependencies
    for kind, descriptors in (("subject", made.subject), ("dependency", dependencies)):
        if twice := repeated(each.name for each in descriptors):
            raise ValueError(f"{kind} {min(twice)!r} is in it twice")
        for each in descriptors:
            _require_digests(kind, each)
    if not made.subject or not all(each.digest.get("sha256") for each in made.subject):
        raise ValueError("a subject has no sha256")
    return made


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may be given twice: another reader may take the other
    value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{repeated(name for name, _ in pairs)[0]!r} is in it twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _plain(value: Any) -> Any:
    """Without extension fields and without what is unset: null and empty mean the same."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: inner if name in FREE else _plain(inner)
        for name, inner in value.items()
        if inner is not None and (name == "_type" or not EXTENSION.fullmatch(name))
    }


def _require_digests(kind: str, each: Descriptor) -> None:
    if not (each.digest or each.uri or each.content):
        raise ValueError(f"{kind} {each.name!r} has neither digest nor uri")
    for name, digits in HASH_DIGITS.items():
        value = each.digest.get(name)
        if value is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise ValueError(f"{kind} {each.name!r}: {value!r} is no {name}")


# Comparing


def differences(here: Statement, given: Statement, unknown: Iterable[str] = ()) -> list[str]:
    """What `given` says otherwise than `here`, which was put together from receipts, or leaves out.
    Digests and notes that are not known here are not compared, nor dependencies named in `unknown`.
    """
    return [*_of_builds(here.build, given.build, set(unknown)), *_of_files(here, given)]


def _of_files(here: Statement, given: Statement) -> Iterator[str]:
    theirs = {each.digest["sha256"]: each for each in given.subject}
    for each in here.subject:
        other = theirs.pop(each.digest["sha256"], None)
        if other is None:
            yield f"{each.name}: its sha256 {each.digest['sha256']} is not in the statement"
        else:
            yield from _values(f"{each.name}: annotations", each.annotations, other.annotations)
    yield from (f"{each.name}: is in the statement, and not here" for each in theirs.values())


def _of_builds(here: BuildDefinition, given: BuildDefinition, unknown: set[str]) -> Iterator[str]:
    yield from _values("buildType", {"": here.build_type}, {"": given.build_type})
    names = {*here.external_parameters, *given.external_parameters}
    for name in sorted(names):
        yield from _values(
            "externalParameters",
            {name: here.external_parameters.get(name)},
            {name: given.external_parameters.get(name)},
        )
    yield from _values("internalParameters", here.internal_parameters, given.internal_parameters)
    ours = {each.name: each for each in here.resolved_dependencies}
    theirs = {each.name: each for each in given.resolved_dependencies}
    for name in sorted({*ours, *theirs} - unknown):
        if name not in theirs:
            yield f"{name}: the statement lacks this dependency"
        elif name not in ours:
            yield f"{name}: the statement names this dependency, the receipts do not"
        else:
            our, their = ours[name], theirs[name]
            yield from _values(f"{name}: digest", our.digest, their.digest)
            yield from _values(f"{name}: annotations", our.annotations, their.annotations)
            yield from _values(name, {"uri": our.uri}, {"uri": their.uri})


def _values(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in ours.items():
        if theirs.get(name) != value:
            place = f"{where}.{name}" if name else where
            given = json.dumps(theirs.get(name), ensure_ascii=False)[:200]
            known = json.dumps(value, ensure_ascii=False)[:200]
            yield f"{place}: the statement says {given}, the receipts say {known}"
