"""Statements out of receipts: each way in which a file can have been made."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import recorded
from recorded import COMMIT, SLUG, SOURCE, TOOL, record

from pipeline.commands import trace
from pipeline.core import statement
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.statement import Descriptor, Statement
from pipeline.core.store import artifacts


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "hôme ü")


def dependencies(made: Statement) -> dict[str, Descriptor]:
    return {each.name: each for each in made.build.resolved_dependencies}


def checked(file: Path, home: Home) -> Statement:
    """The statement, which reads as it was written, and has parameters that are known."""
    made = trace.of_file(file, home)
    assert statement.parse(statement.text(made)) == made
    trace.require_known(made)
    assert str(home.root) not in statement.text(made)
    return made


def test_a_repository_that_was_converted_and_quantized(home: Home) -> None:
    file = recorded.quantized(home)
    recorded.built(home)
    made = checked(file, home)
    assert made.build.external_parameters == {
        "model": "org/model",
        "revision": COMMIT,
        "quant": "Q4_K_M",
        "imatrix": True,
    }
    assert made.build.internal_parameters == {"outtype": "BF16"}
    assert made.subject[0].annotations == {"license": "apache-2.0"}
    found = dependencies(made)
    assert found["model.safetensors"].uri == (
        f"pkg:huggingface/org/model@{COMMIT}#model.safetensors"
    )
    config = (home.models / "source" / SLUG / "config.json").read_bytes()
    assert found["config.json"].digest == {
        "gitBlob": "d" * 40,
        "sha256": hashlib.sha256(config).hexdigest(),
    }
    assert found["imatrix"].digest == {"sha256": "1" * 64}
    assert found["llama-quantize"].annotations["recipe"]["compiler"] == "12.2.0"
    assert found["llama.cpp archive"].digest == {"sha256": pins().llama_cpp_archive.sha256}
    assert found["converter requirements"].digest == {"sha256": "f" * 64}
    byproducts = [each.name for each in made.predicate.run_details.byproducts]
    assert byproducts == ["imatrix-0123.gguf", "model.bf16.gguf"]


def test_what_was_removed_since_is_still_known(home: Home) -> None:
    """An intermediate file, the sources and the programs may go: what is left agrees."""
    file = recorded.quantized(home)
    recorded.built(home)
    before = checked(file, home)
    artifacts.discard(file.with_name("model.bf16.gguf"))
    for folder in (home.models / "source" / SLUG, home.bins / "linux-x64-cpu"):
        (folder / ".state.json").unlink()
    (home.bins / ".source" / ".state.json").unlink()
    after = checked(file, home)
    assert "sha256" not in dependencies(after)["config.json"].digest
    assert "recipe" not in dependencies(after)["llama-quantize"].annotations
    assert statement.differences(after, before, {trace.ARCHIVE}) == []


def test_the_intermediate_file_itself(home: Home) -> None:
    file = recorded.quantized(home).with_name("model.bf16.gguf")
    made = checked(file, home)
    assert made.build.external_parameters == {
        "model": "org/model",
        "revision": COMMIT,
        "quant": "BF16",
    }
    assert made.build.internal_parameters == {"sandbox": "Landlock 7, seccomp"}


@pytest.mark.parametrize("more", ["adapter", "projector"])
def test_an_adapter_and_a_projector(more: str, home: Home) -> None:
    file = recorded.gguf(home.models / "gguf" / SLUG / "x.gguf")
    recipe: dict[str, Any] = {
        "step": "convert",
        "files": {"adapter_model.safetensors": f"sha256:{'e' * 64}"},
        "name": "style",
        "outtype": "F16",
        "converter": {**recorded.LLAMA_CPP, "requirements": "f" * 64},
        more: True,
    }
    if more == "adapter":
        recipe["base"] = {"config.json": f"sha256:{'9' * 64}"}
    record(file, recipe)
    made = checked(file, home)
    assert made.build.external_parameters[more] is True
    assert ("base/config.json" in dependencies(made)) == (more == "adapter")


def test_a_split_download_is_one_statement(home: Home) -> None:
    folder = home.models / "gguf" / SLUG / "Q8_0"
    parts = [recorded.gguf(folder / f"m-0000{n}-of-00002.gguf", name=str(n)) for n in (1, 2)]
    for number, part in enumerate(parts):
        record(part, {"step": "fetch", "file": f"sha256:{str(number) * 64}", **SOURCE})
    made = checked(parts[0], home)
    assert [each.name for each in made.subject] == [part.name for part in parts]
    assert made.build.external_parameters["files"] == [f"Q8_0/{part.name}" for part in parts]
    uri = dependencies(made)[f"Q8_0/{parts[1].name}"].uri
    assert uri == f"pkg:huggingface/org/model@{COMMIT}#Q8_0/{parts[1].name}"


def test_a_users_own_model_is_named_without_its_path(home: Home) -> None:
    file = recorded.gguf(home.models / "gguf" / "local__mine__0123" / "model.q8_0.gguf")
    recipe = {
        "step": "quantize",
        "input": f"sha256:{'2' * 64}+{'3' * 64}",
        "type": "Q8_0",
        "imatrix": None,
        "tool": {**TOOL, "commit": "b10605"},
    }
    record(file, recipe, source={"type": "file", "ref": str(home.root / "secret" / "mine.gguf")})
    made = checked(file, home)
    assert made.build.external_parameters == {"model": "mine.gguf", "quant": "Q8_0"}
    assert {"input, part 1", "input, part 2", "llama-quantize"} == {*dependencies(made)}
    assert dependencies(made)["llama-quantize"].annotations == {"commit": "b10605"}


def packed(home: Home, name: str, made_by: Any) -> Path:
    archive = home.bins / "packages" / name
    archive.parent.mkdir(parents=True, exist_ok=True)
    manifest = {
        "commit": COMMIT,
        "tree": "a" * 40,
        "platform": "linux-x64",
        "backend": "cpu",
        "portable": True,
    }
    data = json.dumps(manifest).encode()
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("manifest.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    source = {"type": "programs", "recipe": made_by} if made_by else None
    record(archive, {"step": "package", "format": 1, "manifest": "0" * 64}, source=source)
    return archive


def test_packages_of_each_origin(home: Home) -> None:
    prebuilt = {"step": "prebuilt", "release": "b7", "assets": {"a.zip": f"sha256:{'4' * 64}"}}
    made = checked(packed(home, "a.tar.gz", prebuilt), home)
    assert dependencies(made)["a.zip"].uri == "pkg:github/ggml-org/llama.cpp@b7#a.zip"
    installed = {"step": "install_package", "archive": f"sha256:{'5' * 64}"}
    made = checked(packed(home, "b.tar.gz", installed), home)
    assert dependencies(made)["package"].digest == {"sha256": "5" * 64}
    compiled = {"step": "build", "source": {"commit": COMMIT, "tree": "a" * 40}}
    made = checked(packed(home, "c.tar.gz", compiled), home)
    assert dependencies(made)["llama.cpp"].digest == {"gitCommit": COMMIT, "gitTree": "a" * 40}
    with pytest.raises(PipelineError, match="does not say how its programs were made"):
        trace.of_file(packed(home, "old.tar.gz", None), home)


def test_a_licence_that_would_move_the_cursor(home: Home) -> None:
    file = recorded.gguf(home.models / "gguf" / SLUG / "m.gguf", license="mit\x1b[2J\u202e")
    record(file, {"step": "fetch", "file": f"sha256:{'1' * 64}", **SOURCE})
    assert checked(file, home).subject[0].annotations == {"license": "mit[2J"}


def test_what_there_is_no_statement_of(home: Home, tmp_path: Path) -> None:
    file = recorded.quantized(home)
    with pytest.raises(PipelineError, match="of the step imatrix"):
        trace.of_file(file.with_name("imatrix-0123.gguf"), home)
    own = recorded.gguf(tmp_path / "own.gguf")
    with pytest.raises(PipelineError, match="has no receipt"):
        trace.of_file(own, home)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(PipelineError, match="has changed since it was made"):
        trace.of_file(file, home)
