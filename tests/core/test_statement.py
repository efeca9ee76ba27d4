"""Statements: written, read strictly, compared; and as in-toto's own library reads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import statement
from pipeline.core.errors import PipelineError
from pipeline.core.statement import BuildDefinition, Builder, Descriptor, Statement

A, B, C = "a" * 64, "b" * 64, "c" * 40


def made() -> Statement:
    return statement.statement(
        [Descriptor(name="größe.gguf", digest={"sha256": A}, annotations={"license": "mit"})],
        BuildDefinition(
            build_type="urn:example:build",
            external_parameters={"model": "org/model", "quant": "Q4_K_M"},
            internal_parameters={"outtype": "F16"},
            resolved_dependencies=(
                Descriptor(name="config.json", digest={"gitBlob": C, "sha256": B}),
                statement.of_llama_cpp(C, C),
            ),
        ),
        Builder(id="urn:example:builder", version={"llama-pipeline": "0.1.0"}),
        finished="2026-11-30T00:00:00+00:00",
        byproducts=[Descriptor(name="model.f16.gguf", digest={"sha256": B})],
    )


def test_what_is_written_is_read() -> None:
    text = statement.text(made())
    assert statement.parse(text) == made()
    assert text == statement.text(made()) and "größe" in text and text.endswith("}\n")
    data = json.loads(text)
    assert data["_type"] == "https://in-toto.io/Statement/v1"
    assert data["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement.text(made(), indent=None).count("\n") == 1


def test_in_totos_own_library_takes_it() -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement as Theirs

    text = statement.text(made())
    parsed = json_format.Parse(text, statement_pb2.Statement())  # unknown fields are errors
    Theirs.copy_from_pb(parsed).validate()
    predicate = json.dumps(json.loads(text)["predicate"])
    theirs = json_format.Parse(predicate, provenance_pb2.Provenance())
    assert theirs.run_details.builder.id == "urn:example:builder"
    assert [each.name for each in theirs.build_definition.resolved_dependencies] == [
        "config.json",
        "llama.cpp",
    ]


def of(path: str, value: Any) -> Callable[[Any], None]:
    """Set a value inside a document, by its dotted path."""

    def change(document: Any) -> None:
        *names, last = path.split(".")
        for name in names:
            document = document[int(name) if name.isdigit() else name]
        document[last] = value

    return change


REFUSED = {
    "another type of statement": (of("_type", "https://in-toto.io/Statement/v0.1"), "_type"),
    "another predicate": (of("predicateType", "https://slsa.dev/provenance/v0.2"), "predicateType"),
    "a field beside the predicate": (of("extra", 1), "unknown field `extra`"),
    "a field in the build": (of("predicate.buildDefinition.extra", 1), "unknown field `extra`"),
    "a field in the run": (of("predicate.runDetails.extra", 1), "unknown field `extra`"),
    "a field of a dependency": (
        of("predicate.buildDefinition.resolvedDependencies.0.hash", A),
        "unknown field `hash`",
    ),
    "no subject": (of("subject", []), "a subject has no sha256"),
    "a subject without a digest": (of("subject.0.digest", {}), "neither digest nor uri"),
    "half a digest": (of("subject.0.digest.sha256", A[:63]), "is no sha256"),
    "a digest in capitals": (of("subject.0.digest.sha256", A.upper()), "is no sha256"),
    "the same dependency twice": (
        of("predicate.buildDefinition.resolvedDependencies.0.name", "llama.cpp"),
        "'llama.cpp' is in it twice",
    ),
    "parameters that are none": (
        of("predicate.buildDefinition.externalParameters", []),
        "Expected `object`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    data = json.loads(statement.text(made()))
    change(data)
    path = tmp_path / "a statement.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PipelineError) as caught:
        statement.read(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, ""),
        ('{"_type": 1, "_type": 2}', "'_type' is in it twice"),
        ('{"_type": NaN}', "NaN is not JSON"),
        ("\0", "zero bytes"),
    ],
)
def test_no_statement_at_all(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "statement.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PipelineError) as caught:
        statement.read(path)
    assert said in str(caught.value) and "is not a statement of provenance" in str(caught.value)
    with pytest.raises(PipelineError, match="No such file"):
        statement.read(tmp_path / "none.json")


@pytest.mark.timeout(60)  # each name was once looked for among all: hours
def test_many_names_are_no_work(tmp_path: Path) -> None:
    path = tmp_path / "statement.json"
    names = ", ".join(f'"{number}": 0' for number in range(400_000))
    path.write_text(f'{{{names}, "7": 1}}', encoding="utf-8")
    with pytest.raises(PipelineError, match="'7' is in it twice"):
        statement.read(path)


def test_extension_fields_and_what_is_unset_do_not_count() -> None:
    data = json.loads(statement.text(made()))
    data["example_note"] = {"anything": True}
    data["predicate"]["runDetails"]["builder"]["example_reviewed"] = True
    data["predicate"]["runDetails"]["metadata"]["invocationId"] = None
    data["predicate"]["buildDefinition"]["resolvedDependencies"][0]["uri"] = ""
    assert statement.parse(json.dumps(data)) == made()


def test_the_same_has_no_differences() -> None:
    assert statement.differences(made(), made()) == []


def test_what_only_the_other_knows_is_not_compared() -> None:
    def without(document: Any) -> None:
        del document["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"]

    assert statement.differences(changed(without), made()) == []
    (lacking,) = statement.differences(made(), changed(without))
    assert lacking.startswith("config.json: digest.sha256: the statement says null")
    more = of("predicate.buildDefinition.resolvedDependencies.0.name", "archive")
    assert statement.differences(made(), changed(more), {"archive", "config.json"}) == []


def changed(*changes: Callable[[Any], None]) -> Statement:
    data = copy.deepcopy(json.loads(statement.text(made())))
    for change in changes:
        change(data)
    return statement.parse(json.dumps(data))


DEPENDENCIES = "predicate.buildDefinition.resolvedDependencies"
DIFFERENT = {
    "the file": (of("subject.0.digest.sha256", B), "is not in the statement"),
    "its licence": (of("subject.0.annotations.license", "gpl"), '"gpl"'),
    "a file more": (
        of("subject", [{"digest": {"sha256": A}}, {"name": "x", "digest": {"sha256": B}}]),
        "x: is in the statement, and not here",
    ),
    "the type of build": (of("predicate.buildDefinition.buildType", "urn:other"), "buildType"),
    "a parameter": (
        of("predicate.buildDefinition.externalParameters.quant", "Q8_0"),
        'externalParameters.quant: the statement says "Q8_0", the receipts say "Q4_K_M"',
    ),
    "a parameter more": (
        of("predicate.buildDefinition.externalParameters.seed", 7),
        "externalParameters.seed: the statement says 7, the receipts say null",
    ),
    "the intermediate type": (
        of("predicate.buildDefinition.internalParameters.outtype", "F32"),
        "internalParameters.outtype",
    ),
    "a dependency's digest": (of(f"{DEPENDENCIES}.0.digest.gitBlob", "d" * 40), "digest.gitBlob"),
    "no digest in common": (of(f"{DEPENDENCIES}.0.digest", {"sha512": "e"}), "digest.gitBlob"),
    "where it came from": (of(f"{DEPENDENCIES}.1.uri", "git+https://example.com/x"), "uri"),
    "a dependency less": (
        of(DEPENDENCIES, [{"name": "config.json", "digest": {"gitBlob": C, "sha256": B}}]),
        "llama.cpp: the statement lacks this dependency",
    ),
    "another dependency": (of(f"{DEPENDENCIES}.1.name", "llama.dpp"), "llama.dpp: the statement"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_each_difference_is_named(name: str) -> None:
    change, said = DIFFERENT[name]
    assert said in "; ".join(statement.differences(made(), changed(change)))


def test_a_changed_tree_of_llama_cpp_keeps_its_identity() -> None:
    each = statement.of_llama_cpp(C, f"{C}+0123456789abcdef")
    assert each.digest == {"gitCommit": C, "gitTree": C}
    assert each.annotations == {"changes": "0123456789abcdef"}


def test_what_lies_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ein mödel.gguf"
    names = [f"{file.name}.intoto.json", f"{file.name}.intoto.json.sig", f"{file.name}.sig"]
    for name in [*names, "another.gguf.sig", f"{file.name}.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in statement.companions(file)] == names
